use crate::cuda::reduce::{Sums, column_sums};
use crate::cuda::{Gpu, Grid, Source, source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = source!("rms_norm");

/// Rows of a block: a warp each.
const ROWS: usize = 8;

/// The output and 1 / root mean square of each row, `[rows]`.
pub(super) fn forward(gpu: Gpu, x: &Tensor, gain: &Tensor, eps: f32) -> (Tensor, Tensor) {
    let (rows, device) = (x.rows(), Device::Cuda(gpu));
    let (y, rstd) = (Tensor::stale_of(gpu, x.dtype(), x.shape()), Tensor::stale_on(device, &[rows]));
    gpu.launch(
        SOURCE.of(x.dtype()),
        "forward",
        Grid::blocks(rows.div_ceil(ROWS)),
        &[
            y.memory().into(),
            rstd.memory().into(),
            x.memory().into(),
            gain.memory().into(),
            rows.into(),
            x.width().into(),
            eps.into(),
        ],
    );
    (y, rstd)
}

pub(super) fn backward(gpu: Gpu, grad: &Tensor, x: &Tensor, rstd: &Tensor, gain: &Tensor) -> (Tensor, Sums) {
    let rows = x.rows();
    let [dx, normal] = [(); 2].map(|()| Tensor::stale_of(gpu, x.dtype(), x.shape()));
    gpu.launch(
        SOURCE.of(x.dtype()),
        "backward",
        Grid::blocks(rows.div_ceil(ROWS)),
        &[
            dx.memory().into(),
            normal.memory().into(),
            grad.memory().into(),
            x.memory().into(),
            rstd.memory().into(),
            gain.memory().into(),
            rows.into(),
            x.width().into(),
        ],
    );
    (dx, column_sums(gpu, grad, Some(&normal)).remove(1))
}
