use super::Drop;
use crate::Tensor;
use crate::cuda::{Gpu, Grid, Source, source};

pub(crate) static SOURCE: Source = source!("dropout");

pub(super) fn apply(gpu: Gpu, x: &Tensor, drop: Drop) -> Tensor {
    let out = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let n = x.len();
    gpu.launch(
        SOURCE.of(x.dtype()),
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
