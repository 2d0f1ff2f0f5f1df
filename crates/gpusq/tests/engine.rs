//! The engine against the fake-quantised forward, bit for bit: INT8 codes, 32-bit sums and logits.

use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use gpusq::Error;
use gpusq::arch::{self, Config};
use gpusq::config::Method;
use gpusq::engine::{Engine, Place, Products};
use gpusq::format::packed::{round_dense, unpack_codes};
use gpusq::forward::{Bound, Compute, Inputs, Output, TapSet, Tokens, forward};
use gpusq::model::{Model, Stage, compressible};
use gpusq::params::{Params, Weight};
use gpusq::quant::{Calibration, calibrate};
use gpusq::sparsity::{Pattern, mask_rows};
use gpusq::spec::*;
use gpusq::task::HeadKind;
use gpusq::tensor::cuda::{Arena, CudaError, Gpu};
use gpusq::tensor::ops::activation::Activation;
use gpusq::tensor::ops::lsq::code;
use gpusq::tensor::ops::masked::MaskGradient;
use gpusq::tensor::{Device, Tape, Tensor, normal};
use proptest::prelude::*;

const BERT: &str = r#"{"model_type": "bert", "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 20, "type_vocab_size": 2,
    "pad_token_id": 0}"#;
const DISTILBERT: &str = r#"{"model_type": "distilbert", "vocab_size": 50, "dim": 16, "n_layers": 3,
    "n_heads": 2, "hidden_dim": 36, "max_position_embeddings": 20, "activation": "relu", "pad_token_id": 0}"#;
const ROBERTA: &str = r#"{"model_type": "roberta", "vocab_size": 50, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 52, "max_position_embeddings": 22,
    "type_vocab_size": 1, "hidden_act": "gelu_new", "pad_token_id": 1}"#;
/// Maps from its 30 hidden features cannot be 2:4 and stay dense; `ffn.out` can.
const ODD_BERT: &str = r#"{"model_type": "bert", "vocab_size": 50, "hidden_size": 30, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 44, "max_position_embeddings": 20, "pad_token_id": 0}"#;

/// Repeatable numbers below `limit`.
fn draws(n: usize, limit: u32, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let draw = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) % u64::from(limit)) as u32
    };
    std::iter::repeat_with(draw).take(n).collect()
}

/// A batch whose sequence `b` has `3 * b` tokens of padding, as far as there is room.
fn inputs(batch: usize, length: usize, vocab: usize, types: usize, padded: bool, seed: u64) -> Inputs {
    let n = batch * length;
    let mut ids = draws(n, vocab as u32 - 2, seed);
    ids.iter_mut().for_each(|id| *id += 2);
    let mask = |i: usize| i % length < length - (3 * (i / length)).min(length - 1);
    Inputs {
        tokens: Tokens {
            batch,
            length,
            ids,
            types: if types > 1 { draws(n, types as u32, !seed) } else { Vec::new() },
            mask: padded.then(|| (0..n).map(mask).collect()),
        },
        target: None,
    }
}

fn random_params(spec: &TransformerSpec, seed: u64) -> Params {
    let mut params = Params::new();
    for (i, (name, shape)) in spec.weights().into_iter().enumerate() {
        let seed = seed.wrapping_mul(1000).wrapping_add(i as u64);
        let deviation = if shape.len() == 2 { (shape[1] as f32).powf(-0.5) } else { 0.1 };
        let mut t = normal(&shape, deviation, seed);
        if name.contains("norm.weight") {
            t.f32_mut().iter_mut().for_each(|x| *x += 1.0);
        }
        params.insert(name, Weight::Dense(t));
    }
    params
}

fn with_spec(spec: TransformerSpec, config: Config, seed: u64) -> Model {
    Model {
        params: random_params(&spec, seed),
        spec,
        config,
        stage: Stage::Dense,
        attention: None,
        task: None,
        max_length: None,
        fresh: Vec::new(),
        unused: Vec::new(),
    }
}

fn dense(config: &str, head: Option<HeadKind>, seed: u64) -> Model {
    let config = Config::parse(Path::new("config.json"), config).unwrap();
    let spec = (arch::find(&config).unwrap().spec)(&config).unwrap();
    let mut model = with_spec(spec, config, seed);
    if let Some(head) = head {
        model.set_head(head, seed).unwrap();
        let shapes: Vec<_> = model.spec.weights();
        for (name, shape) in shapes.into_iter().filter(|(n, _)| n.starts_with("head.")) {
            model.params.insert(name, Weight::Dense(normal(&shape, 0.3, seed)));
        }
    }
    model
}

/// Prunes by magnitude.
fn prune(model: &mut Model) {
    for linear in model.spec.linears().iter().filter(|l| compressible(l).is_none()) {
        let name = format!("{}.weight", linear.name);
        let Some(Weight::Dense(value)) = model.params.remove(&name) else { panic!("{name}") };
        let mut mask = vec![0; value.len()];
        mask_rows(value.f32(), value.width(), Pattern::TWO_FOUR, &mut mask);
        let mask = Tensor::from_u8(mask, value.shape());
        model.params.insert(name, Weight::Masked { value, mask });
    }
    model.stage = Stage::Pruned;
}

