use super::Activation;
use crate::Tensor;
use crate::cuda::{Gpu, Grid, Source};

/// The functions in CUDA, for sources that apply one to what they have in registers.
macro_rules! functions {
    () => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/ops/activation/functions.cuh"))
    };
}
pub(crate) use functions;

pub(crate) static SOURCE: Source =
    Source { name: "activation", text: concat!(functions!(), include_str!("kernel.cu")) };

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

/// The function for sources that have it as a constant: `Numbered` in `functions.cuh`.
pub(crate) fn number(function: Option<Activation>) -> usize {
    match function {
        None => 0,
        Some(Activation::Gelu) => 1,
        Some(Activation::GeluTanh) => 2,
        Some(Activation::Relu) => 3,
        Some(Activation::Silu) => 4,
        Some(Activation::Tanh) => 5,
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
