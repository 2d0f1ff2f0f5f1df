use super::Activation;
use crate::Tensor;
use crate::cpu::{erf, exp, par_elements, sigmoid, simd, tanh};

/// sqrt(2 / pi).
const K: f32 = 0.797_884_6;

pub(super) fn forward(x: &Tensor, function: Activation) -> Tensor {
    match function {
        Activation::Gelu => map(x, |x| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))),
        Activation::GeluTanh => map(x, |x| 0.5 * x * (1.0 + tanh(K * (x + 0.044715 * x * x * x)))),
        Activation::Relu => map(x, |x| x.max(0.0)),
        Activation::Silu => map(x, |x| x * sigmoid(x)),
        Activation::Tanh => map(x, tanh),
    }
}

fn map(x: &Tensor, f: impl Fn(f32) -> f32 + Sync) -> Tensor {
    let mut out = Tensor::stale(x.shape());
    let x = x.f32();
    par_elements(out.f32_mut(), |at, block| {
        simd(|| {
            for (o, x) in block.iter_mut().zip(&x[at..]) {
                *o = f(*x);
            }
        })
    });
    out
}

pub(super) fn backward(grad: &Tensor, x: &Tensor, function: Activation) -> Tensor {
    match function {
        Activation::Gelu => zip(grad, x, |x| {
            // Phi(x) + x * phi(x), phi the normal density.
            let density = 0.398_942_3 * exp(-0.5 * x * x);
            0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * density
        }),
        Activation::GeluTanh => zip(grad, x, |x| {
            let t = tanh(K * (x + 0.044715 * x * x * x));
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * K * (1.0 + 3.0 * 0.044715 * x * x)
        }),
        Activation::Relu => zip(grad, x, |x| if x > 0.0 { 1.0 } else { 0.0 }),
        Activation::Silu => zip(grad, x, |x| {
            let s = sigmoid(x);
            s * (1.0 + x * (1.0 - s))
        }),
        Activation::Tanh => zip(grad, x, |x| {
            let t = tanh(x);
            1.0 - t * t
        }),
    }
}

fn zip(grad: &Tensor, x: &Tensor, slope: impl Fn(f32) -> f32 + Sync) -> Tensor {
    let mut out = Tensor::stale(x.shape());
    let (g, x) = (grad.f32(), x.f32());
    par_elements(out.f32_mut(), |at, block| {
        simd(|| {
            for ((o, g), x) in block.iter_mut().zip(&g[at..]).zip(&x[at..]) {
                *o = g * slope(*x);
            }
        })
    });
    out
}
