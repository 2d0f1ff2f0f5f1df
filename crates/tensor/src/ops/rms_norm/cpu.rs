use crate::Tensor;
use crate::cpu::{fold_rows, par_rows, simd};
use crate::ops::layer_norm::lane_sum;

pub(super) fn forward(x: &Tensor, gain: &Tensor, eps: f32) -> (Tensor, Tensor) {
    let width = x.width();
    let mut y = Tensor::stale(x.shape());
    let rstd: Vec<f32> = x
        .f32()
        .chunks_exact(width)
        .map(|row| 1.0 / (simd(|| lane_sum(row, |v| v * v)) / width as f32 + eps).sqrt())
        .collect();
    let (x, gain) = (x.f32(), gain.f32());
    par_rows(y.f32_mut(), width, |first, block| {
        simd(|| {
            for (k, y) in block.chunks_exact_mut(width).enumerate() {
                let r = first + k;
                for ((y, x), g) in y.iter_mut().zip(&x[r * width..]).zip(gain) {
                    *y = x * rstd[r] * g;
                }
            }
        })
    });
    let rows = rstd.len();
    (y, Tensor::from_f32(rstd, &[rows]))
}

pub(super) fn backward(grad: &Tensor, x: &Tensor, rstd: &[f32], gain: &Tensor) -> (Tensor, Tensor) {
    let (rows, width) = (x.rows(), x.width());
    let mut dx = Tensor::stale(x.shape());
    let (g, x, gain) = (grad.f32(), x.f32(), gain.f32());
    par_rows(dx.f32_mut(), width, |first, block| {
        simd(|| {
            for (k, dx) in block.chunks_exact_mut(width).enumerate() {
                let r = first + k;
                let (g, x, s) = (&g[r * width..(r + 1) * width], &x[r * width..(r + 1) * width], rstd[r]);
                let mut along = 0.0;
                for i in 0..width {
                    dx[i] = g[i] * gain[i];
                    along += dx[i] * x[i];
                }
                let along = along * s * s / width as f32;
                for (d, x) in dx.iter_mut().zip(x) {
                    *d = s * (*d - x * along);
                }
            }
        })
    });
    let dgain = fold_rows(rows, width, |range, sum| {
        for r in range {
            for i in 0..width {
                sum[i] += g[r * width + i] * x[r * width + i] * rstd[r];
            }
        }
    });
    (dx, Tensor::from_f32(dgain, &[width]))
}
