//! Every kind of bad input ends in one line that says where and what to do, and changes nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

use crate::tiny::{
    compressed, copy, data, dense, finish, killed, model, program, run, settings, train, tree,
    without_checksums,
};

/// Inputs of a run, to be spoilt.
struct Inputs {
    dir: tempfile::TempDir,
    args: Vec<String>,
}

impl Inputs {
    /// A run of `command` from a copy of the model folder `from`.
    fn of(command: &str, from: &Path) -> Inputs {
        let dir = tempfile::tempdir().unwrap();
        copy(from, &dir.path().join("model"));
        without_checksums(&dir.path().join("model"));
        copy(&data(), &dir.path().join("data"));
        fs::copy(settings(), dir.path().join("settings.toml")).unwrap();
        let mut args = train(command, &dir.path().join("model"), &dir.path().join("out"));
        for (flag, name) in [("--data", "data"), ("--config", "settings.toml")] {
            let at = args.iter().position(|a| a == flag).unwrap();
            args[at + 1] = dir.path().join(name).to_str().unwrap().into();
        }
        Inputs { dir, args }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn replace(&self, name: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.path(name)).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(self.path(name), text.replacen(from, to, 1)).unwrap();
    }

    /// Changes the header of the model's weights; the lengths stay right.
    fn header(&self, change: impl Fn(String) -> String) {
        let path = self.path("model/model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = change(String::from_utf8(bytes[8..8 + len].to_vec()).unwrap());
        let new = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + len..]].concat();
        fs::write(path, new).unwrap();
    }

    /// Changes the entry of one tensor in the header.
    fn entry(&self, name: &str, change: impl Fn(&mut Value)) {
        self.header(|h| {
            let mut json: Value = serde_json::from_str(&h).unwrap();
            change(&mut json[name]);
            json.to_string()
        });
    }

    /// The run fails with `code` and `parts`, and leaves everything as it is.
    #[track_caller]
    fn fails(&self, code: i32, parts: &[&str]) {
        let before = tree(self.dir.path());
        run(&self.args).fails(code, parts);
        assert!(tree(self.dir.path()) == before, "something was written: {:?}", tree(self.dir.path()).keys());
        // For people there is nothing on standard output, and the same line.
        let plain: Vec<String> = self.args.iter().filter(|a| *a != "--json").cloned().collect();
        let done = run(&plain);
        assert_eq!((done.code, done.stdout.as_str()), (Some(code), ""));
        assert_eq!(done.stderr.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{}", done.stderr);
    }
}

const WEIGHT: &str = "bert.encoder.layer.1.attention.self.query.weight";

