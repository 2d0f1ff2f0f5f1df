//! Times one knowledge-distillation step on random weights and tokens: teacher and student forward, span loss + KL +
//! features, backward, clipping, AdamW.
//!
//! `train_step SIZE BATCH LENGTH DEVICE PRECISION dense|gpusq [STEPS [recompute|pipeline]]`, with SIZE tiny, mini, base or
//! large. `gpusq` is the second stage of compression: 2:4 weights, fake quantisation, 2:4 attention. One line: median step, peak memory; and one
//! with the time of every step.
//!
//! As one of several processes (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) it trains with the others, BATCH on
//! each, with DEVICE cuda on the GPU of its LOCAL_RANK; the losses are those of one process with all their batches. With
//! `pipeline` each has a part of the model, BATCH is that of all, and MICRO_BATCH sequences are computed at a time. With
//! TEACHER_CACHE, a folder, every step but the first reads the teacher's outputs there: all have the same tokens.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use gpusq::arch::Config;
use gpusq::compress::{calibration, prune_weights};
use gpusq::config;
use gpusq::distill::{Mix, Targets};
use gpusq::forward::{Compute, Inputs, Tokens};
use gpusq::model::Model;
use gpusq::quant::calibrate;
use gpusq::sparsity::Pattern;
use gpusq::tensor::{Device, Group, GroupError, Patience, Seat};
use gpusq::train::batch::Batch;
use gpusq::train::{Recipe, Stepper};

/// Layers, width, heads, inner width.
const SIZES: [(&str, [usize; 4]); 4] = [
    ("tiny", [2, 128, 2, 512]),
    ("mini", [6, 384, 12, 1536]),
    ("base", [12, 768, 12, 3072]),
    ("large", [24, 1024, 16, 4096]),
];

/// Joins the processes that were started with this one, if there are some.
fn join() -> Option<Group> {
    let var = |name: &str| std::env::var(name).ok();
    let number = |name: &str| var(name)?.parse::<usize>().ok();
    let last_resort = |e: &GroupError| {
        eprintln!("{e}");
        std::process::exit(1);
    };
    let seat = Seat {
        rank: number("RANK")?,
        size: number("WORLD_SIZE")?,
        address: var("MASTER_ADDR")?,
        port: number("MASTER_PORT")? as u16,
        patience: Patience::default(),
        last_resort,
    };
    Some(Group::join(seat).unwrap())
}

