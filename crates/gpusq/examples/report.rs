//! Writes a report with made-up figures, to look at after changing its layout:
//! `cargo run -p gpusq --example report -- FOLDER`.

use gpusq::report::{Ablation, Curve, LayerRow, Machine, Point, RunRecord, Sizes, Stage, write};

fn main() -> gpusq::Result<()> {
    let dir = std::env::args().nth(1).unwrap_or_else(|| "report-example".into());
    write(&example(), &dir)
}

fn example() -> RunRecord {
    let scores =
        |accuracy: f64| vec![("accuracy".to_string(), accuracy), ("F1".to_string(), accuracy + 1.37)];
    let stage = |name: &str, accuracy, wall_seconds| Stage {
        name: name.into(),
        scores: scores(accuracy),
        wall_seconds,
        examples: 872,
        one_class: false,
    };
    let mut layers = Vec::new();
    for block in 0..6 {
        for (name, rows, cols) in
            [("attn.q", 384, 384), ("attn.k", 384, 384), ("attn.v", 384, 384), ("attn.out", 384, 384)]
                .into_iter()
                .chain([("ffn.in", 1536, 384), ("ffn.out", 384, 1536)])
        {
            layers.push(LayerRow {
                name: format!("encoder.{block}.{name}.weight"),
                rows,
                cols,
                kept: 0.5,
                weight_error: 0.006 + 0.011 * noise(layers.len()).powi(2),
                activation_scale: 0.01 + 0.05 * noise(layers.len() + 99),
                left_dense: None,
            });
        }
    }
    let reason = "the input width 2 is not a multiple of 4, so that it has no 2:4 groups";
    layers.push(LayerRow {
        name: "head.weight".into(),
        rows: 2,
        cols: 2,
        kept: 1.0,
        weight_error: f64::NAN,
        activation_scale: f64::NAN,
        left_dense: Some(reason.into()),
    });
    RunRecord {
        title: "all-MiniLM-L6-v2".into(),
        task: "sst2".into(),
        main_metric: "accuracy".into(),
        lower_is_better: false,
        variant: "GEMM-MHA, attention 2:4".into(),
        started: "2026-03-14T09:26:53Z".into(),
        wall_seconds: 5127.4,
        machine: Machine::current(2, "CPU"),
        version: format!("gpusq {}", env!("CARGO_PKG_VERSION")),
        command: "gpusq compress --model minilm-sst2 --task sst2 --data glue/SST-2 --out run --seed 1".into(),
        stages: vec![
            stage("dense", 91.28, 31.0),
            stage("2:4 FP16", 90.94, 2402.1),
            stage("2:4 INT8 (fake-quantised)", 90.83, 2611.9),
            stage("2:4 INT8 (packed engine)", 90.83, 12.4),
        ],
        curves: vec![curve("2:4 FP16", 6315, 1.0), curve("2:4 INT8", 6315, 0.15), curve("short", 40, 0.01)],
        layers,
        sizes: Some(Sizes {
            dense_fp16_bits: 10_616_832 * 16,
            packed_bits: 10_616_832 * 5,
            scale_bits: 27_648 * 32,
            rest_bits: 12_096_384 * 16,
            file_bytes: 31_045_632,
        }),
        ablation: vec![
            Ablation { label: "2:4 INT8 with distillation".into(), scores: scores(90.83) },
            Ablation { label: "2:4 INT8 without distillation".into(), scores: scores(87.96) },
        ],
        config: "seed = 1\nvariant = \"gemm-mha\"\n\n[prune]\ncriterion = \"magnitude\"\nepochs = 3\nbatch = 32\nlr = 2e-5\n\
                 \n[distill]\nalpha = 1.0\nbeta = 10.0\ngamma = 1.0\ntemperature = 2.0\n"
            .into(),
        notes: vec!["These figures are made up.".into()],
    }
}

fn curve(stage: &str, steps: u64, size: f64) -> Curve {
    let points = (0..steps).map(|step| {
        let t = step as f64 / steps as f64;
        let term = |from: f64, to: f64, seed| {
            size * (to + (from - to) * (-6.0 * t).exp()) * (0.6 + 0.8 * noise(seed + 3 * step as usize))
        };
        let (hard, soft, feature) = (term(0.7, 0.2, 0), term(0.3, 0.02, 1), term(2.5, 0.6, 2));
        let lr = 2e-5 * (10.0 * t).min(1.0) * (1.0 - t);
        Point { step, loss: hard + 10.0 * soft + feature, hard, soft, feature, lr }
    });
    Curve { stage: stage.into(), points: points.collect() }
}

/// A fixed number in 0..1 for each `seed`.
fn noise(seed: usize) -> f64 {
    let mixed = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f64 / (1u64 << 24) as f64
}