#[test]
fn spoilt_weights_are_refused() {
    let file = "model/model.safetensors";
    let new = || Inputs::of("finetune", &model());
    let i = new();
    let bytes = fs::read(i.path(file)).unwrap();
    fs::write(i.path(file), &bytes[..bytes.len() - 100]).unwrap();
    i.fails(1, &[i.path(file).to_str().unwrap()]);
    fs::write(i.path(file), &bytes[..300]).unwrap();
    i.fails(1, &[i.path(file).to_str().unwrap()]);
    fs::write(i.path(file), b"").unwrap();
    i.fails(1, &[i.path(file).to_str().unwrap()]);
    let huge = [&(1u64 << 40).to_le_bytes()[..], &bytes[8..]].concat();
    fs::write(i.path(file), huge).unwrap();
    i.fails(1, &[i.path(file).to_str().unwrap(), "header"]);

    let i = new();
    i.entry(WEIGHT, |t| t["dtype"] = "I32".into());
    i.fails(1, &[WEIGHT, "I32"]);
    let i = new();
    i.entry(WEIGHT, |t| {
        t["dtype"] = "I64".into();
        t["shape"][1] = 16.into();
    });
    i.fails(1, &[WEIGHT, "I64"]);
    let i = new();
    i.entry(WEIGHT, |t| {
        t["dtype"] = "F8_E4M3".into();
        t["shape"][1] = 128.into();
    });
    i.fails(1, &[WEIGHT, "F8_E4M3"]);
    let i = new();
    i.entry(WEIGHT, |t| t["shape"] = serde_json::json!([16, 64]));
    i.fails(1, &[i.path(file).to_str().unwrap(), WEIGHT, "[16, 64]", "[32, 32]"]);
    let i = new();
    i.header(|h| h.replacen(WEIGHT, "another", 1));
    i.fails(1, &[i.path(file).to_str().unwrap(), WEIGHT, "missing"]);
    let i = new();
    // The header as text: a JSON library would drop one of the two.
    i.header(|h| {
        let json: Value = serde_json::from_str(&h).unwrap();
        format!("{{\"{WEIGHT}\":{},{}", json[WEIGHT], h.trim_start().strip_prefix('{').unwrap())
    });
    i.fails(1, &[i.path(file).to_str().unwrap(), WEIGHT]);

    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let i = new();
        let mut bytes = fs::read(i.path(file)).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        let at = 8 + len + header[WEIGHT]["data_offsets"][0].as_u64().unwrap() as usize + 12;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        fs::write(i.path(file), bytes).unwrap();
        i.fails(1, &[i.path(file).to_str().unwrap(), WEIGHT, shown]);
    }

    let i = new();
    fs::remove_file(i.path(file)).unwrap();
    i.fails(1, &[i.path("model").to_str().unwrap(), "model.safetensors"]);
    fs::write(i.path("model/pytorch_model.bin"), b"x").unwrap();
    i.fails(1, &["pytorch_model.bin", "save_pretrained"]);
}

#[test]
fn outputs_that_are_not_finite_have_no_score_and_no_training() {
    // Values that are each allowed, and whose product is not finite.
    let huge = |i: &Inputs, file: &str| {
        let mut bytes = fs::read(i.path(file)).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        for (name, x) in [
            ("bert.embeddings.LayerNorm.weight", 3e38f32),
            ("head.out.weight.scale", 500.0),
            ("head.out.input_scale", 2e36),
        ] {
            if !header[name].is_object() {
                continue;
            }
            let at = |k: usize| 8 + len + header[name]["data_offsets"][k].as_u64().unwrap() as usize;
            let (from, to) = (at(0), at(1));
            bytes[from..to].chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&x.to_le_bytes()));
        }
        fs::write(i.path(file), bytes).unwrap();
    };
    for (from, file) in
        [(dense(), "model/model.safetensors"), (compressed().join("packed"), "model/model.gpusq.safetensors")]
    {
        let i = Inputs::of("eval", &from);
        huge(&i, file);
        let (folder, data) = (i.path("model"), i.path("data"));
        let args = ["eval", "--model", folder.to_str().unwrap(), "--data", data.to_str().unwrap(), "--json"];
        run(&args.map(String::from)).fails(1, &[folder.to_str().unwrap(), "not finite", "dev split"]);
    }
    let i = Inputs::of("finetune", &model());
    huge(&i, "model/model.safetensors");
    let done = run(&i.args);
    done.fails(1, &[i.path("model").to_str().unwrap(), "at step 1", "own outputs"]);
    assert!(!done.stderr.contains("learning rate"), "{}", done.stderr);
}

#[test]
fn a_flipped_bit_is_found_in_every_file_that_a_stage_leaves() {
    let all = compressed();
    let stages = ["pruned", "packed-fp16", "quantized", "packed"].map(|stage| all.join(stage));
    for from in [dense()].iter().chain(&stages) {
        let dir = tempfile::tempdir().unwrap();
        copy(from, dir.path());
        let names = ["model.safetensors", "model.gpusq.safetensors"];
        let file = names.iter().map(|n| dir.path().join(n)).find(|f| f.exists()).unwrap();
        let mut bytes = fs::read(&file).unwrap();
        let last = bytes.len() - 3;
        bytes[last] ^= 1;
        fs::write(&file, bytes).unwrap();
        let args = ["inspect", dir.path().to_str().unwrap(), "--json"].map(String::from);
        run(&args).fails(1, &[file.to_str().unwrap(), "tensor `", "checksum", "copy it again"]);
    }
}

