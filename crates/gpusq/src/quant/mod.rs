//! Post-training quantisation: the step sizes that quantisation-aware training starts from (paper,
//! algorithm 1, line 18).

mod histogram;

use std::collections::BTreeMap;

use gpusq_tensor::ops::lsq::{QMAX, code, square_error};
use gpusq_tensor::ops::masked::MaskGradient;
use gpusq_tensor::{Device, Tape, Tensor};
use rayon::prelude::*;

use crate::Result;
use crate::config::Method;
use crate::forward::{Bound, Compute, Inputs, TapSet, forward, prepare};
use crate::model::{Model, Stage, apply};
use crate::params::Weight;
use crate::spec::Role;
use histogram::Histogram;

/// Smallest step size: an all-zero row or tensor still needs a positive one.
const SMALLEST: f32 = 1e-8;

/// Activations that are looked at at the same time.
const TAPS: usize = 16;

/// Candidates of [`Method::Mse`], as fractions of the absmax step size.
fn candidates() -> impl Iterator<Item = f32> {
    (0..100).map(|i| 1.0 - 0.8 * i as f32 / 99.0)
}

/// One step size per row of `value` `[rows, cols]`: f32 `[rows]`. `percentile` is for the method of that name.
pub fn weight_scales(value: &Tensor, method: Method, percentile: f64) -> Tensor {
    let rows: Vec<f32> =
        value.f32().par_chunks_exact(value.width()).map(|row| row_scale(row, method, percentile)).collect();
    let n = rows.len();
    Tensor::from_f32(rows, &[n])
}

fn row_scale(row: &[f32], method: Method, percentile: f64) -> f32 {
    let absmax = row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let top = (absmax / QMAX).max(SMALLEST);
    match method {
        Method::Absmax => top,
        Method::Percentile => {
            let mut sorted: Vec<f32> = row.iter().map(|v| v.abs()).filter(|&v| v > 0.0).collect();
            if sorted.is_empty() {
                return top;
            }
            sorted.sort_by(f32::total_cmp);
            let at = ((sorted.len() as f64 * percentile / 100.0).ceil() as usize).clamp(1, sorted.len());
            (sorted[at - 1] / QMAX).max(SMALLEST)
        }
        Method::Mse => {
            // Zeros, half of a pruned row, have no error.
            let kept: Vec<f32> = row.iter().copied().filter(|&v| v != 0.0).collect();
            let large: Vec<f32> = kept.iter().map(|v| v.abs()).filter(|&v| v > 0.85 * absmax).collect();
            let clipped = |s: f32| large.iter().map(|v| f64::from((v - QMAX * s).max(0.0)).powi(2)).sum();
            best(top, clipped, |s| square_error(&kept, s))
        }
    }
}

/// The candidate step size with the least error; the larger of equals. `clipped` is a part of the error that smaller step
/// sizes only make larger, and quickly known: once it alone is more than the least error so far (by more than rounding),
/// no candidate that is left can be better. Of a normal row, one in ten is looked at.
fn best(top: f32, clipped: impl Fn(f32) -> f64, error: impl Fn(f32) -> f64) -> f32 {
    let mut best = (f64::INFINITY, top);
    for s in candidates().map(|f| f * top) {
        if clipped(s) > 1.01 * best.0 {
            break;
        }
        let e = error(s);
        if e < best.0 {
            best = (e, s);
        }
    }
    best.1
}

/// Settings of [`calibrate`].
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// For weights, per output row.
    pub weights: Method,
    /// For activations, per tensor.
    pub activations: Method,
    /// Percent of the magnitudes that [`Method::Percentile`] does not clip.
    pub percentile: f64,
    /// Roles whose linear map's output is quantised too (the pair after a layer, paper figure 2).
    pub outputs: Vec<Role>,
}

