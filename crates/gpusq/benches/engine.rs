//! The INT8 engine against the dense f32 forward of the same model, end to end.
//!
//! `cargo bench -p gpusq --bench engine`. MiniLM's shape (6 blocks, 384 wide, 12 heads, feed-forward 1536,
//! vocabulary 30522) with a two-class head and random weights, since time does not depend on them. The
//! two alternate, so that whatever else the machine does meets both; medians, best times and their ratios
//! are printed.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use gpusq::arch::Config;
use gpusq::compress::prune_weights;
use gpusq::config::{self, Method};
use gpusq::engine::Engine;
use gpusq::forward::{Bound, Compute, Inputs, TapSet, Tokens, forward};
use gpusq::model::Model;
use gpusq::quant::{Calibration, calibrate};
use gpusq::tensor::ops::masked::MaskGradient;
use gpusq::tensor::{Device, Tape};

const CONFIG: &str = r#"{"model_type": "bert", "architectures": ["BertForSequenceClassification"],
    "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "max_position_embeddings": 512, "type_vocab_size": 2, "num_labels": 2}"#;

/// Time for each size of batch, shared by what is compared.
const BUDGET: Duration = Duration::from_secs(8);

fn model() -> Model {
    let config = Config::parse(Path::new("config.json"), CONFIG).expect("it is written above");
    Model::random(config, 1).expect("BERT is known and complete")
}

fn inputs(batch: usize, length: usize) -> Inputs {
    let ids = (0..batch * length).map(|i| (i * 7919 % 30522) as u32).collect();
    Inputs { tokens: Tokens { batch, length, ids, types: Vec::new(), mask: None }, target: None }
}

fn quantised(dense: &Model) -> Model {
    let mut model = dense.clone();
    prune_weights(&mut model, &config::Config::default().prune, &[], Compute::CPU)
        .expect("the model is dense");
    let how = Calibration {
        weights: Method::Absmax,
        activations: Method::Percentile,
        percentile: 99.9,
        outputs: Vec::new(),
    };
    calibrate(&mut model, &[inputs(2, 64)], &how, Compute::CPU).expect("a CPU does not fail");
    model
}

fn time(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64() * 1e3
}

fn main() {
    let dense = model();
    let engine =
        Engine::load(&quantised(&dense).packed().expect("it is 2:4"), Device::Cpu).expect("it is packed");
    let tape = Tape::inference();
    let bound = Bound::new(&tape, &dense.params, MaskGradient::Kept, Compute::CPU);
    println!("{} threads; milliseconds, best / median", rayon::current_num_threads());
    println!("{:>16}  {:>17}  {:>17}  {:>13}", "batch x length", "f32 forward", "INT8 engine", "ratio");
    for (batch, length) in [(8, 128), (1, 128), (32, 32), (1, 16)] {
        let inputs = inputs(batch, length);
        let mut times = [vec![], vec![]];
        let start = Instant::now();
        while start.elapsed() < BUDGET {
            times[0].push(time(|| {
                let want = TapSet::default();
                black_box(forward(&tape, &dense.spec, &bound, None, black_box(&inputs), want));
            }));
            times[1].push(time(|| {
                black_box(engine.run(black_box(&inputs)).expect("the inputs fit"));
            }));
        }
        let [f32_time, int8_time] = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            [times[0], times[times.len() / 2]]
        });
        println!(
            "{:>16}  {:>8.2}/{:>8.2}  {:>8.2}/{:>8.2}  {:>6.2}/{:>6.2}",
            format!("{batch} x {length}"),
            f32_time[0],
            f32_time[1],
            int8_time[0],
            int8_time[1],
            f32_time[0] / int8_time[0],
            f32_time[1] / int8_time[1],
        );
    }
}