#[test]
fn weights_beyond_f16_are_refused_before_a_stage_is_trained() {
    for (command, from) in
        [("compress", dense()), ("prune", dense()), ("quantize", compressed().join("pruned"))]
    {
        let i = Inputs::of(command, &from);
        let file = i.path("model/model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        let name = "bert.embeddings.word_embeddings.weight";
        let at = 8 + len + header[name]["data_offsets"][0].as_u64().unwrap() as usize + 12;
        bytes[at..at + 4].copy_from_slice(&1e30f32.to_le_bytes());
        fs::write(&file, bytes).unwrap();
        i.fails(1, &[file.to_str().unwrap(), name, "1e30", "65504", "clip"]);
    }
}

#[test]
fn spoilt_configurations_and_vocabularies_are_refused() {
    let config = "model/config.json";
    let new = || Inputs::of("finetune", &model());
    let i = new();
    i.replace(config, "\"bert\"", "\"mamba\"");
    i.fails(1, &[i.path(config).to_str().unwrap(), "mamba", "distilbert"]);
    let i = new();
    fs::write(i.path(config), "{\n  \"model_type\": bert\n}").unwrap();
    i.fails(1, &[&format!("{}:2:", i.path(config).display()), "JSON"]);
    let i = new();
    i.replace(config, "\"hidden_size\": 32", "\"hidden_size\": 1000000000000");
    i.fails(1, &[i.path(config).to_str().unwrap(), "hidden_size"]);
    let i = new();
    i.replace(config, "1e-12", "-1");
    i.fails(1, &[i.path(config).to_str().unwrap(), "layer_norm_eps", "-1"]);
    let i = new();
    fs::write(i.path(config), b"{\n\"model_type\": \"b\xe9rt\"}").unwrap();
    i.fails(1, &[&format!("{}:2:", i.path(config).display()), "UTF-8"]);
    fs::remove_file(i.path(config)).unwrap();
    fs::create_dir(i.path(config)).unwrap();
    i.fails(1, &[i.path(config).to_str().unwrap(), "give a file"]);
    let i = new();
    fs::remove_file(i.path(config)).unwrap();
    i.fails(1, &[i.path("model").to_str().unwrap(), "config.json"]);

    let vocab = "model/vocab.txt";
    let i = new();
    let words = fs::read_to_string(i.path(vocab)).unwrap();
    fs::write(i.path(vocab), words + "one\ntwo\n").unwrap();
    i.fails(1, &[i.path("model").to_str().unwrap(), "43 entries", "41", "tokenizer"]);
    let inspect = ["inspect", i.path("model").to_str().unwrap(), "--json"].map(String::from);
    let done = run(&inspect);
    done.fails(1, &[i.path("model").to_str().unwrap(), "43 entries", "41"]);
    assert_eq!(done.event("inspect")["tokenizer_entries"], 43, "what it found out is told all the same");
    let plain = run(&inspect[..2]);
    assert!(plain.code == Some(1) && plain.stdout.contains("2 layers"), "{}{}", plain.stdout, plain.stderr);
    let i = new();
    i.replace(vocab, "[CLS]", "[KLS]");
    i.fails(1, &[i.path(vocab).to_str().unwrap(), "[CLS]"]);
    let i = new();
    fs::remove_file(i.path(vocab)).unwrap();
    i.fails(1, &[i.path("model").to_str().unwrap(), "no tokenizer"]);
    let i = new();
    fs::write(i.path("model/tokenizer.json"), "{}").unwrap();
    i.fails(1, &[i.path("model/tokenizer.json").to_str().unwrap()]);
    fs::write(i.path("model/tokenizer.json"), r#"{"version": "1.0", "decoder": {"type": }}"#).unwrap();
    i.fails(1, &[i.path("model/tokenizer.json").to_str().unwrap(), "copy it again"]);
}

#[test]
fn spoilt_data_is_refused() {
    let train = "data/train.tsv";
    let new = || Inputs::of("finetune", &model());
    let i = new();
    i.replace(train, "sentence\tlabel", "sentence\tanswer");
    i.fails(1, &[&format!("{}:1:", i.path(train).display()), "`label`"]);
    let i = new();
    fs::write(i.path(train), "").unwrap();
    i.fails(1, &[i.path(train).to_str().unwrap(), "empty"]);
    let i = new();
    fs::write(i.path(train), "sentence\tlabel\n").unwrap();
    i.fails(1, &[i.path(train).to_str().unwrap(), "no examples"]);
    let i = new();
    fs::write(i.path(train), "sentence\tlabel\ngood\t1\nbad\t7\n").unwrap();
    i.fails(1, &[&format!("{}:3:", i.path(train).display()), "`7`"]);
    let i = new();
    fs::write(i.path(train), "sentence\tlabel\ngood\n").unwrap();
    i.fails(1, &[&format!("{}:2:", i.path(train).display()), "2 tab-separated fields"]);
    let i = new();
    fs::write(i.path(train), b"sentence\tlabel\n\xff\xfe\t1\n").unwrap();
    i.fails(1, &[&format!("{}:2:", i.path(train).display()), "UTF-8"]);
    let i = new();
    fs::remove_file(i.path("data/dev.tsv")).unwrap();
    i.fails(1, &[i.path("data").to_str().unwrap(), "dev.tsv"]);
}

#[test]
fn wrong_settings_are_refused() {
    let new = || Inputs::of("finetune", &model());
    let i = new();
    i.replace("settings.toml", "epochs = 12", "epoch = 12");
    i.fails(1, &[&format!("{}:2:", i.path("settings.toml").display()), "epoch", "epochs"]);
    let i = new();
    i.replace("settings.toml", "epochs = 12", "epochs = -1");
    i.fails(1, &[&format!("{}:2:", i.path("settings.toml").display()), "-1"]);
    let i = new();
    i.replace("settings.toml", "epochs = 12", "epochs = [\n\"\"\"\n");
    i.fails(1, &[i.path("settings.toml").to_str().unwrap(), "TOML"]);
    let more = |words: &[&str]| {
        let mut i = new();
        i.args.extend(words.iter().map(|w| w.to_string()));
        i
    };
    more(&["--preset", "quik"]).fails(2, &["quik", "quick"]);
    more(&["--epochs", "many"]).fails(2, &["epochs", "many"]);
    more(&["--seed", "x"]).fails(2, &["seed", "x"]);
    more(&["--seed", "-1"]).fails(2, &["`seed` is -1", "whole number from 0"]);
    run(&["demo", "--seed", "-1", "--json"].map(String::from))
        .fails(2, &["`seed` is -1", "whole number from 0"]);
    let preset = ["--preset", "bert-base-glue"];
    more(&preset).fails(1, &["the preset `bert-base-glue` is for", "128", "32", "--data.max-length 32"]);
    more(&[&preset[..], &["--data.max-length", "64"]].concat())
        .fails(1, &["data.max_length is 64", "at most 32"]);
    let i = new();
    i.replace("settings.toml", "[train]", "[data]\nmax_length = 64\n[train]");
    i.fails(1, &["data.max_length is 64", "at most 32"]);
    more(&["--epoch", "1"]).fails(2, &["--epoch"]);
    more(&["--max-length", "4096"]).fails(2, &["--max-length"]);
    more(&["--data.max-length", "4096"]).fails(1, &["4096", "32"]);
    let mut i = new();
    let at = i.args.iter().position(|a| a == "sst2").unwrap();
    i.args[at] = "sst3".into();
    i.fails(2, &["sst3", "sst2"]);
    i.args[at] = "squad".into();
    i.fails(1, &[i.path("data").to_str().unwrap(), "train-v1.1.json"]);
    let i = more(&["--config", "/does/not/exist.toml"]);
    i.fails(2, &["--config"]);
    let i = new();
    fs::write(i.path("settings.toml"), b"# \xe9\n").unwrap();
    i.fails(1, &[&format!("{}:1:", i.path("settings.toml").display()), "UTF-8"]);
    fs::remove_file(i.path("settings.toml")).unwrap();
    fs::create_dir(i.path("settings.toml")).unwrap();
    i.fails(1, &[i.path("settings.toml").to_str().unwrap(), "give a file"]);
}

#[test]
fn a_byte_order_mark_changes_nothing() {
    let mut i = Inputs::of("finetune", &model());
    i.args.extend(["--max-steps", "1", "--checkpoint-every", "0"].map(String::from));
    fs::write(i.path("model/tokenizer_config.json"), "{}").unwrap();
    run(&i.args).ok();
    fs::rename(i.path("out"), i.path("plain")).unwrap();
    for name in [
        "model/config.json",
        "model/vocab.txt",
        "model/tokenizer_config.json",
        "data/dev.tsv",
        "settings.toml",
    ] {
        let text = fs::read_to_string(i.path(name)).unwrap();
        fs::write(i.path(name), format!("\u{feff}{text}")).unwrap();
    }
    run(&i.args).ok();
    for name in ["model.safetensors", "config.json", "gpusq.toml"] {
        assert!(
            fs::read(i.path("out").join(name)).unwrap() == fs::read(i.path("plain").join(name)).unwrap(),
            "{name}"
        );
    }
    let manifest = i.path("out/gpusq.json");
    fs::write(&manifest, format!("\u{feff}{}", fs::read_to_string(&manifest).unwrap())).unwrap();
    run(&["inspect".into(), i.path("out").to_str().unwrap().into(), "--json".into()]).ok();
}

#[test]
fn a_family_without_the_tasks_head_is_refused() {
    let i = Inputs::of("finetune", &model());
    let text = r#"{"model_type": "opt", "vocab_size": 41, "hidden_size": 8, "num_hidden_layers": 1, "ffn_dim": 8,
        "num_attention_heads": 2, "max_position_embeddings": 16}"#;
    let config = gpusq::arch::Config::parse(&i.path("model/config.json"), text).unwrap();
    gpusq::model::Model::random(config, 1).unwrap().save(&i.path("model"), None).unwrap();
    let config = i.path("model/config.json");
    i.fails(1, &[config.to_str().unwrap(), "family `opt`", "no head for classification", "bert, distilbert"]);
}

#[test]
fn flags_reach_a_setting_of_the_command_or_are_refused() {
    let pruned = compressed().join("pruned");
    for (command, from, flag, parts) in [
        // With or without the table's name: the value is what is wrong.
        ("quantize", &pruned, "--quantize.epochs", &["`quantize.epochs` is many"][..]),
        ("quantize", &pruned, "--epochs", &["`quantize.epochs` is many"]),
        ("finetune", &model(), "--train.learning-rate", &["`train.learning_rate` is many"]),
        ("prune", &dense(), "--prune.stop-loss", &["`prune.stop_loss` is many"]),
        ("prune", &dense(), "--distill.beta", &["`distill.beta` is many"]),
        // Wanda looks at as many examples.
        ("prune", &dense(), "--quantize.calibration-examples", &["`quantize.calibration_examples` is many"]),
        (
            "quantize",
            &pruned,
            "--prune.epochs",
            &["--prune.epochs has no effect", "`gpusq prune`, `gpusq compress`"],
        ),
        ("prune", &dense(), "--quantize.epochs", &["has no effect", "`gpusq quantize`, `gpusq compress`"]),
        (
            "compress",
            &dense(),
            "--train.epochs",
            &["has no effect on `gpusq compress`", "of `gpusq finetune`"],
        ),
        ("finetune", &model(), "--distill.beta", &["has no effect on `gpusq finetune`"]),
    ] {
        let mut i = Inputs::of(command, from);
        i.args.extend([flag, "many"].map(String::from));
        i.fails(2, parts);
    }
}

/// What is advised for an unknown flag is never what the command refuses next.
#[test]
fn an_unknown_flag_is_answered_with_settings_that_have_an_effect() {
    for (command, from, flag, advised, not) in [
        (
            "compress",
            &dense(),
            "--max-steps",
            &["'--prune.max-steps'", "'--quantize.max-steps'"][..],
            "--train",
        ),
        ("compress", &dense(), "--train.epoch", &["'--prune.epochs'", "'--quantize.epochs'"], "--train"),
        ("compress", &dense(), "--prune.epoch", &["'--prune.epochs'"], "--train"),
        ("finetune", &model(), "--epoch", &["'--epochs'"], "--prune"),
    ] {
        let mut i = Inputs::of(command, from);
        i.args.extend([flag, "3"].map(String::from));
        let done = run(&i.args);
        done.fails(2, &[&format!("'{flag}'")]);
        let tip = done.stderr.lines().find(|l| l.contains("similar")).unwrap_or(&done.stderr);
        assert!(advised.iter().all(|a| tip.contains(a)) && !tip.contains(not), "{tip}");
    }
}

#[test]
fn settings_that_exclude_each_other_are_refused_before_anything_is_written() {
    for command in ["compress", "prune"] {
        let mut i = Inputs::of(command, &dense());
        i.args.extend(["--prune.criterion", "wanda", "--prune.mask-update-every", "1"].map(String::from));
        i.fails(2, &["prune.mask_update_every", "`wanda`"]);
        let mut i = Inputs::of(command, &dense());
        for term in ["alpha", "beta", "gamma"] {
            i.args.extend([format!("--distill.{term}"), "0".into()]);
        }
        i.fails(2, &["distill.alpha, beta and gamma", "raise one"]);
        let mut i = Inputs::of(command, &dense());
        for setting in ["distill.attention-features", "prune.gradient-checkpointing"] {
            i.args.extend([format!("--{setting}"), "true".into()]);
        }
        i.fails(2, &["distill.attention_features", "prune.gradient_checkpointing"]);
    }
}

#[test]
fn commands_refuse_models_of_the_wrong_stage() {
    let all = compressed();
    let pruned = all.join("pruned");
    for (command, from, parts) in [
        ("quantize", dense(), ["is dense", "gpusq prune"]),
        ("prune", pruned.clone(), ["is 2:4", "dense model"]),
        ("compress", pruned.clone(), ["is 2:4", "dense model"]),
        ("finetune", pruned.clone(), ["is 2:4", "dense model"]),
        ("quantize", all.join("quantized"), ["is 2:4 INT8", "2:4 model"]),
        ("prune", all.join("packed"), ["is 2:4 INT8 (packed)", "dense model"]),
        ("prune", model(), ["no trained head", "gpusq finetune"]),
        ("compress", model(), ["no trained head", "gpusq finetune"]),
    ] {
        let i = Inputs::of(command, &from);
        i.fails(1, &[&[i.path("model").to_str().unwrap()], &parts[..]].concat());
    }
    // A head for another task.
    let mut i = Inputs::of("quantize", &pruned);
    let at = i.args.iter().position(|a| a == "sst2").unwrap();
    i.args[at] = "mnli".into();
    i.fails(1, &["trained on sst2", "no trained head for mnli"]);
    // With as many classes only the manifest tells.
    for (command, from) in [("prune", dense()), ("compress", dense()), ("quantize", pruned)] {
        let mut i = Inputs::of(command, &from);
        let at = i.args.iter().position(|a| a == "sst2").unwrap();
        i.args[at] = "cola".into();
        i.fails(1, &[i.path("model").to_str().unwrap(), "trained on sst2", "for cola", "gpusq finetune"]);
    }
    // What compress wrote is not itself a model.
    Inputs::of("prune", &all).fails(1, &["config.json", "packed"]);
}

#[test]
fn output_folders_in_use_are_refused() {
    let i = Inputs::of("finetune", &model());
    fs::create_dir(i.path("out")).unwrap();
    fs::write(i.path("out/letter.txt"), "dear").unwrap();
    i.fails(1, &[i.path("out").to_str().unwrap(), "not empty"]);
    let mut i = i;
    i.args.push("--resume".into());
    i.fails(1, &[i.path("out").to_str().unwrap(), "no run to resume"]);
    let i = Inputs::of("finetune", &model());
    fs::write(i.path("out"), "a file").unwrap();
    i.fails(1, &[i.path("out").to_str().unwrap(), "not a folder"]);
    #[cfg(unix)]
    {
        let i = Inputs::of("finetune", &model());
        std::os::unix::fs::symlink(i.path("gone"), i.path("out")).unwrap();
        run(&i.args).fails(1, &[i.path("out").to_str().unwrap(), "is a link to", "choose another --out"]);
    }
    let i = Inputs::of("finetune", &model());
    fs::create_dir(i.path("out")).unwrap();
    run(&i.args).ok();
}

#[test]
fn an_unfinished_run_is_not_a_model() {
    let dir = tempfile::tempdir().unwrap();
    for (command, from) in [("finetune", model()), ("compress", dense())] {
        let out = dir.path().join(command);
        killed(&train(command, &from, &out), &out, &[&|e| e["event"] == "saved"]);
        let i = Inputs::of("prune", &out);
        i.fails(1, &[i.path("model").to_str().unwrap(), "not finished", "--resume"]);
    }
    // Stopped between the weights and the manifest, which comes last, or copied without it.
    for (from, more) in [(dense(), "holds a run"), (compressed().join("packed"), "has no gpusq.json")] {
        let i = Inputs::of("prune", &from);
        fs::remove_file(i.path("model/gpusq.json")).unwrap();
        i.fails(1, &[i.path("model").to_str().unwrap(), "not finished", "--resume", more]);
    }
}

#[test]
fn eval_and_inspect_refuse_what_they_cannot_use() {
    let d = data();
    let folder = d.to_str().unwrap();
    let eval = |dir: &Path, more: &[&str]| {
        let args = ["eval", "--model", dir.to_str().unwrap(), "--data", folder, "--json"];
        run(&args.iter().chain(more).map(|s| s.to_string()).collect::<Vec<_>>())
    };
    eval(&dense(), &["--split", "test"]).fails(2, &["test", "train or dev"]);
    eval(&dense(), &["--task", "nope"]).fails(2, &["nope"]);
    eval(&dense(), &["--task", "mnli"]).fails(1, &["trained on sst2", "no trained head for mnli"]);
    eval(&dense(), &["--task", "cola"]).fails(1, &["trained on sst2", "no trained head for cola"]);
    eval(&dense(), &["--batch-size", "0"]).fails(2, &["--batch-size"]);
    eval(&dense(), &["--max-length", "1"]).fails(2, &["1 tokens"]);
    eval(&model(), &["--task", "sst2"])
        .fails(1, &[model().to_str().unwrap(), "no trained head", "gpusq finetune"]);
    eval(&model(), &[]).fails(2, &["--task"]);
    eval(&compressed(), &[]).fails(1, &["packed"]);

    let dir = tempfile::tempdir().unwrap();
    let packed = dir.path().join("packed");
    copy(&compressed().join("packed"), &packed);
    let file = packed.join("model.gpusq.safetensors");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    eval(&packed, &[]).fails(1, &[file.to_str().unwrap()]);
    fs::write(&file, &whole).unwrap();
    let manifest = packed.join("gpusq.json");
    let text = fs::read_to_string(&manifest).unwrap();
    for (from, to, part) in [
        ("packed-int8", "packed-int9", "packed-int9"),
        ("\"format_version\": 1", "\"format_version\": 9", "format_version 9"),
        ("\"attention\": null", "\"attention\": \"x\"", "attention"),
        ("{", "[", "gpusq.json"),
    ] {
        assert!(text.contains(from), "{text}");
        fs::write(&manifest, text.replacen(from, to, 1)).unwrap();
        eval(&packed, &[]).fails(1, &[manifest.to_str().unwrap(), part]);
    }
    // A dense checkpoint under a manifest that calls it pruned.
    let wrong = dir.path().join("wrong");
    copy(&dense(), &wrong);
    let text = fs::read_to_string(wrong.join("gpusq.json")).unwrap();
    fs::write(wrong.join("gpusq.json"), text.replace("\"dense\"", "\"pruned\"")).unwrap();
    eval(&wrong, &[]).fails(1, &["is not 2:4", "row"]);
    let inspect = ["inspect", wrong.to_str().unwrap(), "--json"].map(String::from);
    run(&inspect).fails(1, &["is not 2:4"]);
}

#[cfg(unix)]
#[test]
fn arguments_that_are_no_text_are_refused() {
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"b\xffd");
    for words in
        [&["inspect"][..], &["eval", "--data", "x", "--model"], &["demo", "--seed"], &["demo", "--"], &[]]
    {
        let words: Vec<String> = words.iter().map(|w| w.to_string()).collect();
        let done = finish(program(&words).arg(odd));
        assert_eq!((done.code, done.stdout.as_str()), (Some(2), ""), "{words:?}: {}", done.stderr);
        assert!(done.stderr.starts_with("error: ") && !done.stderr.contains("panicked"), "{}", done.stderr);
        // Before the odd one, which may end what is read as flags.
        let json = [&words[..words.len().min(1)], &["--json".into()], &words[words.len().min(1)..]].concat();
        finish(program(&json).arg(odd)).fails(2, &[]);
    }
}

