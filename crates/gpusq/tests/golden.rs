//! Every family against checkpoints and outputs made by the transformers library on tiny random weights:
//! logits, hidden states, loss and every gradient.
//!
//! Cases are folders with config.json, model.safetensors and golden.safetensors (in.*, label.*, out.*,
//! grad.*) in `GPUSQ_GOLDEN_DIR`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use gpusq::distill::{Targets, hard_loss};
use gpusq::format::safetensors::Checkpoint;
use gpusq::forward::{Bound, Compute, Inputs, Output, TapSet, Tokens, forward};
use gpusq::model::Model;
use gpusq::spec::Head;
use gpusq::tensor::ops::masked::MaskGradient;
use gpusq::tensor::{Device, Tape, Tensor};

fn cases() -> Vec<PathBuf> {
    let root = std::env::var_os("GPUSQ_GOLDEN_DIR").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/golden")),
        PathBuf::from,
    );
    let Ok(entries) = std::fs::read_dir(&root) else {
        println!("skipped: no {}; set GPUSQ_GOLDEN_DIR", root.display());
        return Vec::new();
    };
    let mut dirs: Vec<PathBuf> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.join("golden.safetensors").exists()).collect();
    dirs.sort();
    assert!(!dirs.is_empty(), "{} holds no case", root.display());
    dirs
}

fn ints(g: &Checkpoint, name: &str) -> Option<(Vec<i32>, Vec<usize>)> {
    g.info(name)?;
    let t = g.tensor(name).unwrap();
    Some((t.i32().to_vec(), t.shape().to_vec()))
}

fn tokens(g: &Checkpoint, ids: &str, mask: &str) -> Option<Tokens> {
    let (values, shape) = ints(g, ids)?;
    let mask: Option<Vec<bool>> = ints(g, mask).map(|(m, _)| m.iter().map(|&v| v != 0).collect());
    let types = ints(g, "in.token_type_ids").filter(|(_, s)| *s == shape).map(|(t, _)| t);
    let unsigned = |v: Vec<i32>| v.into_iter().map(|x| x as u32).collect();
    Some(Tokens {
        batch: shape[0],
        length: shape[1],
        ids: unsigned(values),
        types: types.map_or(Vec::new(), unsigned),
        mask: mask.filter(|m| m.contains(&false)),
    })
}

fn close(case: &str, what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{case}: {what} has another length");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance, "{case}: {what}[{i}] is {g}, golden {w}");
    }
}

/// Compares hidden states at unpadded positions (what a padded position holds is nobody's business).
fn hidden(
    case: &str,
    g: &Checkpoint,
    prefix: &str,
    stack: &str,
    layers: usize,
    out: &Output,
    mask: Option<&[bool]>,
) {
    for i in 0..=layers {
        let name = format!("{prefix}.{i}");
        if g.info(&name).is_none() {
            continue;
        }
        let tap = match i {
            0 => format!("{stack}.embed"),
            _ if i == layers => format!("{stack}.last"),
            _ => format!("{stack}.{}", i - 1),
        };
        let (want, got) = (g.tensor(&name).unwrap(), out.taps[&tap].value().to(Device::Cpu));
        let keep = |t: &Tensor| -> Vec<f32> {
            t.f32()
                .chunks(t.width())
                .enumerate()
                .filter(|(r, _)| mask.is_none_or(|m| m[*r]))
                .flat_map(|(_, row)| row.to_vec())
                .collect()
        };
        close(case, &name, &keep(&got), &keep(&want), 1e-4);
    }
}