fn main() {
    let start = Instant::now();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let usage = "train_step tiny|mini|base|large BATCH LENGTH DEVICE f32|bf16 dense|gpusq [STEPS [recompute|pipeline]]";
    let [size, batch, length, device, precision, what, rest @ ..] = &words[..] else {
        panic!("usage: {usage}")
    };
    let (_, [layers, hidden, heads, inner]) = *SIZES.iter().find(|s| s.0 == size).expect(usage);
    let (batch, length): (usize, usize) = (batch.parse().expect(usage), length.parse().expect(usage));
    let steps: usize = rest.first().map_or(30, |n| n.parse().expect(usage));
    let joined = join();
    let group = joined.as_ref().unwrap_or(Group::alone());
    let device = match std::env::var("LOCAL_RANK") {
        Ok(local) if device == "cuda" && group.size() > 1 => format!("cuda:{local}"),
        _ => device.clone(),
    };
    let (device, _) = Device::named(&device).unwrap();
    group.compute_on(device).unwrap();
    let pipeline = rest.get(1).is_some_and(|word| word == "pipeline");
    let all = if pipeline { batch } else { batch * group.size() };
    let micro = std::env::var("MICRO_BATCH").ok().and_then(|n| n.parse().ok());
    let micro = micro.unwrap_or(if pipeline { batch.div_ceil(2 * group.size()) } else { batch });
    let mut settings = config::Config::default();
    settings.set("precision", precision).unwrap();
    let compute = Compute::new(device, settings.precision).unwrap();
    // Seconds since the start at which what comes before the first step is done.
    let mut done = vec![("device", start.elapsed())];
    let config = format!(
        r#"{{"model_type":"bert","architectures":["BertForQuestionAnswering"],"vocab_size":30522,
        "hidden_size":{hidden},"num_hidden_layers":{layers},"num_attention_heads":{heads},
        "intermediate_size":{inner},"max_position_embeddings":512,"hidden_dropout_prob":0.0,
        "attention_probs_dropout_prob":0.0}}"#
    );
    let config = Config::parse(Path::new("config.json"), &config).unwrap();
    let mut teacher = Model::random(config.clone(), 1).unwrap();
    let mut student = Model::random(config, 2).unwrap();
    done.push(("models", start.elapsed()));

    let ids = (0..all * length).map(|i| (i as u32).wrapping_mul(2_654_435_761) % 30_522).collect();
    let tokens = Tokens { batch: all, length, ids, types: vec![0; all * length], mask: None };
    let targets = Targets::Spans { start: vec![5; all], end: vec![9; all] };
    let whole = Batch { inputs: Inputs { tokens, target: None }, targets };
    let (rank, size_of_group) = if pipeline { (0, 1) } else { (group.rank(), group.size()) };
    let parts = whole.parts(rank, size_of_group, micro, true);
    if what == "gpusq" {
        settings.prune.attention = Some(Pattern::TWO_FOUR);
        for m in [&mut teacher, &mut student] {
            prune_weights(m, &settings.prune, &[], compute).unwrap();
        }
        done.push(("pruned", start.elapsed()));
        let few = Tokens {
            batch: 1,
            length,
            ids: parts[0].batch.inputs.tokens.ids[..length].to_vec(),
            types: vec![],
            mask: None,
        };
        let few = Inputs { tokens: few, target: None };
        calibrate(&mut student, &[few], &calibration(&settings.quantize), compute).unwrap();
        done.push(("calibrated", start.elapsed()));
    }
    let gradient_checkpointing = rest.get(1).is_some_and(|word| word == "recompute");
    let optimizer = config::Fit { learning_rate: 1e-5, gradient_checkpointing, ..config::Fit::default() };
    let cache = std::env::var("TEACHER_CACHE").ok();
    let how = Recipe {
        optimizer: &optimizer,
        mix: Mix { alpha: 1.0, beta: 10.0, gamma: 1.0, temperature: 2.0, attention_features: false },
        teacher: Some(&teacher),
        scale_learning_rate: 1e-3,
        mask_update_every: 0,
        stop_loss: None,
        seed: 1,
        checkpoint: None,
        teacher_cache: cache.as_deref().map(Path::new),
        pipeline_parallel_size: if pipeline { group.size() } else { 1 },
        pad: 0,
        compute,
        group,
    };
    let stepper = Stepper::new(&student, &how).unwrap();
    student.params = stepper.own(&student.params).to(device);
    done.push(("ready", start.elapsed()));
    let mut moments = BTreeMap::new();
    let mut times = Vec::new();
    let (mut first, mut last, mut to_first) = (f32::NAN, f32::NAN, 0.0);
    let mut peak = 0.0;
    // Memory that nobody has, before the third step makes its graphs and after it.
    let mut free = Vec::new();
    for n in 0..steps + 5 {
        let from = Instant::now();
        let terms = stepper.step(&mut student, &mut moments, &parts, n, 1e-5).unwrap();
        if n == 0 {
            (first, to_first) = (terms.total, start.elapsed().as_secs_f64());
        }
        last = terms.total;
        times.push(from.elapsed().as_secs_f64() * 1e3);
        if let Device::Cuda(gpu) = device {
            if n == 1 || n == 2 {
                free.push(gpu.free_memory());
            }
            peak = gpu.peak_memory() as f64 / (1u64 << 30) as f64;
        }
    }
    if !group.is_first() {
        println!("RANK {} peak={peak:.2}GiB", group.rank());
        return;
    }
    let graphs = free.windows(2).map(|f| f[0] as f64 - f[1] as f64).sum::<f64>() / (1 << 20) as f64;
    let each: Vec<String> = times.iter().map(|ms| format!("{ms:.1}")).collect();
    // The first steps allocate and choose algorithms.
    let mut times = times.split_off(5);
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!(
        "RESULT gpusq size={size} processes={}{} bs={batch} micro={micro} seq={length} on={compute} what={what} step_ms={median:.2} min={:.2} max={:.2} \
         steps={} replayed={} loss={first:.6}->{last:.6} peak={peak:.2}GiB graphs={graphs:.1}MiB first_step_s={to_first:.2} \
         tokens_per_s={:.0} done_s={}",
        group.size(),
        if pipeline { " (pipeline)" } else { "" },
        times[0],
        times[times.len() - 1],
        times.len(),
        stepper.replayed(),
        (all * length) as f64 / median * 1e3,
        done.iter().map(|(what, at)| format!("{what}:{:.2}", at.as_secs_f64())).collect::<Vec<_>>().join(",")
    );
    println!("STEPS {}", each.join(" "));
}
