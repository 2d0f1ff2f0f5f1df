use super::Activation;
use crate::Tensor;
use crate::cuda::{Gpu, Grid, Source, source};

pub(crate) static SOURCE: Source = source!("activation");

/// (forward kernel, backward kernel)
fn kernels(function: Activation) -> (&'static str, &'static str) {
    match function {
        Activation::Gelu => ("gelu", "gelu_backward"),
        Activation::GeluTanh => ("gelu_tanh", "gelu_tanh_backward"),
        Activation::Relu => ("relu", "relu_backward"),
        Activation::Silu => ("silu", "silu_backward"),
        Activation::Tanh => ("tanh_", "tanh_backward"),
    }
}

pub(super) fn forward(gpu: Gpu, x: &Tensor, function: Activation) -> Tensor {
    let out = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let n = x.len();
    let arguments = [out.memory().into(), x.memory().into(), n.into()];
    gpu.launch(SOURCE.of(x.dtype()), kernels(function).0, Grid::packs(n), &arguments);
    out
}

pub(super) fn backward(gpu: Gpu, grad: &Tensor, x: &Tensor, function: Activation) -> Tensor {
    let out = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let n = x.len();
    let arguments = [out.memory().into(), grad.memory().into(), x.memory().into(), n.into()];
    gpu.launch(SOURCE.of(x.dtype()), kernels(function).1, Grid::packs(n), &arguments);
    out
}
