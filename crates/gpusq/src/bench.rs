//! How fast does a model run, and how much of that is due to what was done to it?

use std::path::Path;
use std::time::Instant;

use gpusq_tensor::cuda::fnv;
use gpusq_tensor::{Device, Tensor, normal};

use crate::arch::{self, Config};
use crate::engine::{Engine, Products};
use crate::inputs::{Inputs, Tokens};
use crate::model::{Model, Stage};
use crate::params::{Packed, Params, Weight};
use crate::report::{BenchCell, BenchLoad, BenchSeries, BenchTexts, TextBatch};
use crate::sparsity::Pattern;
use crate::spec::Linear;
use crate::task::{Example, HeadKind};
use crate::train::batch::collate;
use crate::{Error, Result};

/// A published size, to be timed with random weights.
pub struct Size {
    /// What `--spec` takes.
    pub name: &'static str,
    /// One line for help.
    pub doc: &'static str,
    config: &'static str,
}

/// Sizes that can be timed without a checkpoint. All have a question-answering head, so that every token goes through
/// every layer.
pub const SIZES: &[Size] = &[
    Size {
        name: "bert-base",
        doc: "12 blocks of 768, feed-forward 3072",
        config: r#"{"model_type": "bert", "architectures": ["BertForQuestionAnswering"], "vocab_size": 30522,
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
            "max_position_embeddings": 512, "type_vocab_size": 2}"#,
    },
    Size {
        name: "bert-large",
        doc: "24 blocks of 1024, feed-forward 4096",
        config: r#"{"model_type": "bert", "architectures": ["BertForQuestionAnswering"], "vocab_size": 30522,
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
            "max_position_embeddings": 512, "type_vocab_size": 2}"#,
    },
    Size {
        name: "distilbert",
        doc: "6 blocks of 768, feed-forward 3072",
        config: r#"{"model_type": "distilbert", "architectures": ["DistilBertForQuestionAnswering"],
            "vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072,
            "max_position_embeddings": 512}"#,
    },
];

/// The size called `name`.
///
/// # Errors
/// [`Error::Config`] that lists all of them.
pub fn size(name: &str) -> Result<&'static Size> {
    SIZES.iter().find(|s| s.name == name).ok_or_else(|| {
        let all: Vec<&str> = SIZES.iter().map(|s| s.name).collect();
        Error::Config(format!("there is no size `{name}`; use one of {}", all.join(", ")))
    })
}

impl Size {
    /// A packed INT8 model of this size with random weights. Step sizes are such that codes use their range: time and
    /// power depend on it.
    pub fn model(&self, seed: u64) -> Model {
        let path = Path::new("config.json");
        let config = Config::parse(path, self.config).expect("written above");
        let spec =
            (arch::find(&config).expect("a known family").spec)(&config).expect("a complete configuration");
        let linears = spec.linears();
        let mut params = Params::new();
        for (i, (name, shape)) in spec.weights().into_iter().enumerate() {
            let seed = seed.wrapping_mul(1_000_003).wrapping_add(i as u64);
            let linear = linears.iter().find(|l| name.strip_suffix(".weight") == Some(&l.name));
            let weight = match (linear, shape.len()) {
                (Some(linear), _) => Weight::Packed(random_packed(linear, seed)),
                (None, 2) => Weight::Dense(normal(&shape, 0.02, seed).to_f16().to_f32()),
                (None, _) if name.ends_with("norm.weight") => Weight::Dense(Tensor::full(&shape, 1.0)),
                (None, _) => Weight::Dense(normal(&shape, 0.02, seed)),
            };
            params.insert(name, weight);
        }
        // Normalised values reach four deviations; what attention gives is a mean of many.
        let step = |scale: f32| Weight::Dense(Tensor::scalar(scale / 127.0));
        for l in &linears {
            params.insert(l.input_scale(), step(if l.name.ends_with("attn.o") { 1.0 } else { 4.0 }));
            if !l.name.starts_with("head") && !l.name.ends_with("ffn.out") {
                params.insert(l.output_scale(), step(4.0));
            }
        }
        Model {
            spec,
            params,
            config,
            stage: Stage::PackedInt8,
            attention: None,
            task: None,
            max_length: None,
            fresh: Vec::new(),
            unused: Vec::new(),
        }
    }
}

