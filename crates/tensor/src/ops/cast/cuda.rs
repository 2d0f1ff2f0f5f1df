use crate::cuda::{Gpu, Grid, Source, source};
use crate::{DType, Tensor};

pub(crate) static SOURCE: Source = source!("cast");

pub(super) fn apply(gpu: Gpu, x: &Tensor, element: DType) -> Tensor {
    let out = Tensor::stale_of(gpu, element, x.shape());
    let n = x.len();
    let arguments = [out.memory().into(), x.memory().into(), n.into()];
    let kernel = if element == DType::F32 { "widen" } else { "narrow" };
    gpu.launch(SOURCE.of(DType::Bf16), kernel, Grid::packs(n), &arguments);
    out
}
