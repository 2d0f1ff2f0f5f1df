use super::{IGNORE, counted};
use crate::cuda::{Gpu, Grid, Source, source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = source!("cross_entropy");

pub(super) fn forward(gpu: Gpu, logits: &Tensor, labels: &[i32]) -> Tensor {
    let losses = Tensor::stale_on(Device::Cuda(gpu), &[labels.len()]);
    let on_gpu = gpu.upload(labels);
    gpu.launch(
        &SOURCE,
        "row_losses",
        Grid::blocks(labels.len()),
        &[
            losses.memory().into(),
            logits.memory().into(),
            (&on_gpu).into(),
            IGNORE.into(),
            logits.width().into(),
        ],
    );
    mean(gpu, &losses, counted(labels).max(1) as f32)
}

/// Sum of the elements of `x` over `divisor`, shape `[1]`: the same on every run, and nothing waits for it.
pub(crate) fn mean(gpu: Gpu, x: &Tensor, divisor: f32) -> Tensor {
    let out = Tensor::stale_on(Device::Cuda(gpu), &[1]);
    let arguments = [out.memory().into(), x.memory().into(), x.len().into(), divisor.into()];
    gpu.launch(&SOURCE, "mean", Grid::blocks(1), &arguments);
    out
}

pub(super) fn backward(gpu: Gpu, grad: &Tensor, logits: &Tensor, labels: &[i32]) -> Tensor {
    let dx = Tensor::stale_on(Device::Cuda(gpu), logits.shape());
    let on_gpu = gpu.upload(labels);
    gpu.launch(
        &SOURCE,
        "backward",
        Grid::blocks(labels.len()),
        &[
            dx.memory().into(),
            grad.memory().into(),
            logits.memory().into(),
            (&on_gpu).into(),
            IGNORE.into(),
            (counted(labels).max(1) as f32).into(),
            logits.width().into(),
        ],
    );
    dx
}
