use crate::cuda::{Gpu, Grid, Source, source};
use crate::{DType, Tensor};

pub(crate) static SOURCE: Source = source!("masked");

pub(super) fn apply(gpu: Gpu, x: &Tensor, mask: &Tensor, element: DType) -> Tensor {
    let out = Tensor::stale_of(gpu, element, x.shape());
    let n = x.len();
    let arguments = [out.memory().into(), x.memory().into(), mask.memory().into(), n.into()];
    gpu.launch(SOURCE.of(element), "masked", Grid::packs(n), &arguments);
    out
}
