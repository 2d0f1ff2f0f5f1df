use rayon::prelude::*;

use super::{IGNORE, counted};
use crate::Tensor;
use crate::cpu::{exp, par_rows, simd};
use crate::ops::layer_norm::lane_sum;

/// Largest element, and log of the sum of e^(x * factor) around it: `log sum e^(x_i factor)` is their sum.
pub(crate) fn log_sum_exp(row: &[f32], factor: f32) -> (f32, f32) {
    simd(|| {
        let max = row.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x)) * factor;
        (max, lane_sum(row, |x| exp(x * factor - max)).ln())
    })
}

pub(super) fn forward(logits: &Tensor, labels: &[i32]) -> f32 {
    let n = counted(labels);
    if n == 0 {
        return 0.0;
    }
    let rows: Vec<f64> = logits
        .f32()
        .par_chunks_exact(logits.width())
        .zip(labels)
        .map(|(row, &l)| {
            if l == IGNORE {
                return 0.0;
            }
            let (max, log) = log_sum_exp(row, 1.0);
            log as f64 - (row[l as usize] - max) as f64
        })
        .collect();
    (rows.iter().sum::<f64>() / n as f64) as f32
}

pub(super) fn backward(grad: f32, logits: &Tensor, labels: &[i32]) -> Tensor {
    let width = logits.width();
    let mut dx = Tensor::stale(logits.shape());
    let g = grad / counted(labels).max(1) as f32;
    let x = logits.f32();
    par_rows(dx.f32_mut(), width, |first, block| {
        for (k, d) in block.chunks_exact_mut(width).enumerate() {
            let (row, l) = (&x[(first + k) * width..][..width], labels[first + k]);
            if l == IGNORE {
                d.fill(0.0);
                continue;
            }
            let (max, log) = log_sum_exp(row, 1.0);
            simd(|| {
                for (d, x) in d.iter_mut().zip(row) {
                    *d = g * exp(x - max - log);
                }
            });
            d[l as usize] -= g;
        }
    });
    dx
}
