use crate::cuda::{Gpu, Grid, Source, source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = source!("add");

pub(super) fn add(gpu: Gpu, a: &Tensor, b: &Tensor) -> Tensor {
    let out = Tensor::stale_on(Device::Cuda(gpu), a.shape());
    let n = a.len();
    gpu.launch(
        &SOURCE,
        "add",
        Grid::elements(n),
        &[out.memory().into(), a.memory().into(), b.memory().into(), n.into()],
    );
    out
}

pub(super) fn accumulate(gpu: Gpu, sum: &mut Tensor, x: &Tensor) {
    let n = x.len();
    gpu.launch(
        &SOURCE,
        "accumulate",
        Grid::elements(n),
        &[sum.memory_mut().into(), x.memory().into(), n.into()],
    );
}
