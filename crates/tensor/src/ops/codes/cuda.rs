use super::Codes;
use crate::Tensor;
use crate::cuda::{Gpu, Grid, Source, Variant};
use crate::ops::activation::{self, Activation};

static SOURCE: Source =
    Source { name: "codes", text: concat!(activation::functions!(), include_str!("kernel.cu")) };

fn variant(function: Option<Activation>) -> Variant {
    SOURCE.with(crate::DType::F32, &[("FUNCTION", activation::number(function))])
}

/// For the test that compiles every kernel.
#[cfg(test)]
pub(crate) fn variants() -> Vec<Variant> {
    use Activation::*;
    [None, Some(Gelu), Some(GeluTanh), Some(Relu), Some(Silu), Some(Tanh)].map(variant).into()
}

pub(super) fn quantize(gpu: Gpu, x: &Tensor, function: Option<Activation>, codes: Codes) {
    let n = x.len();
    let arguments = [codes.to.memory().into(), x.memory().into(), codes.step.into(), n.into()];
    gpu.launch_early(variant(function), "quantize", Grid::elements(n.div_ceil(8)), &arguments);
}
