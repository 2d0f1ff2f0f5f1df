use super::Activation;
use crate::cuda::reduce::{Strips, Sums};
use crate::cuda::{Arg, Gpu, Grid, Source, Variant};
use crate::{DType, Tensor};

/// The functions in CUDA, for sources that apply one to what they have in registers.
macro_rules! functions {
    () => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/ops/activation/functions.cuh"))
    };
}
pub(crate) use functions;

static SOURCE: Source = Source { name: "activation", text: concat!(functions!(), include_str!("kernel.cu")) };

/// The kernels of a function.
pub(crate) fn variant(function: Activation, element: DType) -> Variant {
    SOURCE.with(element, &[("FUNCTION", number(Some(function)))])
}

/// Every variant there is.
#[cfg(test)]
pub(crate) fn variants() -> Vec<Variant> {
    use Activation::*;
    let of = |function| [DType::F32, DType::Bf16].map(|element| variant(function, element));
    [Gelu, GeluTanh, Relu, Silu, Tanh].into_iter().flat_map(of).collect()
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
    gpu.launch(variant(function, x.dtype()), "forward", Grid::packs(n), &arguments);
    out
}

/// The input's gradient and its column sums.
pub(super) fn backward(gpu: Gpu, grad: &Tensor, x: &Tensor, function: Activation) -> (Tensor, Sums) {
    let dx = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let strips = Strips::of(gpu, x, 1);
    gpu.launch(
        variant(function, x.dtype()),
        if strips.packed { "backward_pack" } else { "backward_1" },
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
    (dx, strips.sums().remove(0))
}

/// The codes of the function's values, and if `bytes` also as i8. With a `pair`, `x` is rounded to that grid before.
pub(super) fn codes(
    gpu: Gpu,
    x: &Tensor,
    function: Activation,
    step: &Tensor,
    pair: Option<&Tensor>,
    bytes: bool,
) -> (Tensor, Option<Tensor>) {
    let out = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let small = bytes.then(|| Tensor::stale_of(gpu, DType::I8, x.shape()));
    let n = x.len();
    let at = |t: Option<&Tensor>| t.map_or(Arg::Pointer(0), |t| t.memory().into());
    let arguments = [
        out.memory().into(),
        at(small.as_ref()),
        x.memory().into(),
        step.memory().into(),
        at(pair),
        n.into(),
    ];
    gpu.launch(variant(function, x.dtype()), "codes", Grid::packs(n), &arguments);
    (out, small)
}

/// The input's gradient, its column sums, and the gradients of the step size and of the pair's.
pub(super) fn codes_backward(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    function: Activation,
    step: &Tensor,
    pair: Option<&Tensor>,
    divisor: f32,
) -> (Tensor, Sums, Sums, Option<Sums>) {
    let dx = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let strips = Strips::of(gpu, x, if pair.is_some() { 3 } else { 2 });
    gpu.launch(
        variant(function, x.dtype()),
        if strips.packed { "codes_backward_pack" } else { "codes_backward_1" },
        strips.grid,
        &[
            strips.parts.memory().into(),
            dx.memory().into(),
            grad.memory().into(),
            x.memory().into(),
            step.memory().into(),
            pair.map_or(Arg::Pointer(0), |p| p.memory().into()),
            x.rows().into(),
            x.width().into(),
            strips.per_part.into(),
        ],
    );
    let mut sums = strips.sums().into_iter();
    let of_x = sums.next().expect("at least two sums");
    let mut steps = sums.map(|shares| shares.total(divisor));
    (dx, of_x, steps.next().expect("at least two sums"), steps.next())
}
