use super::Saved;
use crate::cuda::reduce::{Strips, Sums};
use crate::cuda::{Arg, Gpu, Grid, Source, source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = source!("layer_norm");

/// Rows of a block: a warp each.
const ROWS: usize = 8;

pub(super) fn forward(
    gpu: Gpu,
    x: &Tensor,
    residual: Option<&Tensor>,
    gain: &Tensor,
    bias: &Tensor,
    eps: f32,
    keep: bool,
) -> (Tensor, Option<Saved>) {
    let (rows, width, device) = (x.rows(), x.width(), Device::Cuda(gpu));
    let y = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let saved = keep.then(|| Saved {
        normal: Tensor::stale_of(gpu, x.dtype(), x.shape()),
        rstd: Tensor::stale_on(device, &[rows]),
    });
    let absent = Arg::Pointer(0);
    gpu.launch(
        SOURCE.of(x.dtype()),
        "forward",
        Grid::blocks(rows.div_ceil(ROWS)),
        &[
            y.memory().into(),
            saved.as_ref().map_or(absent, |s| s.normal.memory().into()),
            saved.as_ref().map_or(absent, |s| s.rstd.memory().into()),
            x.memory().into(),
            residual.map_or(absent, |r| r.memory().into()),
            gain.memory().into(),
            bias.memory().into(),
            rows.into(),
            width.into(),
            eps.into(),
        ],
    );
    (y, saved)
}

/// The input's gradient; those of gain and bias, and the column sums of the first.
pub(super) fn backward(gpu: Gpu, grad: &Tensor, saved: &Saved, gain: &Tensor) -> (Tensor, [Sums; 3]) {
    let (rows, width) = (grad.rows(), grad.width());
    let dx = Tensor::stale_of(gpu, grad.dtype(), grad.shape());
    let means = Tensor::stale_on(Device::Cuda(gpu), &[rows, 2]);
    gpu.launch(
        SOURCE.of(grad.dtype()),
        "backward_means",
        Grid::blocks(rows.div_ceil(ROWS)),
        &[
            means.memory().into(),
            grad.memory().into(),
            saved.normal.memory().into(),
            gain.memory().into(),
            rows.into(),
            width.into(),
        ],
    );
    let strips = Strips::of(gpu, grad, 3);
    gpu.launch(
        SOURCE.of(grad.dtype()),
        if strips.packed { "backward_pack" } else { "backward_1" },
        strips.grid,
        &[
            strips.parts.memory().into(),
            dx.memory().into(),
            grad.memory().into(),
            saved.normal.memory().into(),
            saved.rstd.memory().into(),
            means.memory().into(),
            gain.memory().into(),
            rows.into(),
            width.into(),
            strips.per_part.into(),
        ],
    );
    let [dbias, dgain, sums] = strips.sums().try_into().expect("three sums");
    (dx, [dgain, dbias, sums])
}
