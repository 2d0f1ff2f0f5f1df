//! The gated feed-forward product `silu(gate) * up` (SwiGLU, Shazeer 2020, arXiv 2002.05202).

mod cpu;
mod cuda;

pub(crate) use cuda::SOURCE;

use crate::{Device, Tape, Tensor, Var};

/// `silu(gate) * up`, same shape.
pub fn gated_silu(tape: &Tape, gate: &Var, up: &Var) -> Var {
    let y = apply(gate.value(), up.value());
    let (g2, u2) = (gate.clone(), up.clone());
    tape.push(y, &[gate, up], move |grad, grads| {
        let (dgate, dup) = match grad.device() {
            Device::Cpu => cpu::backward(grad, g2.value(), u2.value()),
            Device::Cuda(gpu) => cuda::backward(gpu, grad, g2.value(), u2.value()),
        };
        grads.add(&g2, dgate);
        grads.add(&u2, dup);
    })
}

/// [`gated_silu`] without a tape.
pub fn apply(gate: &Tensor, up: &Tensor) -> Tensor {
    assert_eq!(gate.shape(), up.shape(), "gated_silu");
    match gate.device() {
        Device::Cpu => cpu::forward(gate, up),
        Device::Cuda(gpu) => cuda::forward(gpu, gate, up),
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
            |t, v| super::gated_silu(t, &v[0], &v[1]),
            |x| x[0].iter().zip(&x[1]).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect(),
        );
    }
}
