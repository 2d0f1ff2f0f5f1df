//! The one test body of every operation: forward against a naive f64 reference, backward against
//! central differences of that reference.

use crate::{Device, Tape, Tensor, Var};

/// Every device the tests can run on: the CPU, and a GPU where the machine has one. `GPUSQ_NEED_GPU=1` makes its
/// absence a failure, so that a run that is meant to test a GPU cannot pass without.
pub(crate) fn devices() -> Vec<Device> {
    let devices = Device::all();
    if let (1, Some(_)) = (devices.len(), std::env::var_os("GPUSQ_NEED_GPU")) {
        panic!("GPUSQ_NEED_GPU is set: {:?}", Device::named("cuda").err());
    }
    devices
}

/// A repeatable tensor with elements in about -1.5..1.5, none of them near zero differences from ties.
pub(crate) fn noise(shape: &[usize], seed: u64) -> Tensor {
    let n = shape.iter().product::<usize>();
    let v = (0..n).map(|i| crate::cpu::random(seed, i as u32) as f32 / u32::MAX as f32 * 3.0 - 1.5).collect();
    Tensor::from_f32(v, shape)
}

/// Checks `op` of `inputs` against `reference`, which maps the inputs' elements to the output's.
pub(crate) fn check(
    inputs: &[Tensor],
    op: impl Fn(&Tape, &[Var]) -> Var,
    reference: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    for device in devices() {
        let tape = Tape::recording();
        let vars: Vec<Var> = inputs.iter().map(|t| tape.leaf(t.to(device))).collect();
        let out = op(&tape, &vars);
        let wide: Vec<Vec<f64>> =
            inputs.iter().map(|t| t.f32().iter().map(|&x| x as f64).collect()).collect();
        let want = reference(&wide);
        assert_eq!(out.value().len(), want.len(), "output length");
        close(&format!("output on {device:?}"), out.value().to(Device::Cpu).f32(), &want, 2e-6);
        // An inference tape computes the same and keeps nothing.
        let quiet = Tape::inference();
        let again: Vec<Var> = inputs.iter().map(|t| quiet.leaf(t.to(device))).collect();
        let again = op(&quiet, &again);
        assert!(again.value() == out.value() && !again.tracked());
        // Random weights on the outputs make one scalar of them.
        let weights = noise(out.shape(), 99);
        let loss = super::weighted_sum::dot(&tape, &out, &weights);
        let mut grads = tape.backward(&loss);
        let scalar = |x: &[Vec<f64>]| -> f64 {
            reference(x).iter().zip(weights.f32()).map(|(a, &b)| a * b as f64).sum()
        };
        for (k, var) in vars.iter().enumerate() {
            let got = grads.take(var).unwrap_or_else(|| panic!("input {k} got no gradient"));
            let h = 1e-5;
            let want: Vec<f64> = (0..wide[k].len())
                .map(|i| {
                    let mut x = wide.clone();
                    x[k][i] += h;
                    let up = scalar(&x);
                    x[k][i] -= 2.0 * h;
                    (up - scalar(&x)) / (2.0 * h)
                })
                .collect();
            close(&format!("gradient of input {k} on {device:?}"), got.to(Device::Cpu).f32(), &want, 1e-5);
        }
        if let Device::Cuda(gpu) = device {
            gpu.check().unwrap();
        }
    }
}

/// Elements agree to `tolerance` relative to the largest element (at least 1).
pub(crate) fn close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    let scale = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((g as f64 - w).abs() <= tolerance * scale, "{what}[{i}]: {g}, reference {w}");
    }
}