/// Quantises by calibration on `samples`, and rounds the dense weights as the packed file does.
fn quantise(model: &mut Model, samples: &[Inputs], outputs: bool) {
    let outputs = match outputs {
        true => vec![
            Role::Query,
            Role::Key,
            Role::Value,
            Role::AttentionOut,
            Role::FeedForwardIn,
            Role::FeedForwardOut,
            Role::Head,
        ],
        false => Vec::new(),
    };
    // Clipping must be met as well as rounding.
    let how =
        Calibration { weights: Method::Mse, activations: Method::Percentile, percentile: 99.0, outputs };
    calibrate(model, samples, &how, Compute::CPU).unwrap();
    round_dense(&mut model.params).unwrap();
}

fn fake(model: &Model, inputs: &Inputs, want: TapSet) -> Output {
    let tape = Tape::inference();
    let bound = Bound::new(&tape, &model.params, MaskGradient::Kept, Compute::CPU);
    forward(&tape, &model.spec, &bound, model.attention, inputs, want)
}

fn logits(model: &Model, inputs: &Inputs) -> Tensor {
    fake(model, inputs, TapSet::default()).logits.value().clone()
}

#[track_caller]
fn same_bits(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    assert!(want.f32().iter().all(|x| x.is_finite()), "{what}: the reference is not finite");
    for (i, (g, w)) in got.f32().iter().zip(want.f32()).enumerate() {
        assert_eq!(g.to_bits(), w.to_bits(), "{what}[{i}]: {g}, forward {w}");
    }
}

fn engine(model: &Model) -> Engine {
    Engine::load(&model.packed().unwrap(), Device::Cpu).unwrap()
}

/// Saves and loads a packed model.
fn through_disk(packed: &Model) -> Model {
    let dir = tempfile::tempdir().unwrap();
    packed.save(dir.path(), None).unwrap();
    Model::load(dir.path()).unwrap()
}

/// Heads with and without a value for each token.
const HEADS: [Option<HeadKind>; 4] =
    [Some(HeadKind::Classes(3)), Some(HeadKind::Value), Some(HeadKind::Span), None];

