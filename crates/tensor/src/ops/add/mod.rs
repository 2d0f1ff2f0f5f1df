//! Element-wise sum of two tensors of one shape (the residual connection).

mod cpu;
mod cuda;

pub(crate) use cuda::SOURCE;

use crate::{Device, Tape, Tensor, Var};

/// `a + b`, same shape.
pub fn add(tape: &Tape, a: &Var, b: &Var) -> Var {
    let out = apply(a.value(), b.value());
    let (a2, b2) = (a.clone(), b.clone());
    tape.push(out, &[a, b], move |grad, grads| {
        grads.add(&a2, grad.clone());
        grads.add(&b2, grad.clone());
    })
}

/// [`add`] without a tape.
pub fn apply(a: &Tensor, b: &Tensor) -> Tensor {
    assert_eq!(a.shape(), b.shape(), "add");
    match a.device() {
        Device::Cpu => cpu::add(a, b),
        Device::Cuda(gpu) => cuda::add(gpu, a, b),
    }
}

/// `sum += x`, the accumulation of gradients.
pub fn accumulate(sum: &mut Tensor, x: &Tensor) {
    match x.device() {
        Device::Cpu => cpu::accumulate(sum, x),
        Device::Cuda(gpu) => cuda::accumulate(gpu, sum, x),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{check_both, noise};

    #[test]
    fn matches_reference() {
        check_both(
            &[noise(&[3, 5], 1), noise(&[3, 5], 2)],
            &[0, 1],
            |t, v| super::add(t, &v[0], &v[1]),
            |x| x[0].iter().zip(&x[1]).map(|(a, b)| a + b).collect(),
        );
    }

    #[test]
    fn one_input_twice_gets_both_gradients() {
        check_both(
            &[noise(&[4], 1)],
            &[0],
            |t, v| super::add(t, &v[0], &v[0]),
            |x| x[0].iter().map(|a| 2.0 * a).collect(),
        );
    }
}