/// A 2:4 weight of random codes in random places.
fn random_packed(l: &Linear, seed: u64) -> Packed {
    /// Places of the kept two of four, as a packed nibble.
    const NIBBLES: [u8; 6] = [0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110];
    let mut state = seed | 1;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u32
    };
    // Never 0: a code that is 0 is not kept, and its place would be another.
    let values = (0..l.rows * l.cols / 2).map(|_| match random() % 254 {
        r @ 0..127 => r as i32 - 127,
        r => r as i32 - 126,
    });
    let values: Vec<i8> = values.map(|v| v as i8).collect();
    let groups = l.cols / 4;
    let mut meta = vec![0; l.rows * l.cols.div_ceil(8)];
    for row in 0..l.rows {
        for group in 0..groups {
            let nibble = NIBBLES[random() as usize % 6];
            meta[row * l.cols.div_ceil(8) + group / 2] |= nibble << (4 * (group % 2));
        }
    }
    // Inputs of deviation 1 give outputs of about 1; codes have a deviation of 73.
    let scale = 1.0 / (73.0 * (l.cols as f32 / 2.0).sqrt());
    Packed {
        values: Tensor::from_i8(values, &[l.rows, l.cols / 2]),
        meta: Tensor::from_u8(meta, &[l.rows, l.cols.div_ceil(8)]),
        scale: Some(Tensor::full(&[l.rows], scale)),
        cols: l.cols,
    }
}

/// What is timed of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Variant {
    name: &'static str,
    about: &'static str,
    products: Products,
    pattern: Option<Pattern>,
}

fn variants(device: Device, own: Option<Pattern>) -> Vec<Variant> {
    let two_four = Some(own.unwrap_or(Pattern::TWO_FOUR));
    let variant = |name, about, products, pattern| Variant { name, about, products, pattern };
    let gemm = variant("gemm", "2:4 INT8 weights, dense attention", Products::Fastest, None);
    let mha = variant("gemm-mha", "2:4 INT8 weights, sparse attention", Products::Fastest, two_four);
    match device {
        Device::Cpu => vec![gemm, mha],
        Device::Cuda(_) => {
            let dense = variant("int8", "dense INT8 weights, our kernels", Products::DenseInt8, None);
            let half = variant("fp16", "dense f16 weights, cuBLASLt", Products::DenseF16, None);
            vec![half, dense, gemm, mha]
        }
    }
}

/// A grid of batch sizes and lengths, and how often each is run.
#[derive(Clone, Debug, PartialEq)]
pub struct Grid {
    /// Sequences.
    pub batches: Vec<usize>,
    /// Tokens of each.
    pub lengths: Vec<usize>,
    /// Timed runs, after as many as warm up.
    pub repeats: usize,
}

impl Grid {
    /// Whether there are texts for each batch.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a batch that is larger.
    pub fn check_texts(&self, examples: &[Example]) -> Result<()> {
        match self.batches.iter().find(|&&batch| batch > examples.len()) {
            None => Ok(()),
            Some(batch) => Err(Error::Mismatch(format!(
                "a batch of {batch} from {} texts; give more, or a smaller one",
                examples.len()
            ))),
        }
    }
}

/// Times `model`, packed INT8, with what it is compared to, for every cell of `grid`. `watch` is told the name of what
/// is timed next, and of each cell.
///
/// # Errors
/// As [`Engine::load`] and [`Engine::run`].
pub fn bench(
    model: &Model,
    device: Device,
    grid: &Grid,
    watch: &mut dyn FnMut(&str),
) -> Result<Vec<BenchSeries>> {
    let mut all = Vec::new();
    for v in variants(device, model.attention) {
        watch(&format!("{}: {}", v.name, v.about));
        let model = Model { attention: v.pattern, ..model.clone() };
        let engine = Engine::load_with(&model, device, v.products)?;
        let mut cells = Vec::new();
        for &length in &grid.lengths {
            for &batch in &grid.batches {
                let inputs = random_inputs(&model, batch, length);
                engine.times(&inputs, grid.repeats.div_ceil(4))?;
                let mut milliseconds = engine.times(&inputs, grid.repeats)?;
                milliseconds.sort_by(f64::total_cmp);
                let start = Instant::now();
                engine.run(&inputs)?;
                let request = start.elapsed().as_secs_f64() * 1e3;
                let cell = BenchCell::new(batch, length, &milliseconds, request);
                watch(&format!("  {batch} x {length}: {:.3} ms", cell.median));
                cells.push(cell);
            }
        }
        all.push(BenchSeries { name: v.name.into(), about: v.about.into(), cells });
    }
    Ok(all)
}

/// Batches of texts that are timed for each size of batch.
const TEXT_BATCHES: usize = 12;

