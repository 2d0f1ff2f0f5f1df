//! Linear maps that stayed dense, from f16 activations and weights, for heads: a few outputs or a few rows. For GPUs.

mod cuda;

#[cfg(test)]
pub(crate) use cuda::variants;

use super::activation::Activation;
use crate::{DType, Device, Tensor};

/// `y = function(x weight^T + bias)`: `x` f16 `[rows, width]`, `weight` f16 `[outputs, width]`, `bias` f32 `[outputs]`,
/// `y` f32 or f16 `[rows, outputs]`. Sums are f32. Panics where the shapes differ.
pub fn apply(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, function: Option<Activation>, y: &Tensor) {
    let (rows, width, outputs) = (x.rows(), x.width(), weight.rows());
    assert_eq!((x.dtype(), weight.dtype()), (DType::F16, DType::F16), "dense linear of {x:?} by {weight:?}");
    assert_eq!(weight.width(), width, "dense linear of {x:?} by {weight:?}");
    assert!(
        bias.is_none_or(|b| b.dtype() == DType::F32 && b.len() == outputs),
        "dense linear: bias {bias:?}"
    );
    assert!(
        matches!(y.dtype(), DType::F16 | DType::F32) && y.shape() == [rows, outputs],
        "dense linear: into {y:?}"
    );
    match x.device() {
        Device::Cpu => panic!("dense linear: {x:?} is not on a GPU"),
        Device::Cuda(gpu) => cuda::apply(gpu, x, weight, bias, function, y),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{close, devices, noise};
    use super::*;

    #[test]
    fn products_match_f64() {
        for (rows, width, outputs, function) in [
            (1, 768, 768, Some(Activation::Tanh)),
            (37, 384, 2, None),
            (5, 101, 3, Some(Activation::Gelu)),
            (4, 8, 1, None),
        ] {
            let x = noise(&[rows, width], 1).to_f16();
            let w = Tensor::from_f32(
                noise(&[outputs, width], 2).f32().iter().map(|v| v * 0.1).collect(),
                &[outputs, width],
            )
            .to_f16();
            let b = noise(&[outputs], 3);
            let (xs, ws) = (x.to_f32(), w.to_f32());
            let sums: Vec<f32> = (0..rows * outputs)
                .map(|i| {
                    let (r, o) = (i / outputs, i % outputs);
                    let row = xs.f32()[r * width..][..width].iter().zip(&ws.f32()[o * width..]);
                    (row.map(|(&a, &b)| a as f64 * b as f64).sum::<f64>() + b.f32()[o] as f64) as f32
                })
                .collect();
            let sums = Tensor::from_f32(sums, &[rows, outputs]);
            let want = function.map_or(sums.clone(), |f| super::super::activation::apply(&sums, f));
            let want: Vec<f64> = want.f32().iter().map(|&v| v as f64).collect();
            for gpu in devices().into_iter().filter(|d| *d != Device::Cpu) {
                for (y, tolerance) in [
                    (Tensor::zeros(&[rows, outputs]), 1e-5),
                    (Tensor::zeros(&[rows, outputs]).to_f16(), 1e-3),
                ] {
                    let y = y.to(gpu);
                    apply(&x.to(gpu), &w.to(gpu), Some(&b.to(gpu)), function, &y);
                    close(
                        &format!("{rows}x{width}x{outputs}"),
                        y.to(Device::Cpu).to_f32().f32(),
                        &want,
                        tolerance,
                    );
                }
                gpu.check().unwrap();
            }
        }
    }
}
