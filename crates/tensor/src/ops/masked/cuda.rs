use crate::cuda::{Gpu, Grid, Source, source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = source!("masked");

pub(super) fn apply(gpu: Gpu, x: &Tensor, mask: &Tensor) -> Tensor {
    let out = Tensor::stale_on(Device::Cuda(gpu), x.shape());
    let n = x.len();
    gpu.launch(
        &SOURCE,
        "masked",
        Grid::elements(n),
        &[out.memory().into(), x.memory().into(), mask.memory().into(), n.into()],
    );
    out
}