/// Times `model`, packed INT8, on batches of `examples`, each of at most `length` tokens, drawn at random (the same each
/// time), beside batches that are padded to `length` tokens: for the sizes and repeats of `grid`. `watch` is told each row.
///
/// # Errors
/// As [`Engine::load`] and [`Engine::run`]; fewer examples than a batch has.
pub fn bench_texts(
    model: &Model,
    device: Device,
    examples: &[Example],
    pad: u32,
    length: usize,
    grid: &Grid,
    watch: &mut dyn FnMut(&str),
) -> Result<Vec<BenchTexts>> {
    grid.check_texts(examples)?;
    let engine = Engine::load(model, device)?;
    let median = |inputs: &Inputs| -> Result<f64> {
        engine.times(inputs, grid.repeats.div_ceil(4))?;
        let mut times = engine.times(inputs, grid.repeats)?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    };
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|i| fnv(&i.to_le_bytes()));
    let mut rows = Vec::new();
    for &batch in &grid.batches {
        let padded = median(&random_inputs(model, batch, length))?;
        let one = |which: &[usize]| -> Result<TextBatch> {
            let tokens = which.iter().map(|&i| examples[i].ids.len()).sum();
            let inputs = collate(examples, which, HeadKind::Value, pad).inputs;
            Ok(TextBatch { tokens, median: median(&inputs)? })
        };
        let batches = order.chunks_exact(batch).take(TEXT_BATCHES).map(one).collect::<Result<_>>()?;
        let row = BenchTexts { batch, length, runs: grid.repeats, padded, batches };
        watch(&format!(
            "  {batch} texts of {:.1} tokens: {:.3} ms; of {length}: {padded:.3} ms",
            row.tokens() / batch as f64,
            row.milliseconds()
        ));
        rows.push(row);
    }
    Ok(rows)
}

/// Loads the packed model in `dir` and answers one batch: what each part took. [`BenchLoad::open`] and its name are the
/// caller's to fill in. In a process that has done so before, a GPU has its kernels loaded.
///
/// # Errors
/// As [`Model::load`], [`Engine::load`] and [`Engine::run`].
pub fn bench_load(dir: &Path, device: Device, batch: usize, length: usize) -> Result<BenchLoad> {
    let clock = Instant::now();
    let mut last = 0.0;
    let mut lap = || {
        let now = clock.elapsed().as_secs_f64() * 1e3;
        now - std::mem::replace(&mut last, now)
    };
    let model = Model::load(dir)?;
    let read = lap();
    let engine = Engine::load(&model, device)?;
    let prepare = lap();
    engine.run(&random_inputs(&model, batch, length))?;
    Ok(BenchLoad { batch, length, read, prepare, first: lap(), ..BenchLoad::default() })
}

fn random_inputs(model: &Model, batch: usize, length: usize) -> Inputs {
    let mut state = (batch * 1009 + length) as u64;
    let ids = (0..batch * length).map(|_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) % model.spec.vocab as u64) as u32
    });
    let tokens = Tokens { batch, length, ids: ids.collect(), types: Vec::new(), mask: None };
    Inputs { tokens, target: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::packed::unpack_codes;

    #[test]
    fn random_models_are_whole_and_their_outputs_use_their_range() {
        let size = Size {
            name: "tiny",
            doc: "",
            config: r#"{"model_type": "bert", "architectures": ["BertForQuestionAnswering"], "vocab_size": 99,
                "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
                "max_position_embeddings": 40, "type_vocab_size": 2}"#,
        };
        let model = size.model(3);
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path(), None).unwrap();
        // The reader checks every rule of the format.
        assert_eq!(Model::load(dir.path()).unwrap().params, model.params);
        let Some(Weight::Packed(p)) = model.params.get("encoder.0.ffn.in.weight") else {
            panic!("not packed")
        };
        let codes = unpack_codes(p);
        assert!(codes.chunks_exact(4).all(|g| g.iter().filter(|&&c| c != 0).count() == 2));
        let engine = Engine::load(&model, Device::Cpu).unwrap();
        let inputs = random_inputs(&model, 3, 40);
        let (logits, taps) = engine.run_tapped(&inputs).unwrap();
        assert!(logits.f32().iter().all(|x| x.is_finite()));
        for (name, codes) in taps {
            let large = codes.i8().iter().filter(|c| c.unsigned_abs() > 16).count();
            assert!(large * 10 > codes.len(), "{name}: {large} of {} codes are above 16", codes.len());
        }
        let grid = Grid { batches: vec![1, 2], lengths: vec![8], repeats: 3 };
        let series = bench(&model, Device::Cpu, &grid, &mut |_| {}).unwrap();
        assert_eq!(series.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["gemm", "gemm-mha"]);
        assert!(series.iter().all(|s| s.cells.len() == 2 && s.cells.iter().all(|c| c.median > 0.0)));
    }

    #[test]
    fn unknown_sizes_are_refused_with_the_known() {
        let e = size("bert-huge").err().unwrap().to_string();
        assert!(e.contains("bert-huge") && SIZES.iter().all(|s| e.contains(s.name)), "{e}");
    }
}