#[test]
fn output_that_is_lost_is_an_error() {
    let full = || std::fs::File::options().write(true).open("/dev/full");
    if full().is_err() {
        eprintln!("skipped: there is no /dev/full");
        return;
    }
    let (dir, data) = (dense(), data());
    let (dir, data) = (dir.to_str().unwrap(), data.to_str().unwrap());
    for args in [
        &["eval", "--model", dir, "--data", data][..],
        &["inspect", dir, "--json"],
        &["--help"],
        &["--version"],
        &["eval", "--help"],
    ] {
        let command = || program(&args.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        let done = finish(command().stdout(full().unwrap()));
        assert_eq!(done.code, Some(1), "{args:?}: {}", done.stderr);
        assert!(done.stderr.starts_with("error: standard output: "), "{}", done.stderr);
        // Whoever closes the pipe has read enough.
        let mut child = command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let done = child.wait_with_output().unwrap();
        assert_eq!((done.status.code(), done.stderr), (Some(0), Vec::new()), "{args:?}");
    }
}

#[test]
fn help_says_what_its_command_takes() {
    let help = |command: &str| run(&[command.into(), "--help".into()]).stdout;
    assert!(!help("demo").contains("resume"), "{}", help("demo"));
    for command in ["finetune", "eval"] {
        for part in ["Tasks:", "mnli", "squad", "--data.max-length"] {
            assert!(help(command).contains(part), "{command}, {part}: {}", help(command));
        }
    }
}

#[test]
fn the_command_line_explains_itself() {
    for (args, code) in [(&["--help"][..], 0), (&["compress", "--help"], 0), (&[], 2), (&["compact"], 2)] {
        let done = finish(&mut program(&args.iter().map(|s| s.to_string()).collect::<Vec<_>>()));
        assert_eq!(done.code, Some(code), "{args:?}: {}", done.stderr);
    }
}

#[test]
fn a_device_that_is_not_there_is_refused_and_not_replaced() {
    let inputs = Inputs::of("finetune", &model());
    let with = |device: &str| {
        let mut args = inputs.args.clone();
        args.extend(["--device".into(), device.into()]);
        run(&args)
    };
    let done = with("gpu");
    let known = done.stderr.contains("unknown device `gpu`; use auto, cpu, cuda or cuda:N");
    assert!(done.code == Some(2) && known, "{}", done.stderr);
    // No machine has this many.
    let done = with("cuda:63");
    let named = ["libcuda.so", "NVRTC", "GPU 63"].iter().any(|part| done.stderr.contains(part));
    assert!(done.code == Some(1) && named, "{}", done.stderr);
    assert!(!inputs.path("out").exists());
}