#[test]
fn int8_logits_are_the_forwards_bit_for_bit() {
    let mut seed = 0;
    for config in [BERT, DISTILBERT, ROBERTA, ODD_BERT] {
        for head in HEADS {
            for pattern in [None, Some("2:4"), Some("2:8")] {
                for outputs in [false, true] {
                    seed += 1;
                    let mut model = dense(config, head, seed);
                    model.attention = pattern.map(|p| p.parse().unwrap());
                    prune(&mut model);
                    let types = model.spec.encoder.as_ref().unwrap().embed.types;
                    let samples =
                        [inputs(3, 11, 50, types, true, seed), inputs(2, 9, 50, types, false, seed)];
                    quantise(&mut model, &samples, outputs);
                    let packed = model.packed().unwrap();
                    assert_eq!(packed.stage, Stage::PackedInt8);
                    let loaded = through_disk(&packed);
                    assert_eq!((&loaded.params, &loaded.spec.head), (&packed.params, &packed.spec.head));
                    assert_eq!(loaded.attention, model.attention);
                    let engines = [
                        Engine::load(&packed, Device::Cpu).unwrap(),
                        Engine::load(&loaded, Device::Cpu).unwrap(),
                    ];
                    for inputs in samples.iter().chain([&inputs(1, 20, 50, types, false, seed + 1)]) {
                        let want = logits(&model, inputs);
                        for engine in &engines {
                            let what = format!("{config} {head:?} {pattern:?} outputs {outputs}");
                            same_bits(&what, &engine.run(inputs).unwrap(), &want);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn f16_logits_are_those_of_the_rounded_pruned_model() {
    for (seed, config) in [BERT, DISTILBERT, ROBERTA, ODD_BERT].into_iter().enumerate() {
        for head in HEADS {
            let mut model = dense(config, head, seed as u64 + 70);
            prune(&mut model);
            let packed = model.packed().unwrap();
            assert_eq!(packed.stage, Stage::PackedF16);
            // The pruned model with every matrix rounded to f16, masked ones included.
            round_dense(&mut model.params).unwrap();
            for (_, weight) in model.params.iter_mut() {
                if let Weight::Masked { value, .. } = weight {
                    *value = value.to_f16().to_f32();
                }
            }
            let loaded = through_disk(&packed);
            assert_eq!(loaded.params, packed.params);
            let types = model.spec.encoder.as_ref().unwrap().embed.types;
            let inputs = inputs(3, 11, 50, types, true, seed as u64);
            let want = logits(&model, &inputs);
            for model in [&packed, &loaded] {
                same_bits(config, &Engine::load(model, Device::Cpu).unwrap().run(&inputs).unwrap(), &want);
            }
        }
    }
}

/// Any encoder the specification can express, with both norms and orders, gates, rotation and projection.
fn stacks() -> impl Strategy<Value = TransformerSpec> {
    let sizes = (0usize..3, 1usize..4, 1usize..5, 1usize..30, 5usize..40, 1usize..3);
    let flags = (any::<[bool; 8]>(), 0usize..3);
    (sizes, flags, any::<bool>()).prop_map(|((layers, groups, half, ffn, vocab, kv), (f, types), span)| {
        let [pre, rms, gated, rotary, projected, qkv_bias, bias, causal] = f;
        let (heads, head_dim) = (groups * kv, 2 * half);
        let positions = match rotary {
            true => {
                Positions::Rotary { frequency: (0..half).map(|i| 0.3f64.powi(i as i32)).collect(), limit: 16 }
            }
            false => Positions::Learned { entries: 18, numbering: Numbering::Unpadded { offset: 2 } },
        };
        let hidden = heads * head_dim;
        TransformerSpec {
            vocab,
            embed_width: if projected { hidden + 3 } else { hidden },
            encoder: Some(Stack {
                layers,
                hidden,
                heads,
                kv_heads: kv,
                head_dim,
                ffn,
                activation: Activation::Silu,
                gated,
                qkv_bias,
                bias,
                norm: if rms { Norm::Rms { eps: 1e-5 } } else { Norm::Layer { eps: 1e-5 } },
                order: if pre { NormOrder::Pre } else { NormOrder::Post },
                final_norm: pre,
                causal,
                cross: false,
                embed: Embed { scale: 1.5, positions, types, norm: !pre, projected },
                dropout: Dropout { hidden: 0.1, attention: 0.1, head: 0.1 },
            }),
            decoder: None,
            head: match (span, projected) {
                // The head's width is the stack's, so there is none after a projection to another.
                (_, true) => Head::None,
                (true, _) => Head::Span,
                (false, _) => Head::Classify { outputs: 3, dense: bias.then_some(Activation::Tanh) },
            },
            tokens: SpecialTokens { pad: Some(1), ..Default::default() },
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_encoder_agrees(
        spec in stacks(),
        batch in 1usize..4,
        length in 1usize..17,
        padded: bool,
        outputs: bool,
        pattern in prop_oneof![Just(None), Just(Some("2:4")), Just(Some("2:8")), Just(Some("1:2"))],
        seed in 0u64..1000,
    ) {
        let (vocab, types) = (spec.vocab, spec.encoder.as_ref().unwrap().embed.types);
        let config = Config::parse(Path::new("config.json"), BERT).unwrap();
        let mut model = with_spec(spec, config, seed);
        model.attention = pattern.map(|p| p.parse().unwrap());
        prune(&mut model);
        let samples = [inputs(batch, length, vocab, types, padded, seed)];
        quantise(&mut model, &samples, outputs);
        let engine = engine(&model);
        for inputs in samples.iter().chain([&inputs(2, 16, vocab, types, !padded, seed + 1)]) {
            same_bits("logits", &engine.run(inputs).unwrap(), &logits(&model, inputs));
        }
    }
}

/// The codes each map reads, and from them its 32-bit sums and outputs, computed naively.
#[test]
fn codes_and_sums_are_the_forwards() {
    for (config, head) in [(BERT, HEADS[0]), (ROBERTA, HEADS[2]), (DISTILBERT, HEADS[3])] {
        let mut model = dense(config, head, 5);
        prune(&mut model);
        let types = model.spec.encoder.as_ref().unwrap().embed.types;
        let inputs = inputs(3, 12, 50, types, true, 6);
        quantise(&mut model, std::slice::from_ref(&inputs), true);
        let packed = model.packed().unwrap();
        let (_, codes) = Engine::load(&packed, Device::Cpu).unwrap().run_tapped(&inputs).unwrap();
        let taps = fake(&model, &inputs, TapSet { linears: true, ..TapSet::default() }).taps;
        let linears = model.spec.linears();
        for l in &linears {
            let ours = codes.get(&l.input).unwrap_or_else(|| panic!("no codes of {}", l.input));
            let mut theirs = taps[&l.input].value().clone();
            let mut y = taps[&format!("{}.y", l.name)].value().clone();
            if ours.rows() != theirs.rows() {
                // The last block before a classifier, of which only first tokens are computed.
                assert!(matches!(head, Some(HeadKind::Classes(_))) && ours.rows() == 3);
                let first = |t: &Tensor| {
                    let rows = t.f32().chunks(t.width()).step_by(12).flatten().copied().collect();
                    Tensor::from_f32(rows, &[3, t.width()])
                };
                (theirs, y) = (first(&theirs), first(&y));
            }
            let step = model.params.dense(&l.input_scale()).item();
            for (i, (&ours, &x)) in ours.i8().iter().zip(theirs.f32()).enumerate() {
                assert_eq!(f32::from(ours), code(x, step), "{}[{i}] of {x} / {step}", l.input);
            }
            let Some(Weight::Packed(w)) = packed.params.get(&format!("{}.weight", l.name)) else { panic!() };
            let (weight, scale) = (unpack_codes(w), w.scale.as_ref().unwrap().f32());
            let bias = l.bias.then(|| model.params.dense(&format!("{}.bias", l.name)).f32());
            let mut at = 0;
            for x in ours.i8().chunks(l.cols) {
                for (o, row) in weight.chunks(l.cols).enumerate() {
                    let sum: i32 = x.iter().zip(row).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
                    let want = sum as f32 * (step * scale[o]) + bias.map_or(0.0, |b| b[o]);
                    assert_eq!(y.f32()[at].to_bits(), want.to_bits(), "{}.y[{at}]", l.name);
                    at += 1;
                }
            }
            assert_eq!(at, y.len());
        }
        assert!(codes.keys().all(|input| linears.iter().any(|l| l.input == *input)));
    }
}

#[test]
fn twelve_threads_get_the_answers_of_one() {
    let mut model = dense(BERT, HEADS[0], 9);
    prune(&mut model);
    let batches: Vec<Inputs> =
        (0..8).map(|i| inputs(1 + i % 4, 5 + i, 50, 2, i % 2 == 0, i as u64)).collect();
    quantise(&mut model, &batches[..2], true);
    let engine = engine(&model);
    let want: Vec<Tensor> = batches.iter().map(|b| engine.run(b).unwrap()).collect();
    std::thread::scope(|threads| {
        for t in 0..12 {
            let (engine, batches, want) = (&engine, &batches, &want);
            threads.spawn(move || {
                for i in 0..40 {
                    let i = (t + i) % batches.len();
                    same_bits("logits", &engine.run(&batches[i]).unwrap(), &want[i]);
                }
            });
        }
    });
}

#[test]
fn unfit_inputs_are_refused() {
    let mut model = dense(BERT, HEADS[0], 2);
    prune(&mut model);
    let engine = engine(&model);
    let good = inputs(2, 6, 50, 2, true, 3);
    engine.run(&good).unwrap();
    let refused = |what: &str, spoil: &dyn Fn(&mut Inputs)| {
        let mut bad = good.clone();
        spoil(&mut bad);
        let e = engine.run(&bad).unwrap_err().to_string();
        assert!(e.contains(what), "{e}");
    };
    refused("token id 50", &|i| i.tokens.ids[3] = 50);
    refused("vocabulary of 50", &|i| i.tokens.ids[3] = u32::MAX);
    refused("token type 2", &|i| i.tokens.types[0] = 2);
    refused("11 token types", &|i| i.tokens.types.truncate(11));
    refused("mask of 5", &|i| i.tokens.mask = Some(vec![true; 5]));
    refused("mask of 13", &|i| i.tokens.mask = Some(vec![true; 13]));
    refused("at most 20", &|i| i.tokens.length = 21);
    refused("12 token ids", &|i| i.tokens.length = 5);
    refused("token ids for a batch", &|i| i.tokens.batch = usize::MAX);
    refused("no tokens", &|i| i.tokens = Tokens::default());
    refused("no target", &|i| i.target = Some(i.tokens.clone()));
    // A sequence of padding only is odd but not an error.
    let mut padding = good.clone();
    padding.tokens.mask = Some(vec![false; 12]);
    assert!(engine.run(&padding).unwrap().f32().iter().all(|x| x.is_finite()));
}

#[test]
fn unfit_models_are_refused() {
    let refused = |what: &str, model: &Model| {
        let Err(e) = Engine::load(model, Device::Cpu) else { panic!("accepted; should say {what}") };
        assert!(e.to_string().contains(what), "{e}");
    };
    let mut model = dense(BERT, HEADS[0], 2);
    refused("this one is dense", &model);
    let e = model.packed().unwrap_err().to_string();
    assert!(e.contains("prune it first"), "{e}");
    prune(&mut model);
    refused("pack it", &model);
    let f16 = model.packed().unwrap();
    assert!(f16.packed().unwrap_err().to_string().contains("packed already"));
    let samples = [inputs(2, 6, 50, 2, true, 3)];
    let mut stray = model.clone();
    quantise(&mut model, &samples, false);
    stray.stage = Stage::Quantized;
    let e = stray.packed().unwrap_err().to_string();
    assert!(e.contains("attn.k.weight") && e.contains("stage"), "{e}");
    let packed = model.packed().unwrap();
    for (name, what) in [
        ("encoder.1.ffn.out.weight", "missing"),
        ("encoder.0.ffn.norm.bias", "missing"),
        ("encoder.0.attn.input_scale", "missing"),
        ("embed.word", "missing"),
    ] {
        let mut less = packed.clone();
        less.params.remove(name).unwrap();
        refused(what, &less);
        refused(name, &less);
    }
    let mut odd = packed.clone();
    odd.params.insert("embed.word", Weight::Dense(Tensor::zeros(&[50, 23])));
    refused("[50, 23]", &odd);
    let mut odd = packed.clone();
    odd.params.insert("encoder.0.attn.input_scale", Weight::Dense(Tensor::scalar(-1.0)));
    refused("positive step", &odd);
    let mut odd = packed.clone();
    odd.attention = Some(Pattern { keep: 4, of: 4 });
    refused("4:4", &odd);
    let mut odd = packed.clone();
    odd.spec.decoder = odd.spec.encoder.clone();
    refused("later", &odd);
    // A value that f16 cannot hold.
    let mut large = dense(BERT, HEADS[0], 2);
    let Some(Weight::Dense(t)) = large.params.get_mut("encoder.0.attn.q.weight") else { panic!() };
    t.f32_mut()[0] = 1e6;
    prune(&mut large);
    let e = large.packed().unwrap_err().to_string();
    assert!(e.contains("encoder.0.attn.q.weight") && e.contains("row 0, group 0"), "{e}");
    let mut large = dense(BERT, HEADS[0], 2);
    let Some(Weight::Dense(t)) = large.params.get_mut("embed.word") else { panic!() };
    t.f32_mut()[0] = 1e6;
    prune(&mut large);
    let e = large.packed().unwrap_err().to_string();
    assert!(e.contains("embed.word") && e.contains("f16"), "{e}");
}

/// What the engine may not know, so that it stays fit for deployment.
#[test]
fn the_engine_knows_no_training() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/engine");
    let mut files = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "rs") {
            files += 1;
            let text = std::fs::read_to_string(&path).unwrap();
            for word in ["Tape", "Var", "train", "distill"] {
                let code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
                let found = code.flat_map(|l| l.split(|c: char| !c.is_alphanumeric() && c != '_'));
                assert!(!found.into_iter().any(|w| w == word), "{} uses `{word}`", path.display());
            }
        }
    }
    assert!(files >= 2, "the engine's sources were not found");
}

/// A real checkpoint, if there is one (`GPUSQ_MINILM_DIR`).
#[test]
fn minilm_answers_alike() {
    let dir = std::env::var_os("GPUSQ_MINILM_DIR");
    let Some(dir) = dir.as_deref().map(Path::new) else {
        println!("skipped: GPUSQ_MINILM_DIR is not set");
        return;
    };
    let mut model = Model::load(dir).unwrap();
    model.set_head(HeadKind::Classes(2), 1).unwrap();
    let vocab = model.spec.vocab;
    prune(&mut model);
    let samples: Vec<Inputs> = (0..3).map(|i| inputs(4, 32, vocab, 1, true, i)).collect();
    quantise(&mut model, &samples, true);
    let loaded = through_disk(&model.packed().unwrap());
    let engine = Engine::load(&loaded, Device::Cpu).unwrap();
    for i in 0..6 {
        let inputs = inputs(1 + i % 4, 16 + 20 * i, vocab, 1, i % 2 == 0, 100 + i as u64);
        same_bits("logits", &engine.run(&inputs).unwrap(), &logits(&model, &inputs));
    }
}

/// Who uses a GPU reads; who counts the memory that this process holds there writes.
static MEMORY: RwLock<()> = RwLock::new(());

fn uses_memory() -> RwLockReadGuard<'static, ()> {
    MEMORY.read().unwrap_or_else(PoisonError::into_inner)
}

/// The GPUs to test on. `GPUSQ_NEED_GPU=1` makes their absence a failure.
fn gpus() -> Vec<Device> {
    let gpus: Vec<Device> = Device::all().into_iter().filter(|d| *d != Device::Cpu).collect();
    if gpus.is_empty() {
        assert!(std::env::var_os("GPUSQ_NEED_GPU").is_none(), "{:?}", Device::named("cuda").err());
        println!("skipped: no GPU");
    }
    gpus
}

/// BERT's proportions with heads as wide as in real models, so that every kernel for them is met.
const WIDE_BERT: &str = r#"{"model_type": "bert", "vocab_size": 500, "hidden_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 6, "intermediate_size": 1536, "max_position_embeddings": 400, "type_vocab_size": 2,
    "pad_token_id": 0}"#;

/// Rows that are no padding, of outputs that have one for each token or for each sequence.
fn real_rows(t: &Tensor, inputs: &Inputs) -> Vec<Vec<f32>> {
    let mask = inputs.tokens.mask.as_ref().filter(|m| m.len() == t.rows());
    let rows = t.f32().chunks_exact(t.width()).enumerate();
    rows.filter(|(i, _)| mask.is_none_or(|m| m[*i])).map(|(_, row)| row.to_vec()).collect()
}

/// With output pairs every operation of the engine rounds alike on a CPU and on a GPU, and all sums are of whole numbers or
/// in one order: outputs are the CPU's bit for bit. (Beyond 2^24 units of attention's weights times codes they need not be,
/// which these models do not come near.)
#[track_caller]
fn same_rows(what: &str, got: &Tensor, want: &Tensor, inputs: &Inputs) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    let (got, want) = (real_rows(got, inputs), real_rows(want, inputs));
    let apart = got.iter().flatten().zip(want.iter().flatten()).filter(|(g, w)| g.to_bits() != w.to_bits());
    let apart: Vec<_> = apart.collect();
    assert!(apart.is_empty(), "{what}: {} outputs differ, such as {:?}", apart.len(), apart[0]);
}

/// Without output pairs, how far a GPU's outputs may be from the CPU's, as a share of the largest (half of it in the mean
/// square): attention sums products of halves, and activations are computed to 1e-7, so that now and then a value falls on
/// the other side of a tie and moves by a step of its grid, and with it all that follows (of a single value near 0 it may be
/// more, see [`near`]). With f16 weights, which the GPU multiplies as such, likewise.
const APART: f32 = 0.08;
/// The same where a map sums a few dozen products only, or a pattern chooses among keys with nearly equal scores; each
/// model's own bound is [`moved`], where that is less.
const APART_NARROW: f32 = 0.25;

/// Copies of a packed model on the CPU whose embeddings are up to an f16's rounding (2^-11) off, at random.
fn rounded_engines(model: &Model, seed: u64) -> Vec<Engine> {
    let rounded = |k: u64| {
        let mut model = model.clone();
        for (_, w) in model.params.iter_mut() {
            if let Weight::Dense(t) = w
                && t.shape().len() == 2
            {
                let off = draws(t.len(), 3, 10 * seed + k);
                t.f32_mut().iter_mut().zip(off).for_each(|(x, n)| *x *= 1.0 + (n as f32 - 1.0) / 2048.0);
            }
        }
        Engine::load(&model, Device::Cpu).unwrap()
    };
    (0..4).map(rounded).collect()
}

/// How far f16 may move the outputs `want`, as [`APART`] counts: six times (thrice in the mean square) what one rounding
/// at the start moves the CPU's own, and a little for what that misses.
fn moved(rounded: &[Engine], want: &Tensor, inputs: &Inputs) -> f32 {
    let rows = |t: &Tensor| real_rows(t, inputs).concat();
    let (want, length) = (rows(want), |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt());
    let apart = rounded.iter().map(|engine| {
        let off: Vec<f32> =
            rows(&engine.run(inputs).unwrap()).iter().zip(&want).map(|(a, b)| a - b).collect();
        length(&off) / length(&want).max(1e-15)
    });
    6.0 * apart.fold(0.0, f32::max) + APART / 2.0
}

/// The step of the grid that a model's outputs lie on, 0 where they lie on none.
fn last_step(model: &Model) -> f32 {
    model.params.get("head.out.output_scale").map_or(0.0, |w| match w {
        Weight::Dense(step) => step.item(),
        _ => panic!("a step is a dense tensor"),
    })
}

/// Whether outputs agree but for `most_apart` (see [`APART`]), or for one `step` of the grid that they lie on where that is
/// more: a single value of a few steps, on the other side of a tie, is far from the CPU's as a share.
#[track_caller]
fn near(what: &str, got: &Tensor, want: &Tensor, inputs: &Inputs, most_apart: f32, step: f32) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    let (got, want) = (real_rows(got, inputs), real_rows(want, inputs));
    let most = want.iter().flatten().fold(0.0f32, |m, v| m.max(v.abs()));
    let step = 1.001 * step;
    let mut squares = (0.0, 0.0);
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        for (g, w) in g.iter().zip(w) {
            assert!(
                (g - w).abs() <= step.max(most_apart * most),
                "{what}, row {i}: {g}, CPU {w}, step {step}"
            );
            squares = (squares.0 + f64::from(g - w).powi(2), squares.1 + f64::from(*w).powi(2));
        }
        // The largest output of a row is the answer, where the CPU is not undecided itself.
        let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        let mut sorted = w.clone();
        sorted.sort_by(f32::total_cmp);
        if w.len() > 1 && sorted[w.len() - 1] - sorted[w.len() - 2] > most_apart / 2.0 * most {
            assert_eq!(best(g), best(w), "{what}, row {i}: {g:?}, CPU {w:?}");
        }
    }
    let size = squares.1.max(1e-30).sqrt();
    let apart = squares.0.sqrt() / size;
    // One output alone may be a step off.
    let bound = f64::from(most_apart / 2.0).max(f64::from(step) / size);
    assert!(apart < bound, "{what}: {apart} of the outputs' size apart, {bound} allowed");
    println!("{apart:.5} apart: {what}");
}

/// A quantised model, packed.
fn packed_int8(
    config: &str,
    head: Option<HeadKind>,
    pattern: Option<&str>,
    outputs: bool,
    seed: u64,
) -> Model {
    let mut model = dense(config, head, seed);
    model.attention = pattern.map(|p| p.parse().unwrap());
    prune(&mut model);
    let types = model.spec.encoder.as_ref().unwrap().embed.types;
    let (vocab, most) = (model.spec.vocab, model.spec.max_length().min(40));
    let samples = [inputs(3, most, vocab, types, true, seed), inputs(2, most - 1, vocab, types, false, seed)];
    quantise(&mut model, &samples, outputs);
    model.packed().unwrap()
}

/// With kernels that are taken without measuring them: that would compile dozens for each small model.
fn unplanned(model: &Model, device: Device) -> Engine {
    Engine::load_with(model, device, Products::Likely).unwrap()
}

#[test]
fn a_gpu_gives_the_answers_of_the_cpu() {
    let _shared = uses_memory();
    for gpu in gpus() {
        let mut seed = 900;
        for config in [BERT, DISTILBERT, ROBERTA, WIDE_BERT] {
            for head in HEADS {
                for (pattern, outputs) in
                    [(None, true), (None, false), (Some("2:4"), true), (Some("1:4"), false)]
                {
                    seed += 1;
                    let model = packed_int8(config, head, pattern, outputs, seed);
                    let engines = [Device::Cpu, gpu].map(|d| unplanned(&model, d));
                    let rounded = rounded_engines(&model, seed);
                    let types = model.spec.encoder.as_ref().unwrap().embed.types;
                    let (vocab, most) = (model.spec.vocab, model.spec.max_length());
                    for (batch, length, padded) in
                        [(3, 11, true), (1, most, false), (7, most.min(90), true), (2, 1, false)]
                    {
                        let inputs = inputs(batch, length, vocab, types, padded, seed);
                        let what =
                            format!("{head:?} {pattern:?} outputs {outputs} {batch} x {length} of {config}");
                        let [want, got] = [0, 1].map(|i| engines[i].run(&inputs).unwrap());
                        if outputs {
                            // Hidden states themselves are f16 on a GPU.
                            let want = if head.is_none() { want.to_f16().to_f32() } else { want };
                            same_rows(&what, &got, &want, &inputs);
                        } else {
                            let narrow = pattern.is_some() || config != WIDE_BERT;
                            let bound = if narrow { APART_NARROW } else { APART };
                            let bound = bound.min(moved(&rounded, &want, &inputs));
                            near(&what, &got, &want, &inputs, bound, last_step(&model));
                        }
                        // The graph again, and on other inputs of its bucket before.
                        engines[1].run(&self::inputs(batch, length, vocab, types, padded, !seed)).unwrap();
                        same_bits(&what, &engines[1].run(&inputs).unwrap(), &got);
                    }
                }
            }
        }
    }
}

#[test]
fn f16_weights_give_the_answers_of_the_cpu_on_a_gpu() {
    let _shared = uses_memory();
    for gpu in gpus() {
        for (seed, config) in [BERT, WIDE_BERT].into_iter().enumerate() {
            for head in HEADS {
                let mut pruned = dense(config, head, seed as u64 + 40);
                pruned.attention = (seed == 0).then(|| "2:4".parse().unwrap());
                prune(&mut pruned);
                let model = pruned.packed().unwrap();
                let types = model.spec.encoder.as_ref().unwrap().embed.types;
                let inputs = inputs(5, 20, model.spec.vocab, types, true, seed as u64);
                let [want, got] =
                    [Device::Cpu, gpu].map(|d| Engine::load(&model, d).unwrap().run(&inputs).unwrap());
                near(&format!("{head:?} of {config}"), &got, &want, &inputs, APART, 0.0);
                // The same weights as INT8, taken for numbers.
                let quantised = packed_int8(config, head, None, true, seed as u64);
                let want = Engine::load(&quantised, Device::Cpu).unwrap().run(&inputs).unwrap();
                let half = Engine::load_with(&quantised, gpu, Products::DenseF16).unwrap();
                let got = half.run(&inputs).unwrap();
                let size = |t: &Tensor| t.f32().iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
                let ratio = size(&got) / size(&want);
                assert!((0.5..2.0).contains(&ratio), "{ratio}");
            }
        }
    }
}

#[test]
fn a_gpu_serves_many_threads_and_its_memory_stays_as_it_is() {
    let _alone = MEMORY.write().unwrap_or_else(PoisonError::into_inner);
    // For a long run: GPUSQ_REQUESTS=100000.
    let requests: usize = std::env::var("GPUSQ_REQUESTS").map_or(1200, |n| n.parse().unwrap());
    for gpu in gpus() {
        let Device::Cuda(own) = gpu else { unreachable!("only GPUs") };
        let model = packed_int8(WIDE_BERT, Some(HeadKind::Span), None, true, 5);
        let engine = unplanned(&model, gpu);
        let all: Vec<Inputs> = (0..24)
            .map(|i| inputs(1 + i % 5, 10 + 13 * i, model.spec.vocab, 2, i % 2 == 0, i as u64))
            .collect();
        let want: Vec<Tensor> = all.iter().map(|i| engine.run(i).unwrap()).collect();
        own.peak_memory();
        let (before, free) = (own.peak_memory(), own.free_memory());
        std::thread::scope(|scope| {
            for thread in 0..12 {
                let (engine, all, want) = (&engine, &all, &want);
                scope.spawn(move || {
                    for i in 0..requests / 12 {
                        let which = (i * 7 + thread * 5) % all.len();
                        same_bits("a thread", &engine.run(&all[which]).unwrap(), &want[which]);
                    }
                });
            }
        });
        assert_eq!(own.peak_memory(), before, "bytes of tensors on the GPU");
        // The driver allocates for itself too.
        let less = free.saturating_sub(own.free_memory());
        assert!(less <= 16 << 20, "{less} bytes less than before that nobody has");
    }
}

/// More sizes of batch than graphs are kept: they are made again, in the memory of those that went.
#[test]
fn a_gpu_makes_graphs_again_without_more_memory() {
    let _alone = MEMORY.write().unwrap_or_else(PoisonError::into_inner);
    for gpu in gpus() {
        let Device::Cuda(own) = gpu else { unreachable!("only GPUs") };
        let model = packed_int8(WIDE_BERT, Some(HeadKind::Classes(3)), None, true, 15);
        let engine = unplanned(&model, gpu);
        let sizes = (1..=5).flat_map(|batch| (1..=25).map(move |k| (batch, 16 * k)));
        let all: Vec<Inputs> =
            sizes.map(|(b, l)| inputs(b, l, model.spec.vocab, 2, false, (b * l) as u64)).collect();
        let run = || all.iter().map(|i| engine.run(i).unwrap()).collect::<Vec<_>>();
        let want = run();
        let free = own.free_memory();
        for _ in 0..3 {
            for (got, want) in run().iter().zip(&want) {
                same_bits("again", got, want);
            }
            // The driver keeps some of what graphs gave back.
            let less = free.saturating_sub(own.free_memory());
            assert!(less <= 16 << 20, "{less} bytes less than before");
        }
    }
}

#[test]
fn a_gpu_runs_what_it_measured_to_be_fastest() {
    let _shared = uses_memory();
    for gpu in gpus() {
        let model = packed_int8(WIDE_BERT, Some(HeadKind::Classes(3)), None, true, 8);
        let inputs = inputs(9, 60, model.spec.vocab, 2, true, 3);
        let engine = Engine::load(&model, gpu).unwrap();
        let plan = engine.plan(&inputs).unwrap().unwrap();
        // Queries, keys and values; three more maps for all tokens, three for first tokens, and two of the head.
        assert_eq!(plan.len(), 9, "{plan:?}");
        for row in &plan {
            let own = row.times.iter().find(|t| t.kernel == row.kernel && t.sparse == row.sparse).unwrap();
            assert!(
                row.times.iter().all(|t| t.microseconds >= own.microseconds && t.microseconds > 0.0),
                "{row:?}"
            );
            assert_eq!(row.why_dense().is_some(), !row.sparse);
            assert_eq!(row.norm, matches!(row.place, Place::AttentionOut | Place::FfnOut));
            // On Hopper kernels with the norm in them are among those that were timed.
            let named = |part| row.times.iter().any(|t| t.kernel.contains(part));
            assert_eq!(named("with norm"), row.norm && named("wgmma"), "{row:?}");
        }
        // A second engine finds it on disk.
        assert_eq!(Engine::load(&model, gpu).unwrap().plan(&inputs).unwrap().unwrap(), plan);
        let want = unplanned(&model, gpu).run(&inputs).unwrap();
        let dense = Engine::load_with(&model, gpu, Products::DenseInt8).unwrap();
        assert!(dense.plan(&inputs).unwrap().unwrap().iter().all(|row| !row.sparse));
        // Every kernel gives the same sums, and so the same answers.
        same_bits("planned", &engine.run(&inputs).unwrap(), &want);
        same_bits("dense", &dense.run(&inputs).unwrap(), &want);
    }
}

/// All of the GPU's memory that can be had, down to a few kilobytes.
fn fill(gpu: Gpu) -> Vec<Arena> {
    let mut all = Vec::new();
    let mut bytes = 64usize << 30;
    while bytes >= 4 << 10 {
        match Arena::new(gpu, bytes) {
            Ok(arena) => all.push(arena),
            Err(CudaError::OutOfMemory { .. }) => bytes /= 2,
            Err(e) => panic!("{e}"),
        }
    }
    all
}

/// A request that needs memory says that there is none, however often it comes, and is answered once there is; the others
/// are answered all the time.
#[test]
fn a_gpu_without_memory_refuses_what_needs_some_and_goes_on() {
    let _alone = MEMORY.write().unwrap_or_else(PoisonError::into_inner);
    for device in gpus() {
        let Device::Cuda(gpu) = device else { unreachable!("only GPUs") };
        let model = packed_int8(WIDE_BERT, Some(HeadKind::Span), None, true, 12);
        let asked = [(2, 30), (3, 70), (11, 200)].map(|(b, l)| inputs(b, l, model.spec.vocab, 2, true, 6));
        let likely = unplanned(&model, device);
        let want = asked.each_ref().map(|i| likely.run(i).unwrap());
        for products in [Products::Fastest, Products::DenseInt8] {
            // A plan from the disk needs dense twins only; without one they are timed first.
            for planned in [false, true] {
                let load = || Engine::load_with(&model, device, products).unwrap();
                if planned {
                    asked.iter().for_each(|i| drop(load().run(i).unwrap()));
                }
                let engine = load();
                same_bits("before", &likely.run(&asked[0]).unwrap(), &want[0]);
                let full = fill(gpu);
                assert!(full.len() > 5);
                for _ in 0..2 {
                    let results = asked.each_ref().map(|i| engine.run(i));
                    for (result, want) in results.iter().zip(&want) {
                        match result {
                            Ok(answer) => same_bits("without memory", answer, want),
                            Err(Error::Device(CudaError::OutOfMemory { .. })) => {}
                            Err(e) => panic!("{e}"),
                        }
                    }
                    // Dense twins cannot be had.
                    if products == Products::DenseInt8 {
                        let e = results[2].as_ref().unwrap_err().to_string();
                        assert!(e.contains("free memory on this GPU and ask again"), "{e}");
                    }
                    // What needs no memory.
                    same_bits("a size met before", &likely.run(&asked[0]).unwrap(), &want[0]);
                    let e = Engine::load_with(&model, device, products).err().unwrap().to_string();
                    assert!(e.contains("out of memory") && e.contains("end other programs"), "{e}");
                }
                drop(full);
                for (inputs, want) in asked.iter().zip(&want) {
                    same_bits("with memory again", &engine.run(inputs).unwrap(), want);
                }
                same_bits("a new engine", &load().run(&asked[1]).unwrap(), &want[1]);
            }
        }
    }
}

#[test]
fn large_batches_take_several_passes_on_a_gpu() {
    let _shared = uses_memory();
    for gpu in gpus() {
        let model = packed_int8(BERT, Some(HeadKind::Classes(3)), None, true, 6);
        let engines = [Device::Cpu, gpu].map(|d| unplanned(&model, d));
        let inputs = inputs(4000, 20, 50, 2, false, 1);
        let [want, got] = engines.map(|e| e.run(&inputs).unwrap());
        same_rows("4000 sequences", &got, &want, &inputs);
    }
}

#[test]
fn what_a_gpu_does_not_run_is_refused_with_what_does() {
    let _shared = uses_memory();
    for gpu in gpus() {
        let mut pruned = dense(ODD_BERT, HEADS[0], 2);
        prune(&mut pruned);
        let odd = packed_int8(ODD_BERT, HEADS[0], None, false, 3);
        for model in [pruned.packed().unwrap(), odd] {
            let e = Engine::load(&model, gpu).err().unwrap().to_string();
            assert!(e.contains("multiples of 8") && e.contains("--device cpu"), "{e}");
        }
        let engine = unplanned(&packed_int8(BERT, HEADS[0], None, true, 4), gpu);
        let mut left = inputs(2, 10, 50, 2, true, 1);
        left.tokens.mask.as_mut().unwrap()[0] = false;
        let e = engine.run(&left).unwrap_err().to_string();
        assert!(e.contains("sequence 1") && e.contains("padding comes last"), "{e}");
        engine.run(&inputs(2, 10, 50, 2, true, 1)).unwrap();
    }
}
