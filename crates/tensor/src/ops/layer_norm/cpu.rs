use rayon::prelude::*;

use super::Saved;
use crate::Tensor;
use crate::cpu::{fold_rows, half as to_half, simd};

/// Sum in sixteen lanes: vectorises, and is more accurate than one running sum.
#[inline(always)]
pub(crate) fn lane_sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let chunks = x.chunks_exact(16);
    let tail: f32 = chunks.remainder().iter().map(|&v| f(v)).sum();
    for c in chunks {
        for i in 0..16 {
            lanes[i] += f(c[i]);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// Sum of a row in an order that a GPU's warp can take: of each eighth of 256 columns, over all 256s; of eight such in
/// pairs; of the 32 that are left in halves (`norm_codes/kernel.cu`).
#[inline(always)]
fn row_sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut columns = [0.0f32; 256];
    for chunk in x.chunks(256) {
        for (c, x) in columns.iter_mut().zip(chunk) {
            *c += f(*x);
        }
    }
    let mut lanes = [0.0f32; 32];
    for (l, c) in lanes.iter_mut().zip(columns.chunks_exact(8)) {
        *l = ((c[0] + c[1]) + (c[2] + c[3])) + ((c[4] + c[5]) + (c[6] + c[7]));
    }
    for half in [16, 8, 4, 2, 1] {
        let (low, high) = lanes.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(l, h)| *l += *h);
    }
    lanes[0]
}

pub(super) fn forward(
    x: &Tensor,
    residual: Option<&Tensor>,
    gain: &Tensor,
    bias: &Tensor,
    eps: f32,
    half: bool,
    keep: bool,
) -> (Tensor, Option<Saved>) {
    let (rows, width) = (x.rows(), x.width());
    let mut y = Tensor::stale(x.shape());
    let mut rstd = vec![0.0; rows];
    let mut normal = keep.then(|| Tensor::stale(x.shape()));
    let (xs, rs) = (x.f32(), residual.map(Tensor::f32));
    let (gain, bias) = (gain.f32(), bias.f32());
    let block = (8192 / width).max(1);
    let inverse = 1.0 / width as f32;
    let row = |r: usize, y: &mut [f32], normal: Option<&mut [f32]>| -> f32 {
        let x = &xs[r * width..(r + 1) * width];
        match rs {
            Some(rs) if half => {
                for ((y, x), r) in y.iter_mut().zip(x).zip(&rs[r * width..]) {
                    *y = to_half(*x) + to_half(*r);
                }
            }
            None if half => y.iter_mut().zip(x).for_each(|(y, x)| *y = to_half(*x)),
            Some(rs) => {
                for ((y, x), r) in y.iter_mut().zip(x).zip(&rs[r * width..]) {
                    *y = x + r;
                }
            }
            None => y.copy_from_slice(x),
        }
        let mean = row_sum(y, |v| v) * inverse;
        let var = row_sum(y, |v| (v - mean) * (v - mean)) * inverse;
        let rstd = 1.0 / (var + eps).sqrt();
        for v in y.iter_mut() {
            *v = (*v - mean) * rstd;
        }
        if let Some(n) = normal {
            n.copy_from_slice(y);
        }
        for ((y, g), b) in y.iter_mut().zip(gain).zip(bias) {
            *y = *y * g + b;
        }
        rstd
    };
    let ys = y.f32_mut().par_chunks_mut(block * width).zip(rstd.par_chunks_mut(block)).enumerate();
    match &mut normal {
        Some(n) => ys.zip(n.f32_mut().par_chunks_mut(block * width)).for_each(|((i, (y, s)), n)| {
            simd(|| {
                for (k, (y, n)) in y.chunks_mut(width).zip(n.chunks_mut(width)).enumerate() {
                    s[k] = row(i * block + k, y, Some(n));
                }
            })
        }),
        None => ys.for_each(|(i, (y, s))| {
            simd(|| {
                for (k, y) in y.chunks_mut(width).enumerate() {
                    s[k] = row(i * block + k, y, None);
                }
            })
        }),
    }
    (y, normal.map(|normal| Saved { normal, rstd: Tensor::from_f32(rstd, &[rows]) }))
}

pub(super) fn backward(grad: &Tensor, saved: &Saved, gain: &Tensor) -> (Tensor, Tensor, Tensor) {
    let width = grad.width();
    let mut dx = Tensor::stale(grad.shape());
    let (g, n, gain) = (grad.f32(), saved.normal.f32(), gain.f32());
    let block = (8192 / width).max(1);
    dx.f32_mut().par_chunks_mut(block * width).enumerate().for_each(|(i, dx)| {
        simd(|| {
            for (k, dx) in dx.chunks_mut(width).enumerate() {
                let r = i * block + k;
                let (g, n) = (&g[r * width..(r + 1) * width], &n[r * width..(r + 1) * width]);
                for ((d, g), w) in dx.iter_mut().zip(g).zip(gain) {
                    *d = g * w;
                }
                let mean = lane_sum(dx, |v| v) / width as f32;
                let mut lanes = [0.0f32; 16];
                for (d, n) in dx.chunks(16).zip(n.chunks(16)) {
                    for i in 0..d.len() {
                        lanes[i] += d[i] * n[i];
                    }
                }
                let along = lanes.iter().sum::<f32>() / width as f32;
                let rstd = saved.rstd.f32()[r];
                for (d, n) in dx.iter_mut().zip(n) {
                    *d = rstd * (*d - mean - n * along);
                }
            }
        })
    });
    let rows = grad.rows();
    let sums = fold_rows(rows, 2 * width, |range, sum| {
        let (dgain, dbias) = sum.split_at_mut(width);
        for r in range {
            let (g, n) = (&g[r * width..(r + 1) * width], &n[r * width..(r + 1) * width]);
            for i in 0..width {
                dgain[i] += g[i] * n[i];
                dbias[i] += g[i];
            }
        }
    });
    let dgain = Tensor::from_f32(sums[..width].to_vec(), &[width]);
    (dx, dgain, Tensor::from_f32(sums[width..].to_vec(), &[width]))
}
