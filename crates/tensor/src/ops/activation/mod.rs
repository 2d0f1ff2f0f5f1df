//! Element-wise activation functions.

mod cpu;
mod cuda;

#[cfg(test)]
pub(crate) use cuda::variants;
pub(crate) use cuda::{functions, number, variant as kernels};

use super::lsq::{self, Quantized};
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
    tape.push(y, &[x], move |grad, grads| match grad.device() {
        Device::Cpu => grads.add(&x2, cpu::backward(grad, x2.value(), function)),
        Device::Cuda(gpu) => {
            let (dx, sums) = cuda::backward(gpu, grad, x2.value(), function);
            grads.add_with_sums(&x2, dx, sums);
        }
    })
}

/// The INT8 codes of `function(x)` under one positive step size `scale` `[1]`, as [`lsq::quantize_activation`] makes them of
/// [`activation`]'s result. With a `pair`, of `function` of `x` fake-quantised by that step size. On a GPU in one pass.
pub fn quantized(tape: &Tape, x: &Var, function: Activation, scale: &Var, pair: Option<&Var>) -> Quantized {
    let value = x.value();
    let device = value.device();
    let Device::Cuda(gpu) = device else {
        let x = pair.map_or(x.clone(), |pair| lsq::fake_quantize(tape, x, pair));
        return lsq::quantize_activation(tape, &activation(tape, &x, function), scale);
    };
    let bytes = lsq::takes_bytes(device, value.dtype(), value.width());
    let (codes, bytes) = cuda::codes(gpu, value, function, scale.value(), pair.map(Var::value), bytes);
    let inputs: Vec<&Var> = [x, scale].into_iter().chain(pair).collect();
    let (x2, s2, p2, divisor) = (x.clone(), scale.clone(), pair.cloned(), lsq::divisor(tape, value.len()));
    let codes = tape.push(codes, &inputs, move |grad, grads| {
        let pair = p2.as_ref().map(Var::value);
        let (dx, sums, ds, dp) =
            cuda::codes_backward(gpu, grad, x2.value(), function, s2.value(), pair, divisor);
        grads.add_sums(&s2, ds);
        if let (Some(pair), Some(dp)) = (&p2, dp) {
            grads.add_sums(pair, dp);
        }
        grads.add_with_sums(&x2, dx, sums);
    });
    Quantized::with_bytes(codes, scale.value().clone(), bytes)
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
    use super::super::check::{check_both, close, devices, noise};
    use super::super::weighted_sum::dot;
    use super::*;
    use crate::DType;

    fn erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..100 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    /// Codes and gradients are those of the operations one after the other, by packs and by elements, with the output
    /// pair of the map before and without.
    #[test]
    fn quantized_is_what_its_parts_are() {
        let functions =
            [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Silu, Activation::Tanh];
        let cases = functions
            .iter()
            .flat_map(|f| [(f, 48, None), (f, 37, None), (f, 48, Some(0.013)), (f, 37, Some(0.013))]);
        for device in devices() {
            let types = if device == Device::Cpu { vec![DType::F32] } else { vec![DType::F32, DType::Bf16] };
            for ((function, width, pair), dtype) in
                cases.clone().flat_map(|c| types.iter().map(move |t| (c, *t)))
            {
                let x = noise(&[300, width], 1);
                let x = if dtype == DType::Bf16 { x.to_bf16() } else { x };
                let weights = noise(&[300, width], 2).to_bf16().to_f32();
                let run = |together: bool| {
                    let tape = Tape::recording();
                    let leaf = |t: &Tensor| tape.leaf(t.to(device));
                    // Some values are beyond the range of either step size.
                    let (x, s) = (leaf(&x), leaf(&Tensor::scalar(0.008)));
                    let pair = pair.map(|p| leaf(&Tensor::scalar(p * 0.8)));
                    let q = if together {
                        quantized(&tape, &x, *function, &s, pair.as_ref())
                    } else {
                        let x = pair.as_ref().map_or(x.clone(), |p| lsq::fake_quantize(&tape, &x, p));
                        lsq::quantize_activation(&tape, &activation(&tape, &x, *function), &s)
                    };
                    let loss = dot(&tape, &q.codes, &weights);
                    let mut grads = tape.backward(&loss);
                    let leaves = [&x, &s].into_iter().chain(&pair).map(|v| grads.take(v).unwrap());
                    let all: Vec<Tensor> = [q.codes.value().clone()].into_iter().chain(leaves).collect();
                    all.iter().map(|t| t.to(Device::Cpu).to_f32()).collect::<Vec<_>>()
                };
                let (one, parts) = (run(true), run(false));
                let at = format!("{device:?}, {function:?}, {dtype:?}, width {width}, {pair:?}");
                assert!(one[0] == parts[0], "{at}: codes");
                for (got, want) in one[1..].iter().zip(&parts[1..]) {
                    let want: Vec<f64> = want.f32().iter().map(|&x| x as f64).collect();
                    close(&at, got.f32(), &want, 1e-5);
                }
                device.check().unwrap();
            }
        }
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
