use crate::cuda::{Arg, Gpu, Grid, Source, source};
use crate::ops::cross_entropy::mean;
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = source!("mse");

pub(super) fn forward(gpu: Gpu, x: &Tensor, target: &Tensor, counts: Option<&[bool]>, n: f32) -> Tensor {
    let sums = Tensor::stale_on(Device::Cuda(gpu), &[target.rows()]);
    let flags = gpu.upload_flags(counts);
    gpu.launch(
        &SOURCE,
        "row_sums",
        Grid::blocks(target.rows()),
        &[
            sums.memory().into(),
            x.memory().into(),
            target.memory().into(),
            flags.as_ref().map_or(Arg::Pointer(0), Arg::from),
            target.width().into(),
        ],
    );
    mean(gpu, &sums, n)
}

pub(super) fn backward(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    target: &Tensor,
    counts: Option<&[bool]>,
    n: f32,
) -> Tensor {
    let dx = Tensor::stale_on(Device::Cuda(gpu), x.shape());
    let flags = gpu.upload_flags(counts);
    gpu.launch(
        &SOURCE,
        "backward",
        Grid::blocks(target.rows()),
        &[
            dx.memory().into(),
            grad.memory().into(),
            x.memory().into(),
            target.memory().into(),
            flags.as_ref().map_or(Arg::Pointer(0), Arg::from),
            n.into(),
            target.width().into(),
        ],
    );
    dx
}
