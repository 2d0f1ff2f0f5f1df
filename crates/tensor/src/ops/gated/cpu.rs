use crate::Tensor;
use crate::cpu::{par_elements, sigmoid, simd};

pub(super) fn forward(gate: &Tensor, up: &Tensor) -> Tensor {
    let mut out = Tensor::stale(gate.shape());
    let (g, u) = (gate.f32(), up.f32());
    par_elements(out.f32_mut(), |at, block| {
        simd(|| {
            for ((o, g), u) in block.iter_mut().zip(&g[at..]).zip(&u[at..]) {
                *o = g * sigmoid(*g) * u;
            }
        })
    });
    out
}

pub(super) fn backward(grad: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    let (mut dgate, mut dup) = (Tensor::stale(gate.shape()), Tensor::stale(up.shape()));
    let (d, g, u) = (grad.f32(), gate.f32(), up.f32());
    par_elements(dgate.f32_mut(), |at, block| {
        simd(|| {
            for (i, o) in block.iter_mut().enumerate() {
                let x = g[at + i];
                let s = sigmoid(x);
                *o = d[at + i] * u[at + i] * s * (1.0 + x * (1.0 - s));
            }
        })
    });
    par_elements(dup.f32_mut(), |at, block| {
        simd(|| {
            for (i, o) in block.iter_mut().enumerate() {
                let x = g[at + i];
                *o = d[at + i] * x * sigmoid(x);
            }
        })
    });
    (dgate, dup)
}
