//! Linear maps of f16 activations and f16 weights by cuBLASLt, for the engine: models that are not INT8, and what INT8 is
//! compared to. For GPUs.

mod cuda;

#[cfg(test)]
pub(crate) use cuda::variants;

use super::activation::Activation;
use crate::{DType, Device, Tensor};

/// Writes `function(x weight^T + bias)` to `y`: `x` f16 `[rows, width]`, `weight` f16 `[outputs, width]`, `bias` f16
/// `[outputs]`, `y` f16 `[rows, outputs]`, all on one GPU. Sums are f32; the sum with the bias is rounded to f16 before the
/// function. Widths and outputs are multiples of 8, as cuBLASLt wants rows aligned. Nothing is allocated. Panics where
/// the shapes differ.
pub fn apply(x: &Tensor, weight: &Tensor, bias: &Tensor, function: Option<Activation>, y: &Tensor) {
    let (rows, width, outputs) = (x.rows(), x.width(), weight.rows());
    for t in [x, weight, bias, y] {
        assert_eq!(t.dtype(), DType::F16, "half linear of {x:?} by {weight:?}: {t:?}");
    }
    assert!(weight.width() == width && bias.len() == outputs, "half linear of {x:?} by {weight:?}, {bias:?}");
    assert!(width % 8 == 0 && outputs % 8 == 0, "half linear of {x:?} by {weight:?}: rows are not aligned");
    assert_eq!((y.rows(), y.width()), (rows, outputs), "half linear of {x:?} by {weight:?} into {y:?}");
    match x.device() {
        Device::Cpu => panic!("half linear: {x:?} is not on a GPU"),
        Device::Cuda(gpu) => cuda::apply(gpu, x, weight, bias, function, y),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{close, devices, noise};
    use super::*;
    use crate::ops::activation;

    #[test]
    fn products_match_f64() {
        for (rows, width, outputs, function) in [
            (1, 64, 8, None),
            (37, 384, 1536, Some(Activation::Gelu)),
            (130, 776, 24, Some(Activation::Relu)),
            (5, 8, 48, Some(Activation::GeluTanh)),
        ] {
            let small = |t: Tensor, by: f32| {
                Tensor::from_f32(t.f32().iter().map(|v| v * by).collect(), t.shape()).to_f16()
            };
            let x = small(noise(&[rows, width], 1), 1.0);
            let w = small(noise(&[outputs, width], 2), 0.1);
            let b = small(noise(&[outputs], 3), 1.0);
            let [xs, ws, bs] = [&x, &w, &b].map(Tensor::to_f32);
            let sums: Vec<f32> = (0..rows * outputs)
                .map(|i| {
                    let (r, o) = (i / outputs, i % outputs);
                    let row = xs.f32()[r * width..][..width].iter().zip(&ws.f32()[o * width..]);
                    (row.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>() + f64::from(bs.f32()[o]))
                        as f32
                })
                .collect();
            let sums = Tensor::from_f32(sums, &[rows, outputs]);
            let want = function.map_or(sums.clone(), |f| activation::apply(&sums, f));
            let want: Vec<f64> = want.f32().iter().map(|&v| f64::from(v)).collect();
            for gpu in devices().into_iter().filter(|d| *d != Device::Cpu) {
                let y = Tensor::from_f16(vec![crate::f16::NAN; rows * outputs], &[rows, outputs]).to(gpu);
                apply(&x.to(gpu), &w.to(gpu), &b.to(gpu), function, &y);
                let y = y.to(Device::Cpu).to_f32();
                close(&format!("{rows}x{width}x{outputs}"), y.f32(), &want, 2e-3);
                gpu.check().unwrap();
            }
        }
    }
}
