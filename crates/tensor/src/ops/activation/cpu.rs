use super::Activation;
use crate::Tensor;
use crate::cpu::{erf, exp, par_elements, sigmoid, simd, tanh};
use crate::ops::int8_linear::quantize;

/// sqrt(2 / pi).
const K: f32 = 0.797_884_6;

pub(super) fn forward(x: &Tensor, function: Activation) -> Tensor {
    let mut out = Tensor::stale(x.shape());
    let x = x.f32();
    par_elements(out.f32_mut(), |at, block| fill(block, &x[at..], function));
    out
}

/// Values of a block that [`quantized`] holds in the nearest cache.
const BLOCK: usize = 1024;

pub(super) fn quantized(x: &[f32], function: Activation, scale: f32, codes: &mut [i8]) {
    par_elements(codes, |at, block| {
        let mut values = [0.0; BLOCK];
        for (codes, x) in block.chunks_mut(BLOCK).zip(x[at..].chunks(BLOCK)) {
            let values = &mut values[..codes.len()];
            fill(values, x, function);
            quantize(values, scale, codes);
        }
    });
}

/// `function` of the first elements of `x`, as many as `out` has; on this thread.
fn fill(out: &mut [f32], x: &[f32], function: Activation) {
    match function {
        Activation::Gelu => map(out, x, |x| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))),
        Activation::GeluTanh => map(out, x, |x| 0.5 * x * (1.0 + tanh(K * (x + 0.044715 * x * x * x)))),
        Activation::Relu => map(out, x, |x| x.max(0.0)),
        Activation::Silu => map(out, x, |x| x * sigmoid(x)),
        Activation::Tanh => map(out, x, tanh),
    }
}

fn map(out: &mut [f32], x: &[f32], f: impl Fn(f32) -> f32) {
    simd(|| {
        for (o, x) in out.iter_mut().zip(x) {
            *o = f(*x);
        }
    })
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
