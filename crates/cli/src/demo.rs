//! `gpusq demo`: the whole path on generated text, with no files and no network.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::ArgMatches;
use gpusq::arch::Config as ModelConfig;
use gpusq::compress::Run;
use gpusq::config::{CONFIG_FILE, Config};
use gpusq::format::atomic::write_file;
use gpusq::model::Model;
use gpusq::report::{self, Ablation};
use gpusq::task::{Split, Tokenizer, synthetic, task};
use gpusq::tensor::Group;
use gpusq::{Error, Result};
use serde_json::json;

use crate::args;
use crate::progress::Progress;

/// Sentences to train on and to score.
const SENTENCES: (usize, usize) = (10_000, 1_000);

/// Settings under which the demo's small model, trained from random weights, learns its task: higher rates
/// and fewer examples a step than for a pre-trained model.
const SETTINGS: &str = r#"
[data]
max_length = 48
[train]
epochs = 8
batch_size = 32
learning_rate = 5e-4
dropout = 0.1
checkpoint_every = 0
[prune]
epochs = 3
batch_size = 32
learning_rate = 3e-4
dropout = 0.0
checkpoint_every = 0
[quantize]
epochs = 2
batch_size = 32
learning_rate = 1e-4
dropout = 0.0
checkpoint_every = 0
"#;

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    let started = Instant::now();
    let out = m.get_one::<PathBuf>("out").expect("has a default").clone();
    let mut progress = Progress::new(m.get_flag("json"));
    let mut asked = Config::default();
    m.get_one::<String>("seed").map(|text| asked.set("seed", text)).transpose()?;
    let seed = asked.seed;
    if out.exists() && std::fs::read_dir(&out).map_err(Error::io(&out))?.next().is_some() {
        return Err(Error::file(&out, "already exists and is not empty; choose another --out or remove it"));
    }
    let (data, start) = (out.join("data"), out.join("start"));
    let text = synthetic::generate(seed, SENTENCES.0, SENTENCES.1);
    write_data(&data, &text)?;
    write_start(&start, &text.vocab, seed)?;

    let settings = out.join(CONFIG_FILE);
    write_file(&settings, |w| w.write_all(SETTINGS.as_bytes()))?;
    let mut config = Config::load(Some(&settings), None, &[])?;
    config.seed = seed;
    let resolved = config.to_toml();
    write_file(&settings, |w| w.write_all(resolved.as_bytes()))?;
    let task = task("sst2")?;
    let mut model = Model::load(&start)?;
    let tokenizer = Tokenizer::load(&start)?;
    model.set_head(task.head, seed)?;
    let load = |split| args::load_data(task, &data, split, &tokenizer, config.data.max_length, &model);
    let (train, dev) = (load(Split::Train)?, load(Split::Dev)?);
    progress.say(
        &format!(
            "{} generated sentences, such as:\n  {}: {}\n  {}: {}\n",
            train.examples.len() + dev.examples.len(),
            synthetic::LABELS[text.train[0].1 as usize],
            text.train[0].0,
            synthetic::LABELS[text.train[1].1 as usize],
            text.train[1].0
        ),
        json!({ "event": "data", "path": data.display().to_string() }),
    );
    let plain = {
        let mut c = config.clone();
        c.distill.enabled = false;
        c
    };
    if let Some(v) = m.get_one::<String>("precision") {
        config.set("precision", v)?;
    }
    let (compute, no_gpu) = args::compute(m, config.precision, None)?;
    if let Some(why) = no_gpu {
        progress.say(&format!("note: {why}"), json!({ "event": "note", "text": why }));
    }
    let run = |config, out| Run {
        config,
        task,
        train: &train,
        dev: &dev,
        tokenizer: &tokenizer,
        tokenizer_dir: Some(start.as_path()),
        out,
        resume: false,
        command: args::typed(),
        compute,
        group: Group::alone(),
        pipeline_parallel_size: 1,
        teacher_cache: None,
    };
    let (dense_dir, with_dir, without_dir) =
        (out.join("dense"), out.join("compressed"), out.join("no-distill"));

    progress.say("1/3 training a dense model", json!({ "event": "part", "name": "dense" }));
    let dense = run(&config, &out).finetune(&model, &dense_dir, &mut |e| progress.show(e))?;
    progress.say("2/3 compressing it, with distillation", json!({ "event": "part", "name": "distillation" }));
    let with = run(&config, &with_dir);
    let _held = with.open("demo", &dense.model)?;
    let mut record = with.compress(&dense.model, &mut |e| progress.show(e))?;
    progress.say(
        "3/3 compressing it without, for comparison",
        json!({ "event": "part", "name": "no distillation" }),
    );
    let without = run(&plain, &without_dir);
    let _held_too = without.open("demo", &dense.model)?;
    let other = without.compress(&dense.model, &mut |e| progress.show(e))?;

    for (label, r) in [("with distillation", &record.clone()), ("without distillation", &other)] {
        for stage in &r.stages[1..] {
            record
                .ablation
                .push(Ablation { label: format!("{}, {label}", stage.name), scores: stage.scores.clone() });
        }
    }
    record.title = "demo: BERT 2 x 128 from random weights".into();
    record.curves.insert(0, gpusq::compress::curve("dense", &dense.curve));
    record.stages[0].wall_seconds = dense.seconds;
    record.wall_seconds = started.elapsed().as_secs_f64();
    run(&config, &out).finish(&record)?;

    let mut table = String::from("\nscore on generated text        dense   2:4 FP16   2:4 INT8\n");
    for (label, r) in [("with distillation", &record), ("without distillation", &other)] {
        let scores: Vec<String> = r.stages.iter().map(|s| format!("{:9.2}", s.scores[0].1)).collect();
        let _ = writeln!(table, "{label:26} {}", scores.join(" "));
    }
    let (_, verdict) = record.verdict();
    let ratio = record.sizes.as_ref().map_or(f64::NAN, report::Sizes::ratio);
    let _ = write!(
        table,
        "\n{verdict}\ncompressed weights take {ratio:.4} of their FP16 size; packed model in {}\nreport: {}\n{:.0} s in all; try: gpusq eval --model {} --data {}",
        with_dir.join("packed").display(),
        out.join("report.html").display(),
        record.wall_seconds,
        with_dir.join("packed").display(),
        data.display()
    );
    let object = json!({ "event": "done", "report": out.join("report.html").display().to_string(), "model": with_dir.join("packed").display().to_string(), "verdict": verdict,
        "seconds": record.wall_seconds, "stages": record.stages, "without_distillation": other.stages });
    progress.say(&table, object);
    Ok(())
}

/// The sentences in SST-2's layout.
fn write_data(dir: &Path, text: &synthetic::SyntheticText) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    for (name, rows) in [("train.tsv", &text.train), ("dev.tsv", &text.dev)] {
        write_file(dir.join(name), |w| {
            writeln!(w, "sentence\tlabel")?;
            rows.iter().try_for_each(|(sentence, label)| writeln!(w, "{sentence}\t{label}"))
        })?;
    }
    Ok(())
}

/// A small BERT with random weights and its vocabulary.
fn write_start(dir: &Path, vocab: &[String], seed: u64) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let lines = vocab.join("\n") + "\n";
    write_file(dir.join("vocab.txt"), |w| w.write_all(lines.as_bytes()))?;
    let config = json!({ "model_type": "bert", "architectures": ["BertModel"], "vocab_size": vocab.len(), "hidden_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512, "max_position_embeddings": 64,
        "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "pad_token_id": 0 });
    let config = ModelConfig::parse(&dir.join("config.json"), &config.to_string())?;
    Model::random(config, seed)?.save(dir, None)
}
