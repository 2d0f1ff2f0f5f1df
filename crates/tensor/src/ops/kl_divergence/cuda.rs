use super::rows_counted;
use crate::cuda::{Arg, Gpu, Grid, Source, source};
use crate::ops::cross_entropy::mean;
use crate::{Device, Flags, Tensor};

pub(crate) static SOURCE: Source = source!("kl_divergence");

pub(super) fn forward(
    gpu: Gpu,
    student: &Tensor,
    teacher: &Tensor,
    t: f32,
    counts: Option<&Flags>,
) -> Tensor {
    let losses = Tensor::stale_on(Device::Cuda(gpu), &[teacher.rows()]);
    let flags = counts.map(|c| c.on(gpu));
    gpu.launch(
        &SOURCE,
        "row_losses",
        Grid::blocks(teacher.rows()),
        &[
            losses.memory().into(),
            student.memory().into(),
            teacher.memory().into(),
            flags.as_deref().map_or(Arg::Pointer(0), Arg::from),
            (1.0 / t).into(),
            teacher.width().into(),
        ],
    );
    mean(gpu, &losses, rows_counted(counts.map(|c| &**c), teacher.rows()))
}

pub(super) fn backward(
    gpu: Gpu,
    grad: &Tensor,
    student: &Tensor,
    teacher: &Tensor,
    t: f32,
    counts: Option<&Flags>,
) -> Tensor {
    let dx = Tensor::stale_on(Device::Cuda(gpu), student.shape());
    let flags = counts.map(|c| c.on(gpu));
    gpu.launch(
        &SOURCE,
        "backward",
        Grid::blocks(teacher.rows()),
        &[
            dx.memory().into(),
            grad.memory().into(),
            student.memory().into(),
            teacher.memory().into(),
            flags.as_deref().map_or(Arg::Pointer(0), Arg::from),
            (1.0 / t).into(),
            (t * rows_counted(counts.map(|c| &**c), teacher.rows())).into(),
            teacher.width().into(),
        ],
    );
    dx
}
