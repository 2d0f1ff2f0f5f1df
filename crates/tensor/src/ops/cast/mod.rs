//! From one floating-point type to another: master weights to the type they are multiplied in.

mod cuda;

pub(crate) use cuda::SOURCE;

use crate::{DType, Device, Tape, Tensor, Var};

/// `x` as `element`: f32 or, on a GPU, bf16. The result's gradient may have either type; that of `x` has `x`'s.
pub fn cast(tape: &Tape, x: &Var, element: DType) -> Var {
    if x.value().dtype() == element {
        return x.clone();
    }
    let x2 = x.clone();
    tape.push(apply(x.value(), element), &[x], move |grad, grads| {
        grads.add(&x2, apply(grad, x2.value().dtype()));
    })
}

/// [`cast`] without a tape.
pub fn apply(x: &Tensor, element: DType) -> Tensor {
    match x.device() {
        _ if x.dtype() == element => x.clone(),
        Device::Cpu => panic!("a CPU computes in f32"),
        Device::Cuda(gpu) => cuda::apply(gpu, x, element),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{devices, noise};
    use super::super::weighted_sum::dot;
    use super::*;

    #[test]
    fn values_and_gradients_are_rounded_to_nearest_even_and_back() {
        let x = noise(&[3, 77], 1);
        for device in devices().into_iter().filter(|d| *d != Device::Cpu) {
            let tape = Tape::recording();
            let xv = tape.leaf(x.to(device));
            let half = cast(&tape, &xv, DType::Bf16);
            assert_eq!(half.value().to(Device::Cpu), x.to_bf16());
            let wide = cast(&tape, &half, DType::F32);
            let weights = noise(&[3, 77], 2);
            let loss = dot(&tape, &wide, &weights);
            assert_eq!(tape.backward(&loss).take(&xv).unwrap(), weights.to_bf16().to_f32());
        }
    }
}
