use crate::Tensor;
use crate::cpu::{fold_rows, par_rows, simd};

/// Sum of squares over counted rows.
pub(super) fn forward(x: &Tensor, target: &Tensor, counts: Option<&[bool]>) -> f32 {
    let width = x.width();
    let (x, y) = (x.f32(), target.f32());
    // One sum per column: it vectorises, and errors do not pile up in one accumulator.
    let sums = fold_rows(target.rows(), width, |range, sum| {
        for r in range.filter(|&r| counts.is_none_or(|c| c[r])) {
            let (x, y) = (&x[r * width..][..width], &y[r * width..][..width]);
            for ((s, x), y) in sum.iter_mut().zip(x).zip(y) {
                *s += (x - y) * (x - y);
            }
        }
    });
    sums.iter().map(|&s| s as f64).sum::<f64>() as f32
}

pub(super) fn backward(factor: f32, x: &Tensor, target: &Tensor, counts: Option<&[bool]>) -> Tensor {
    let width = x.width();
    let mut dx = Tensor::stale(x.shape());
    let (x, y) = (x.f32(), target.f32());
    par_rows(dx.f32_mut(), width, |first, block| {
        simd(|| {
            for (k, d) in block.chunks_exact_mut(width).enumerate() {
                let r = first + k;
                let f = if counts.is_none_or(|c| c[r]) { factor } else { 0.0 };
                for ((d, x), y) in d.iter_mut().zip(&x[r * width..]).zip(&y[r * width..]) {
                    *d = f * (x - y);
                }
            }
        })
    });
    dx
}
