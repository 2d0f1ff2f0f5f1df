//! One knowledge-distillation step of a MiniLM-sized model on the CPU: teacher and student forward, span
//! loss + KL + features, backward, clipping, AdamW. Random weights and tokens, f32, batch 8, sequence 128.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use gpusq::arch::Config;
use gpusq::config;
use gpusq::distill::{Mix, Targets};
use gpusq::forward::{Compute, Inputs, Tokens};
use gpusq::model::Model;
use gpusq::sparsity::Pattern;
use gpusq::tensor::Group;
use gpusq::train::batch::{Batch, MicroBatch};
use gpusq::train::{Recipe, Stepper};

const CONFIG: &str = r#"{"model_type":"bert","architectures":["BertForQuestionAnswering"],"vocab_size":30522,
"hidden_size":384,"num_hidden_layers":6,"num_attention_heads":12,"intermediate_size":1536,
"max_position_embeddings":512,"hidden_dropout_prob":0.0,"attention_probs_dropout_prob":0.0}"#;

fn model() -> Model {
    Model::random(Config::parse(Path::new("config.json"), CONFIG).unwrap(), 1).unwrap()
}

fn step(c: &mut Criterion) {
    let (batch, length) = (8usize, 128usize);
    let ids = (0..batch * length).map(|i| (i as u32).wrapping_mul(2_654_435_761) % 30_522).collect();
    let tokens = Tokens { batch, length, ids, types: vec![0; batch * length], mask: None };
    let targets = Targets::Spans { start: vec![5; batch], end: vec![9; batch] };
    let batch = Batch { inputs: Inputs { tokens, target: None }, targets };
    let parts = [MicroBatch::from(batch)];
    let optimizer = config::Fit { learning_rate: 1e-5, ..config::Fit::default() };
    for (name, attention) in [("dense", None), ("attention 2:4", Some(Pattern::TWO_FOUR))] {
        let (teacher, mut student) = (model(), model());
        student.attention = attention;
        let how = Recipe {
            optimizer: &optimizer,
            mix: Mix { alpha: 1.0, beta: 10.0, gamma: 1.0, temperature: 2.0, attention_features: false },
            teacher: Some(&teacher),
            scale_learning_rate: 1e-3,
            mask_update_every: 0,
            stop_loss: None,
            seed: 1,
            checkpoint: None,
            pipeline_parallel_size: 1,
            teacher_cache: None,
            pad: 0,
            compute: Compute::CPU,
            group: Group::alone(),
        };
        let stepper = Stepper::new(&student, &how).unwrap();
        let mut moments = BTreeMap::new();
        let mut n = 0;
        c.bench_function(&format!("KD step, MiniLM size, batch 8 x 128, {name}"), |bench| {
            bench.iter(|| {
                n += 1;
                black_box(stepper.step(&mut student, &mut moments, &parts, n, 1e-5).unwrap())
            })
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_secs(15));
    targets = step
}
criterion_main!(benches);