/// Turns a pruned model into a fake-quantised one: step sizes of weights from their values, of activations
/// from a forward over `samples`.
///
/// # Errors
/// What a GPU meets; the model is unchanged then.
pub fn calibrate(model: &mut Model, samples: &[Inputs], how: &Calibration, compute: Compute) -> Result<()> {
    let mut seen: BTreeMap<String, Histogram> = BTreeMap::new();
    prepare(&model.spec, model.attention, compute);
    let tape = Tape::inference();
    let bound = Bound::new(&tape, &model.params, MaskGradient::Kept, compute);
    let want = TapSet { linears: true, ..TapSet::default() };
    for inputs in samples {
        let out = forward(&tape, &model.spec, &bound, model.attention, inputs, want);
        let mut taps = out.taps.iter().peekable();
        while taps.peek().is_some() {
            // A few at a time, because they are many.
            let mut some: Vec<(&String, Tensor, Histogram)> = Vec::new();
            for (name, v) in taps.by_ref().take(TAPS) {
                some.push((name, v.value().to(Device::Cpu), seen.remove(name).unwrap_or_default()));
            }
            some.par_iter_mut().for_each(|(_, t, h)| {
                let t = t.to_f32();
                let mask = inputs.tokens.mask.as_ref().filter(|m| m.len() == t.rows());
                for (r, row) in t.f32().chunks_exact(t.width()).enumerate() {
                    // Padding is no input, and its activations would stretch the range for nothing.
                    if mask.is_none_or(|m| m[r]) {
                        h.add(row);
                    }
                }
            });
            seen.extend(some.into_iter().map(|(name, _, h)| (name.clone(), h)));
        }
    }
    drop(bound);
    compute.device.check()?;
    let steps: BTreeMap<String, f32> =
        seen.into_par_iter().map(|(name, h)| (name, h.scale(how.activations, how.percentile))).collect();
    for l in model.spec.linears() {
        let name = format!("{}.weight", l.name);
        let Some(Weight::Masked { .. }) = model.params.get(&name) else { continue };
        let Some(Weight::Masked { value, mask }) = model.params.remove(&name) else { unreachable!() };
        let value = apply(&value, &mask);
        let scale = weight_scales(&value, how.weights, how.percentile);
        model.params.insert(name, Weight::Fake { value, mask, scale });
        let step = |tap: &str| Weight::Dense(Tensor::scalar(steps.get(tap).copied().unwrap_or(SMALLEST)));
        model.params.insert(l.input_scale(), step(&l.input));
        if how.outputs.contains(&l.role) {
            model.params.insert(l.output_scale(), step(&format!("{}.y", l.name)));
        }
    }
    model.stage = Stage::Quantized;
    Ok(())
}

/// Root mean square of the quantisation error of `value` over its own root mean square.
pub fn relative_error(value: &Tensor, scale: &Tensor) -> f64 {
    let (mut error, mut size) = (0.0f64, 0.0f64);
    for (row, &s) in value.f32().chunks_exact(value.width()).zip(scale.f32()) {
        for &v in row {
            let e = (v - code(v, s) * s) as f64;
            error += e * e;
            size += v as f64 * v as f64;
        }
    }
    if size == 0.0 { 0.0 } else { (error / size).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absmax_gives_the_largest_value_code_127() {
        let t = Tensor::from_f32(vec![0.1, -2.54, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], &[2, 4]);
        let s = weight_scales(&t, Method::Absmax, 100.0);
        assert_eq!(code(-2.54, s.f32()[0]), -127.0);
        assert!(s.f32()[1] > 0.0, "a row of zeros still has a step size");
    }

    #[test]
    fn mse_is_never_worse_than_absmax_and_better_with_an_outlier() {
        let scales = |t: &Tensor, method| weight_scales(t, method, 100.0);
        let mut row = gpusq_tensor::normal(&[1, 512], 1.0, 3);
        row.f32_mut()[7] = 6.0;
        let (a, m) = (scales(&row, Method::Absmax), scales(&row, Method::Mse));
        let (ea, em) = (relative_error(&row, &a), relative_error(&row, &m));
        assert!(em <= ea, "{em} {ea}");
        // So many that finer steps for them outweigh what clipping the outlier costs.
        let mut heavy = gpusq_tensor::normal(&[1, 8192], 1.0, 3);
        heavy.f32_mut()[7] = 12.0;
        let (a, m) = (scales(&heavy, Method::Absmax), scales(&heavy, Method::Mse));
        assert!(relative_error(&heavy, &m) < 0.99 * relative_error(&heavy, &a));
    }

    /// Rows of many lengths and shapes, with outliers, half of them zeros, and of one size only.
    #[test]
    fn mse_is_the_best_of_all_candidates() {
        for (i, n) in [1, 2, 3, 17, 64, 384, 3072].into_iter().cycle().take(70).enumerate() {
            let mut row = gpusq_tensor::normal(&[1, n], 0.5, i as u64);
            let values = row.f32_mut();
            match i % 5 {
                0 => values.iter_mut().step_by(2).for_each(|v| *v = 0.0),
                1 => values[n / 2] = 3.0 + i as f32,
                2 => values.iter_mut().for_each(|v| *v = v.signum() * 0.3),
                3 => values.iter_mut().for_each(|v| *v = v.powi(3)),
                _ => {}
            }
            let absmax = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let top = (absmax / QMAX).max(SMALLEST);
            let kept: Vec<f32> = values.iter().copied().filter(|&v| v != 0.0).collect();
            let all = candidates().map(|f| f * top).map(|s| (square_error(&kept, s), s));
            let want = all.reduce(|a, b| if b.0 < a.0 { b } else { a }).unwrap().1;
            assert_eq!(row_scale(values, Method::Mse, 100.0), want, "row {i} of {n}");
        }
    }

    #[test]
    fn percentile_clips_the_asked_share() {
        let row: Vec<f32> = (1..=100).map(|i| i as f32).collect();
        let s = weight_scales(&Tensor::from_f32(row, &[1, 100]), Method::Percentile, 90.0);
        assert_eq!(s.f32()[0], 90.0 / 127.0);
    }
}
