//! `gpusq inspect`: what a checkpoint is, what would be compressed, sizes, integrity.

use std::path::Path;

use clap::ArgMatches;
use gpusq::engine::Engine;
use gpusq::format::packed::sizes;
use gpusq::inputs::{Inputs, Tokens};
use gpusq::model::{Model, Stage, compressible};
use gpusq::report::{bytes, grouped};
use gpusq::spec::Head;
use gpusq::task::Tokenizer;
use gpusq::tensor::Device;
use gpusq::{Error, Result};
use serde_json::json;

use crate::args;
use crate::progress::out;

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    let dir = args::model_dir(m)?;
    // Loading checks every tensor's presence, shape, range and 2:4 pattern.
    let model = Model::load(&dir)?;
    if m.get_flag("plan") {
        return plan(m, &model, &dir);
    }
    let spec = &model.spec;
    let s = spec.last_stack();
    let family = model.config.json["model_type"].as_str().unwrap_or("?").to_string();
    let parameters: usize = spec.weights().iter().map(|(_, s)| s.iter().product::<usize>()).sum();
    let linears = spec.linears();
    let dense: Vec<(String, String)> =
        linears.iter().filter_map(|l| Some((l.name.clone(), compressible(l)?))).collect();
    let elements: usize = linears.iter().filter(|l| compressible(l).is_none()).map(|l| l.rows * l.cols).sum();
    let tokenizer = Tokenizer::load(&dir).map(|t| t.vocab_size());
    let packed = model.stage.packed().then(|| sizes(&model.params));
    let head = match &spec.head {
        Head::None => "none".to_string(),
        Head::Classify { outputs: 1, .. } => "regression".into(),
        Head::Classify { outputs, .. } => format!("classification, {outputs} classes"),
        Head::Span => "question answering (spans)".into(),
        Head::LanguageModel { .. } => "language modelling".into(),
    };
    let problem = tokenizer.as_ref().ok().filter(|n| **n > spec.vocab).map(|n| {
        let message = format!(
            "the tokenizer has {n} entries and the model's vocabulary {}; use the tokenizer the model was trained with",
            spec.vocab
        );
        Error::file(&dir, message)
    });
    let verdict = problem.map_or(Ok(()), Err);
    if m.get_flag("json") {
        let sizes = packed.map(|p| {
            json!({ "packed_bits": p.packed_bits, "dense_fp16_bits": p.dense_fp16_bits, "scale_bits": p.scale_bits, "rest_bits": p.rest_bits })
        });
        let object = json!({ "event": "inspect", "model": dir.display().to_string(), "family": family, "stage": model.stage, "task": model.task, "trained_max_length": model.max_length,
            "attention": model.attention.map(|p| p.to_string()), "head": head, "layers": s.layers, "hidden": s.hidden, "heads": s.heads,
            "vocabulary": spec.vocab, "max_length": spec.max_length(), "parameters": parameters, "compressible_linears": linears.len() - dense.len(),
            "compressible_parameters": elements, "left_dense": dense, "untrained": model.fresh, "unused": model.unused,
            "tokenizer_entries": tokenizer.as_ref().ok(), "sizes": sizes });
        out(format_args!("{object}"));
        return verdict;
    }
    out(format_args!("{}: {family}, {}", dir.display(), model.stage.title()));
    out(format_args!(
        "  {} layers, width {}, {} heads, vocabulary {}, up to {} tokens",
        s.layers,
        s.hidden,
        s.heads,
        grouped(spec.vocab as u64),
        grouped(spec.max_length() as u64)
    ));
    out(format_args!(
        "  head: {head}{}",
        model.task.as_ref().map_or(String::new(), |t| {
            let length = model.max_length.map_or(String::new(), |n| format!(" at up to {n} tokens"));
            format!(", trained on {t}{length}")
        })
    ));
    if let Some(p) = model.attention {
        out(format_args!("  attention keeps {p}"));
    }
    out(format_args!(
        "  {} parameters, {} of them in {} linear maps that compression covers",
        grouped(parameters as u64),
        grouped(elements as u64),
        linears.len() - dense.len()
    ));
    match packed {
        Some(p) => {
            out(format_args!(
                "  compressed weights: {} ({:.4} of FP16), scales {}, the rest {}",
                bytes(p.packed_bits / 8),
                p.packed_bits as f64 / p.dense_fp16_bits as f64,
                bytes(p.scale_bits / 8),
                bytes(p.rest_bits / 8)
            ));
        }
        None if model.stage == Stage::Dense => {
            let fp16 = elements as u64 * 2;
            out(format_args!(
                "  those weights: {} in FP16, {} as 2:4 FP16, {} as 2:4 INT8",
                bytes(fp16),
                bytes(fp16 * 9 / 16),
                bytes(fp16 * 5 / 16)
            ));
        }
        None => {}
    }
    for (name, reason) in &dense {
        out(format_args!("  stays dense: {name} ({reason})"));
    }
    if !model.fresh.is_empty() {
        out(format_args!("  not in the checkpoint, to be trained: {}", model.fresh.join(", ")));
    }
    if !model.unused.is_empty() {
        out(format_args!("  in the checkpoint but not used: {}", model.unused.join(", ")));
    }
    match tokenizer {
        Ok(n) => out(format_args!("  tokenizer: {} entries", grouped(n as u64))),
        Err(e) => out(format_args!("  no usable tokenizer: {e}")),
    }
    out(format_args!(
        "  {}of the right shape and finite{}",
        if model.fresh.is_empty() { "every tensor present, " } else { "every tensor that is there " },
        if model.stage == Stage::Dense { "" } else { ", 2:4" }
    ));
    verdict
}

