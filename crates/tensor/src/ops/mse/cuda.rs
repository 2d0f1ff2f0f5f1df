use crate::cuda::{Arg, Gpu, Grid, Source, source};
use crate::ops::cross_entropy::mean;
use crate::{Device, Flags, Tensor};

pub(crate) static SOURCE: Source = source!("mse");

/// Rows of a block: a warp each.
const ROWS: usize = 8;

pub(super) fn forward(gpu: Gpu, x: &Tensor, target: &Tensor, counts: Option<&Flags>, n: f32) -> Tensor {
    let sums = Tensor::stale_on(Device::Cuda(gpu), &[target.rows()]);
    let flags = counts.map(|c| c.on(gpu));
    gpu.launch(
        SOURCE.of(x.dtype()),
        "row_sums",
        Grid::blocks(target.rows().div_ceil(ROWS)),
        &[
            sums.memory().into(),
            x.memory().into(),
            target.memory().into(),
            flags.as_deref().map_or(Arg::Pointer(0), Arg::from),
            target.rows().into(),
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
    counts: Option<&Flags>,
    n: f32,
) -> Tensor {
    let dx = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let flags = counts.map(|c| c.on(gpu));
    gpu.launch(
        SOURCE.of(x.dtype()),
        "backward",
        Grid::blocks(target.rows().div_ceil(ROWS)),
        &[
            dx.memory().into(),
            grad.memory().into(),
            x.memory().into(),
            target.memory().into(),
            flags.as_deref().map_or(Arg::Pointer(0), Arg::from),
            n.into(),
            target.rows().into(),
            target.width().into(),
        ],
    );
    dx
}
