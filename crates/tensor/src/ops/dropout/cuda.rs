use super::Drop;
use crate::cuda::{Gpu, Grid, Source, source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = source!("dropout");

pub(super) fn apply(gpu: Gpu, x: &Tensor, drop: Drop) -> Tensor {
    let out = Tensor::stale_on(Device::Cuda(gpu), x.shape());
    let n = x.len();
    gpu.launch(
        &SOURCE,
        "dropout",
        Grid::elements(n),
        &[
            out.memory().into(),
            x.memory().into(),
            n.into(),
            drop.key.into(),
            drop.below.into(),
            drop.factor.into(),
        ],
    );
    out
}
