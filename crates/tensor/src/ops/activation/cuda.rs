use super::Activation;
use crate::cuda::reduce::Strips;
use crate::cuda::{Arg, Gpu, Grid, Source};
use crate::ops::lsq;
use crate::{DType, Tensor};

/// The functions in CUDA, for sources that apply one to what they have in registers.
macro_rules! functions {
    () => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/ops/activation/functions.cuh"))
    };
}
pub(crate) use functions;

pub(crate) static SOURCE: Source =
    Source { name: "activation", text: concat!(functions!(), include_str!("kernel.cu")) };

/// The kernels of a function: forward, codes, and of both the backward pass by packs and by elements.
struct Kernels {
    forward: &'static str,
    codes: &'static str,
    backward: [&'static str; 2],
    of_codes: [&'static str; 2],
}

/// The kernels whose names begin with `name`.
macro_rules! kernels {
    ($name:literal) => {
        Kernels {
            forward: $name,
            codes: concat!($name, "_codes"),
            backward: [concat!($name, "_pack"), concat!($name, "_1")],
            of_codes: [concat!($name, "_pack_of_codes"), concat!($name, "_1_of_codes")],
        }
    };
}

fn kernels(function: Activation) -> Kernels {
    match function {
        Activation::Gelu => kernels!("gelu"),
        Activation::GeluTanh => kernels!("gelu_tanh"),
        Activation::Relu => kernels!("relu"),
        Activation::Silu => kernels!("silu"),
        Activation::Tanh => kernels!("tanh_"),
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
    gpu.launch(SOURCE.of(x.dtype()), kernels(function).forward, Grid::packs(n), &arguments);
    out
}

/// The input's gradient and its column sums.
pub(super) fn backward(gpu: Gpu, grad: &Tensor, x: &Tensor, function: Activation) -> (Tensor, Tensor) {
    let dx = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let strips = Strips::of(gpu, x, 1);
    gpu.launch(
        SOURCE.of(x.dtype()),
        kernels(function).backward[usize::from(!strips.packed)],
        strips.grid,
        &[
            strips.parts.memory().into(),
            dx.memory().into(),
            grad.memory().into(),
            x.memory().into(),
            x.rows().into(),
            x.width().into(),
            strips.per_part.into(),
        ],
    );
    (dx, strips.finish(gpu).remove(0))
}

/// The codes of the function's values, and if `bytes` also as i8.
pub(super) fn codes(
    gpu: Gpu,
    x: &Tensor,
    function: Activation,
    step: &Tensor,
    bytes: bool,
) -> (Tensor, Option<Tensor>) {
    let out = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let small = bytes.then(|| Tensor::stale_of(gpu, DType::I8, x.shape()));
    let n = x.len();
    let arguments = [
        out.memory().into(),
        small.as_ref().map_or(Arg::Pointer(0), |t| t.memory().into()),
        x.memory().into(),
        step.memory().into(),
        n.into(),
    ];
    gpu.launch(SOURCE.of(x.dtype()), kernels(function).codes, Grid::packs(n), &arguments);
    (out, small)
}

/// The input's gradient, its column sums, and the gradient of the step size.
pub(super) fn codes_backward(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    function: Activation,
    step: &Tensor,
    divisor: f32,
) -> (Tensor, Tensor, Tensor) {
    let dx = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let strips = Strips::of(gpu, x, 2);
    gpu.launch(
        SOURCE.of(x.dtype()),
        kernels(function).of_codes[usize::from(!strips.packed)],
        strips.grid,
        &[
            strips.parts.memory().into(),
            dx.memory().into(),
            grad.memory().into(),
            x.memory().into(),
            step.memory().into(),
            x.rows().into(),
            x.width().into(),
            strips.per_part.into(),
        ],
    );
    let [sums, shares] = strips.finish(gpu).try_into().expect("two sums");
    let ds = lsq::step_gradient(gpu, &shares, divisor);
    (dx, sums, ds)
}