/// Which kernels run the model on this GPU, and what others would take.
fn plan(m: &ArgMatches, model: &Model, dir: &Path) -> Result<()> {
    args::need_packed(model, dir, "inspect --plan")?;
    let (device, why) = args::device_of(m)?;
    if device == Device::Cpu {
        let why = why.map_or(String::new(), |why| format!(", and {why}"));
        return Err(Error::Config(format!(
            "--plan is about GPUs (a CPU chooses its kernel without measuring){why}"
        )));
    }
    let engine = Engine::load(model, device)?;
    let limit = model.spec.max_length();
    for &length in &args::numbers(m, "length")? {
        if length > limit {
            return Err(Error::Mismatch(format!(
                "--length {length}: the model takes {limit} tokens; use at most {limit}"
            )));
        }
        for &batch in &args::numbers(m, "batch")? {
            let ids = (0..batch * length).map(|i| (i * 7919 % model.spec.vocab) as u32).collect();
            let tokens = Tokens { batch, length, ids, types: Vec::new(), mask: None };
            let plan = engine.plan(&Inputs { tokens, target: None })?.expect("a GPU has plans");
            if m.get_flag("json") {
                out(
                    json!({ "event": "plan", "batch": batch, "length": length, "device": device.to_string(), "plan": plan }),
                );
                continue;
            }
            out(format_args!("{batch} x {length} tokens on {device}"));
            for row in plan {
                let time = |sparse| {
                    row.best(sparse)
                        .map_or("none".into(), |t| format!("{:.1} us ({})", t.microseconds, t.kernel))
                };
                out(format_args!(
                    "  {:?}{}{} [{}, {}] of {} tokens, {} maps: {}; 2:4 {}, dense {}",
                    row.place,
                    if row.norm { " and norm" } else { "" },
                    if row.first { " (first tokens)" } else { "" },
                    row.shape[0],
                    row.shape[1],
                    row.tokens,
                    row.maps,
                    if row.sparse { "2:4" } else { "dense" },
                    time(true),
                    time(false)
                ));
                if let Some(why) = row.why_dense() {
                    out(format_args!("    not 2:4: {why}"));
                }
            }
        }
    }
    Ok(())
}
