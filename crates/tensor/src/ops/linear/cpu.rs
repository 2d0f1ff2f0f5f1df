use crate::Tensor;
use crate::cpu::{Mat, Threads, column_sums, gemm, par_rows, simd};
use crate::ops::lsq::QMAX;

/// Integers up to this magnitude are exact in f32, and so are sums that never leave it.
pub(super) const EXACT: f32 = 16_777_216.0;

pub(super) fn output_shape(x: &Tensor, out: usize) -> Vec<usize> {
    let mut shape = x.shape().to_vec();
    *shape.last_mut().expect("linear input has a last dimension") = out;
    shape
}

pub(super) fn forward(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let (out, width) = (w.shape()[0], w.shape()[1]);
    let mut y = Tensor::stale(&output_shape(x, out));
    let size = (x.rows(), out, width);
    let data = y.f32_mut();
    if let Some(b) = bias {
        for row in data.chunks_exact_mut(out) {
            row.copy_from_slice(b.f32());
        }
    }
    let beta = if bias.is_some() { 1.0 } else { 0.0 };
    gemm(size, 1.0, Mat::rows(x.f32(), width), Mat::rows(w.f32(), width).t(), beta, data, out, Threads::All);
    y
}

/// Column ranges over which no partial sum of products can leave the integers f32 holds exactly.
fn exact_ranges(w: &[f32], width: usize) -> Vec<std::ops::Range<usize>> {
    let limit = EXACT / QMAX;
    let fits = |w: &[f32], range: &std::ops::Range<usize>| {
        simd(|| {
            w.chunks_exact(width).all(|row| row[range.clone()].iter().map(|x| x.abs()).sum::<f32>() <= limit)
        })
    };
    let all = 0..width;
    if fits(w, &all) {
        return vec![all];
    }
    let step = (limit / QMAX) as usize;
    (0..width).step_by(step).map(|from| from..width.min(from + step)).collect()
}

pub(super) fn forward_codes(x: &Tensor, w: &Tensor, sx: f32, sw: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let (out, width, tokens) = (w.shape()[0], w.shape()[1], x.rows());
    let mut y = Tensor::stale(&output_shape(x, out));
    let ranges = exact_ranges(w.f32(), width);
    let part = |range: &std::ops::Range<usize>, into: &mut [f32]| {
        let a = Mat::strided(&x.f32()[range.start..], width);
        let b = Mat::strided(&w.f32()[range.start..], width).t();
        gemm((tokens, out, range.len()), 1.0, a, b, 0.0, into, out, Threads::All);
    };
    part(&ranges[0], y.f32_mut());
    let mut rest: Vec<Tensor> = Vec::new();
    for range in &ranges[1..] {
        let mut t = Tensor::stale(&[tokens, out]);
        part(range, t.f32_mut());
        rest.push(t);
    }
    let scale: Vec<f32> = sw.f32().iter().map(|s| sx * s).collect();
    par_rows(y.f32_mut(), out, |first, block| {
        for (r, row) in block.chunks_exact_mut(out).enumerate() {
            if !rest.is_empty() {
                let at = (first + r) * out;
                for (o, y) in row.iter_mut().enumerate() {
                    let sum = *y as i32 + rest.iter().map(|p| p.f32()[at + o] as i32).sum::<i32>();
                    *y = sum as f32;
                }
            }
            simd(|| {
                // A sum of products may be -0, which is no integer: adding +0 makes it +0.
                for (y, s) in row.iter_mut().zip(&scale) {
                    *y = (*y + 0.0) * s;
                }
                if let Some(bias) = bias {
                    for (y, b) in row.iter_mut().zip(bias.f32()) {
                        *y += b;
                    }
                }
            });
        }
    });
    y
}

pub(super) fn scale_columns(grad: &Tensor, scale: &Tensor) -> Tensor {
    let mut g = Tensor::stale(grad.shape());
    let (width, src, scale) = (grad.width(), grad.f32(), scale.f32());
    par_rows(g.f32_mut(), width, |first, block| {
        simd(|| {
            for (r, row) in block.chunks_exact_mut(width).enumerate() {
                let src = &src[(first + r) * width..][..width];
                for ((g, x), s) in row.iter_mut().zip(src).zip(scale) {
                    *g = x * s;
                }
            }
        })
    });
    g
}

pub(super) fn input_gradient(grad: &Tensor, w: &Tensor, shape: &[usize]) -> Tensor {
    let (out, width) = (w.shape()[0], w.shape()[1]);
    let mut dx = Tensor::stale(shape);
    let size = (grad.rows(), width, out);
    gemm(
        size,
        1.0,
        Mat::rows(grad.f32(), out),
        Mat::rows(w.f32(), width),
        0.0,
        dx.f32_mut(),
        width,
        Threads::All,
    );
    dx
}

/// `sum += factor * grad^T x`.
pub(super) fn weight_gradient(grad: &Tensor, x: &Tensor, factor: f32, sum: &mut Tensor) {
    let (out, width) = (grad.width(), x.width());
    let size = (out, width, grad.rows());
    let (a, b) = (Mat::rows(grad.f32(), out).t(), Mat::rows(x.f32(), width));
    gemm(size, factor, a, b, 1.0, sum.f32_mut(), width, Threads::All);
}

pub(super) fn bias_gradient(grad: &Tensor) -> Tensor {
    let sums = column_sums(grad.f32(), grad.width());
    let n = sums.len();
    Tensor::from_f32(sums, &[n])
}
