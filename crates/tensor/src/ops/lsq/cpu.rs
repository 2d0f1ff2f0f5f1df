use rayon::prelude::*;

use super::QMAX;
use crate::Tensor;
use crate::cpu::{par_elements, par_rows, simd};

/// The INT8 code of `x` under step size `s`, as f32: `clamp(round_half_even(x / s), -127, 127)`. NaN
/// gives 0, and zero is always +0. The division is a true one: multiplying by a reciprocal gives other codes
/// near ties.
#[inline(always)]
pub fn code(x: f32, s: f32) -> f32 {
    let v = x / s;
    // Comparisons with NaN are false: it ends as 0.
    let v = if v > -QMAX {
        v
    } else if v <= -QMAX {
        -QMAX
    } else {
        0.0
    };
    let v = if v < QMAX { v } else { QMAX };
    // Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds half to even, and the
    // difference of equals is +0. `round_ties_even` is a library call where the build's baseline has no rounding
    // instruction, and a call keeps the loops below from being vectorised: it took a third of a QAT step.
    const SHIFT: f32 = 12_582_912.0;
    (v + SHIFT) - SHIFT
}

/// The sum of squared differences of `x` to their grid points of step size `s`.
pub fn square_error(x: &[f32], s: f32) -> f64 {
    simd(|| {
        let mut lanes = [0.0f64; 16];
        let (chunks, tail) = x.as_chunks::<16>();
        let error = |x: f32| {
            let e = f64::from(x - code(x, s) * s);
            e * e
        };
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane += error(*x);
            }
        }
        lanes.iter().sum::<f64>() + tail.iter().map(|&x| error(x)).sum::<f64>()
    })
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
fn element(g: f32, x: f32, s: f32) -> (f32, f32) {
    let v = x / s;
    let inside = v.abs() <= QMAX;
    let c = code(x, s);
    (if inside { g } else { 0.0 }, g * if inside { c - v } else { c })
}

/// [`element`] over a block: writes `dx`, returns the sum of the shares. Sixteen running sums let it
/// vectorise and still have one fixed order.
#[inline(always)]
fn elements(g: &[f32], x: &[f32], s: f32, dx: &mut [f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let ((g, g_tail), (x, x_tail)) = (g.as_chunks::<16>(), x.as_chunks::<16>());
    let (d, d_tail) = dx.as_chunks_mut::<16>();
    for ((g, x), d) in g.iter().zip(x).zip(d) {
        for i in 0..16 {
            let (dx, share) = element(g[i], x[i], s);
            d[i] = dx;
            lanes[i] += share;
        }
    }
    let mut sum = lanes.iter().sum::<f32>();
    for ((g, x), d) in g_tail.iter().zip(x_tail).zip(d_tail) {
        let (dx, share) = element(*g, *x, s);
        *d = dx;
        sum += share;
    }
    sum
}

pub(super) fn backward(grad: &Tensor, x: &Tensor, s: f32, divisor: f32) -> (Tensor, Tensor) {
    const BLOCK: usize = 8192;
    let mut dx = Tensor::stale(x.shape());
    let blocks = grad.f32().par_chunks(BLOCK).zip(x.f32().par_chunks(BLOCK));
    let sums: Vec<f32> = blocks
        .zip(dx.f32_mut().par_chunks_mut(BLOCK))
        .map(|((g, x), dx)| simd(|| elements(g, x, s, dx)))
        .collect();
    (dx, Tensor::scalar(sums.iter().sum::<f32>() / divisor))
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

pub(super) fn weight_backward(grad: &Tensor, w: &Tensor, mask: &Tensor, scale: &Tensor) -> (Tensor, Tensor) {
    let (rows, width) = (w.rows(), w.width());
    let mut dw = Tensor::stale(w.shape());
    let mut ds = vec![0.0; rows];
    let (g, w, m, s) = (grad.f32(), w.f32(), mask.u8(), scale.f32());
    let n = (width as f32 * QMAX).sqrt();
    dw.f32_mut().par_chunks_exact_mut(width).zip(&mut ds).enumerate().for_each_init(
        || vec![0.0; width],
        |kept, (r, (row, ds))| {
            let range = r * width..(r + 1) * width;
            let (g, w, m) = (&g[range.clone()], &w[range.clone()], &m[range]);
            simd(|| {
                for ((k, w), m) in kept.iter_mut().zip(w).zip(m) {
                    *k = w * *m as f32;
                }
                *ds = elements(g, kept, s[r], row) / n;
                for (d, m) in row.iter_mut().zip(m) {
                    *d *= *m as f32;
                }
            });
        },
    );
    let ds = Tensor::from_f32(ds, &[rows]);
    (dw, ds)
}
