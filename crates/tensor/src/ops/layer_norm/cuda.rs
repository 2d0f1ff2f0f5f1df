use super::Saved;
use crate::cuda::reduce::{Strips, Sums};
use crate::cuda::{Arg, Gpu, Grid, Source, source};
use crate::{DType, Device, Tensor};

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
    half: bool,
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
            i32::from(half && x.dtype() == DType::F32).into(),
        ],
    );
    (y, saved)
}

/// The kernel for rows that a warp holds in its registers, of bf16.
fn held(grad: &Tensor) -> Option<&'static str> {
    let fits = grad.dtype() == DType::Bf16 && grad.width().is_multiple_of(8) && grad.rows() < 1 << 30;
    match grad.width().div_ceil(256) {
        1 | 2 if fits => Some("backward_held2"),
        3 if fits => Some("backward_held3"),
        4 if fits => Some("backward_held4"),
        _ => None,
    }
}

/// The input's gradient; those of gain and bias, and the column sums of the first.
pub(super) fn backward(gpu: Gpu, grad: &Tensor, saved: &Saved, gain: &Tensor) -> (Tensor, [Sums; 3]) {
    let (rows, width) = (grad.rows(), grad.width());
    let dx = Tensor::stale_of(gpu, grad.dtype(), grad.shape());
    if let Some(name) = held(grad) {
        // As many blocks as Hopper's GPUs have at a time, at most.
        let per_part = rows.div_ceil(256).next_multiple_of(8);
        let parts = rows.div_ceil(per_part);
        let sums = Tensor::stale_on(Device::Cuda(gpu), &[parts, 3 * width]);
        gpu.launch(
            SOURCE.of(grad.dtype()),
            name,
            Grid::blocks(parts),
            &[
                sums.memory().into(),
                dx.memory().into(),
                grad.memory().into(),
                saved.normal.memory().into(),
                saved.rstd.memory().into(),
                gain.memory().into(),
                (rows as i32).into(),
                (width as i32).into(),
                (per_part as i32).into(),
            ],
        );
        let [dbias, dgain, sums] = [0, 1, 2].map(|i| Sums::of(sums.clone()).range(i * width, width));
        return (dx, [dgain, dbias, sums]);
    }
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
