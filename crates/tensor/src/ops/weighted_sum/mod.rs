//! Sums of scalars with constant weights: how loss terms become one loss.

mod cuda;

pub(crate) use cuda::SOURCE;

use crate::{Device, Tape, Tensor, Var};

/// `sum_i weight_i * term_i` of one-element terms on one device, shape `[1]`. Nothing waits for a GPU.
pub fn weighted_sum(tape: &Tape, terms: &[(f32, Var)]) -> Var {
    assert!(terms.iter().all(|(_, t)| t.value().len() == 1), "weighted_sum of terms that are not scalars");
    let value = match terms.first().map_or(Device::Cpu, |(_, t)| t.value().device()) {
        Device::Cpu => Tensor::scalar(terms.iter().map(|(w, t)| w * t.value().item()).sum()),
        Device::Cuda(gpu) => cuda::forward(gpu, terms),
    };
    let inputs: Vec<&Var> = terms.iter().map(|(_, t)| t).collect();
    let kept = terms.to_vec();
    tape.push(value, &inputs, move |grad, grads| {
        for (w, t) in kept.iter().filter(|(_, t)| t.tracked()) {
            let dt = match grad.device() {
                Device::Cpu => Tensor::full(t.shape(), w * grad.item()),
                Device::Cuda(gpu) => cuda::scale(gpu, grad, *w, t.shape()),
            };
            grads.add(t, dt);
        }
    })
}

/// `sum_i x_i * weight_i` with constant weights: makes a scalar of an output so that it can be differentiated.
#[cfg(test)]
pub(crate) fn dot(tape: &Tape, x: &Var, weights: &Tensor) -> Var {
    let device = x.value().device();
    let value = x.value().to(Device::Cpu).to_f32().f32().iter().zip(weights.f32()).map(|(a, b)| a * b).sum();
    let (x2, weights) = (x.clone(), weights.clone());
    tape.push(Tensor::scalar(value).to(device), &[x], move |grad, grads| {
        let grad = grad.item();
        let g = Tensor::from_f32(weights.f32().iter().map(|w| w * grad).collect(), x2.shape());
        let g = if x2.value().dtype() == crate::DType::Bf16 { g.to_bf16() } else { g };
        grads.add(&x2, g.to(device));
    })
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, noise};

    #[test]
    fn matches_reference() {
        check(
            &[noise(&[1], 1), noise(&[1], 2)],
            |t, v| super::weighted_sum(t, &[(2.0, v[0].clone()), (-0.5, v[1].clone())]),
            |x| vec![2.0 * x[0][0] - 0.5 * x[1][0]],
        );
    }
}