fn run(dir: &Path, device: Device) {
    let case = format!("{} on {device}", dir.file_name().unwrap().to_string_lossy());
    let model = Model::load(dir).unwrap();
    assert!(model.fresh.is_empty(), "{case}: {:?} not in the checkpoint", model.fresh);
    assert!(model.unused.is_empty(), "{case}: {:?} not used", model.unused);
    let g = Checkpoint::open_file(dir.join("golden.safetensors")).unwrap();
    let inputs = Inputs {
        tokens: tokens(&g, "in.input_ids", "in.attention_mask").unwrap(),
        target: tokens(&g, "in.decoder_input_ids", "in.decoder_attention_mask"),
    };
    let compute = Compute { device, ..Compute::CPU };
    let tape = Tape::recording();
    let bound = Bound::new(&tape, &model.params, MaskGradient::Kept, compute);
    let want = TapSet { blocks: true, ..TapSet::default() };
    let out = forward(&tape, &model.spec, &bound, None, &inputs, want);

    let read = inputs.target.as_ref().unwrap_or(&inputs.tokens);
    let mask = read.mask.as_deref();
    for (stack, s) in model.spec.stacks() {
        let prefix = if stack == "encoder" && model.spec.decoder.is_some() {
            "out.encoder_hidden"
        } else {
            "out.hidden"
        };
        let mask = if stack == "encoder" { inputs.tokens.mask.as_deref() } else { mask };
        hidden(&case, &g, prefix, stack, s.layers, &out, mask);
    }
    let logits = out.logits.value().to(Device::Cpu);
    match &model.spec.head {
        Head::Span => {
            for (i, name) in ["out.start_logits", "out.end_logits"].into_iter().enumerate() {
                let got: Vec<f32> = logits.f32().iter().skip(i).step_by(2).copied().collect();
                close(&case, name, &got, g.tensor(name).unwrap().f32(), 1e-4);
            }
        }
        Head::LanguageModel { .. } => {
            let want = g.tensor("out.logits").unwrap();
            for (r, (got, want)) in
                logits.f32().chunks(logits.width()).zip(want.f32().chunks(logits.width())).enumerate()
            {
                if mask.is_none_or(|m| m[r]) {
                    close(&case, "out.logits", got, want, 1e-4);
                }
            }
        }
        _ => close(&case, "out.logits", logits.f32(), g.tensor("out.logits").unwrap().f32(), 1e-4),
    }

    let targets = match &model.spec.head {
        Head::Span => Targets::Spans {
            start: ints(&g, "label.start_positions").unwrap().0,
            end: ints(&g, "label.end_positions").unwrap().0,
        },
        Head::LanguageModel { .. } => {
            let (mut labels, shape) = ints(&g, "label.labels").unwrap();
            if model.spec.encoder.is_none() {
                // Position i predicts token i + 1.
                for row in labels.chunks_mut(shape[1]) {
                    row.rotate_left(1);
                    *row.last_mut().unwrap() = -100;
                }
            }
            Targets::Tokens(labels)
        }
        _ => Targets::Classes(ints(&g, "label.labels").unwrap().0),
    };
    // The library these cases come from lets padded positions of a span compete; training here does not.
    let unmasked = Tokens { mask: None, ..read.clone() };
    let loss = hard_loss(&tape, &out.logits, &targets, &unmasked);
    close(&case, "out.loss", &[loss.value().item()], g.tensor("out.loss").unwrap().f32(), 1e-5);

    let mut grads = tape.backward(&loss);
    let ours = bound.gradients(&mut grads, "");
    let theirs = model.to_checkpoint(&|name| ours.get(name).map(|(g, _)| g.to(Device::Cpu)));
    let mut compared = BTreeSet::new();
    for name in g.names().filter_map(|n| n.strip_prefix("grad.")) {
        let want = g.tensor(&format!("grad.{name}")).unwrap();
        // Norms of a bare body are absent where a checkpoint ties names; every golden gradient must be found.
        let got = theirs.get(name).unwrap_or_else(|| panic!("{case}: no gradient for {name}"));
        let largest = want.f32().iter().fold(0.0f32, |m, v| m.max(v.abs()));
        // An exactly constant direction (key biases) has a gradient of rounding noise only.
        close(&case, &format!("grad.{name}"), got.f32(), want.f32(), (1e-3 * largest).max(1e-7));
        compared.insert(name.to_string());
    }
    let constants = ["final_logits_bias"];
    for (name, _) in model.to_checkpoint(&|n| Some(model.params.dense(n).clone())) {
        assert!(
            compared.contains(&name) || constants.contains(&name.as_str()),
            "{case}: {name} has no golden gradient"
        );
    }
    println!("{case}: {} gradients agree", compared.len());
}

#[test]
fn golden_forward_and_gradients() {
    let (cases, devices) = (cases(), Device::all());
    let missing = devices.len() == 1 && std::env::var_os("GPUSQ_NEED_GPU").is_some();
    assert!(!missing, "GPUSQ_NEED_GPU is set: {:?}", Device::named("cuda").err());
    for dir in &cases {
        for &device in &devices {
            run(dir, device);
            device.check().unwrap();
        }
    }
    println!("{} golden cases", cases.len());
}
