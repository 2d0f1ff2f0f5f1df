use rayon::prelude::*;

use super::QMAX;
use crate::Tensor;
use crate::cpu::{fold_rows, par_elements, par_rows, simd};

/// The INT8 code of `x` under step size `s`, as f32: `clamp(round_half_even(x / s), -127, 127)`. NaN
/// gives 0, and zero is always +0. The division is a true one: multiplying by a reciprocal gives other codes
/// near ties.
#[inline(always)]
pub fn code(x: f32, s: f32) -> f32 {
    let v = x / s;
    // Comparisons with NaN are false: it ends as 0. Adding +0 turns -0 into +0.
    let v = if v > -QMAX {
        v
    } else if v <= -QMAX {
        -QMAX
    } else {
        0.0
    };
    let v = if v < QMAX { v } else { QMAX };
    v.round_ties_even() + 0.0
}

pub(super) fn codes(x: &Tensor, s: f32) -> Tensor {
    map(x, |x| code(x, s))
}

pub(super) fn dequantised(x: &Tensor, s: f32) -> Tensor {
    map(x, |x| code(x, s) * s)
}

fn map(x: &Tensor, f: impl Fn(f32) -> f32 + Sync) -> Tensor {
    let mut out = Tensor::stale(x.shape());
    let x = x.f32();
    par_elements(out.f32_mut(), |at, block| {
        simd(|| {
            for (o, x) in block.iter_mut().zip(&x[at..]) {
                *o = f(*x);
            }
        })
    });
    out
}

/// One element's share of the gradients: (dx, ds before scaling).
#[inline(always)]
fn element(g: f32, x: f32, c: f32, s: f32) -> (f32, f32) {
    let v = x / s;
    let inside = v.abs() <= QMAX;
    (if inside { g } else { 0.0 }, g * if inside { c - v } else { c })
}

pub(super) fn backward(grad: &Tensor, x: &Tensor, codes: &Tensor, s: f32) -> (Tensor, f32) {
    let mut dx = Tensor::stale(x.shape());
    let (g, x, c) = (grad.f32(), x.f32(), codes.f32());
    par_elements(dx.f32_mut(), |at, block| {
        simd(|| {
            for (i, d) in block.iter_mut().enumerate() {
                *d = element(g[at + i], x[at + i], c[at + i], s).0;
            }
        })
    });
    // Eight lanes, so that the sum vectorises and still has one fixed order.
    let lanes = fold_rows(x.len().div_ceil(8), 8, |rows, sum| {
        let range = rows.start * 8..x.len().min(rows.end * 8);
        for ((g, x), c) in g[range.clone()].chunks(8).zip(x[range.clone()].chunks(8)).zip(c[range].chunks(8))
        {
            for i in 0..g.len() {
                sum[i] += element(g[i], x[i], c[i], s).1;
            }
        }
    });
    (dx, lanes.iter().sum::<f32>() / (x.len() as f32 * QMAX).sqrt())
}

pub(super) fn weight_codes(w: &Tensor, mask: &Tensor, scale: &Tensor) -> Tensor {
    let width = w.width();
    let mut out = Tensor::stale(w.shape());
    let (w, m, s) = (w.f32(), mask.u8(), scale.f32());
    par_rows(out.f32_mut(), width, |first, block| {
        simd(|| {
            for (r, row) in block.chunks_exact_mut(width).enumerate() {
                let at = (first + r) * width;
                let (w, m, s) = (&w[at..at + width], &m[at..at + width], s[first + r]);
                for ((o, w), m) in row.iter_mut().zip(w).zip(m) {
                    *o = code(w * *m as f32, s);
                }
            }
        })
    });
    out
}

pub(super) fn weight_backward(
    grad: &Tensor,
    w: &Tensor,
    mask: &Tensor,
    codes: &Tensor,
    scale: &Tensor,
) -> (Tensor, Tensor) {
    let (rows, width) = (w.rows(), w.width());
    let mut dw = Tensor::stale(w.shape());
    let mut ds = vec![0.0; rows];
    let (g, w, m, c, s) = (grad.f32(), w.f32(), mask.u8(), codes.f32(), scale.f32());
    let n = (width as f32 * QMAX).sqrt();
    dw.f32_mut().par_chunks_exact_mut(width).zip(&mut ds).enumerate().for_each(|(r, (row, ds))| {
        let range = r * width..(r + 1) * width;
        let (g, w, m, c, s) = (&g[range.clone()], &w[range.clone()], &m[range.clone()], &c[range], s[r]);
        simd(|| {
            let mut sum = 0.0;
            for i in 0..width {
                let keep = m[i] as f32;
                let (dx, share) = element(g[i], w[i] * keep, c[i], s);
                row[i] = dx * keep;
                sum += share;
            }
            *ds = sum / n;
        });
    });
    let ds = Tensor::from_f32(ds, &[rows]);
    (dw, ds)
}
