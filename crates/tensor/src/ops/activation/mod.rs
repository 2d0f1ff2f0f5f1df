//! Element-wise activation functions.

mod cpu;
mod cuda;

#[cfg(test)]
pub(crate) use cuda::SOURCE;
pub(crate) use cuda::{functions, number};

use crate::{Device, Tape, Tensor, Var};

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * Phi(x)` with the normal distribution's exact Phi (Hendrycks and Gimpel 2016).
    Gelu,
    /// GELU by its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `x * sigmoid(x)`.
    Silu,
    /// Hyperbolic tangent.
    Tanh,
}

/// `function(x)`, element by element.
pub fn activation(tape: &Tape, x: &Var, function: Activation) -> Var {
    let y = apply(x.value(), function);
    let x2 = x.clone();
    tape.push(y, &[x], move |grad, grads| {
        let dx = match grad.device() {
            Device::Cpu => cpu::backward(grad, x2.value(), function),
            Device::Cuda(gpu) => cuda::backward(gpu, grad, x2.value(), function),
        };
        grads.add(&x2, dx);
    })
}

/// `function(x)` without a tape.
pub fn apply(x: &Tensor, function: Activation) -> Tensor {
    match x.device() {
        Device::Cpu => cpu::forward(x, function),
        Device::Cuda(gpu) => cuda::forward(gpu, x, function),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{check_both, noise};
    use super::*;

    fn erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..100 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn each_function_matches_its_definition() {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let k = (2.0 / std::f64::consts::PI).sqrt();
        let cases: [(Activation, &dyn Fn(f64) -> f64); 5] = [
            (Activation::Gelu, &|x| 0.5 * x * (1.0 + erf(x / 2f64.sqrt()))),
            (Activation::GeluTanh, &|x| 0.5 * x * (1.0 + (k * (x + 0.044715 * x.powi(3))).tanh())),
            (Activation::Relu, &|x| x.max(0.0)),
            (Activation::Silu, &|x| x * sigmoid(x)),
            (Activation::Tanh, &|x| x.tanh()),
        ];
        for (function, f) in cases {
            check_both(
                &[noise(&[3, 40], 1)],
                &[0],
                |t, v| activation(t, &v[0], function),
                |x| x[0].iter().map(|&x| f(x)).collect(),
            );
        }
    }
}
