use super::QMAX;
use crate::cuda::{Gpu, Grid, Source, source};
use crate::{DType, Device, Tensor};

pub(crate) static SOURCE: Source = source!("lsq");

pub(super) fn codes(gpu: Gpu, x: &Tensor, scale: &Tensor) -> Tensor {
    map(gpu, "codes", x, scale)
}

pub(super) fn dequantised(gpu: Gpu, x: &Tensor, scale: &Tensor) -> Tensor {
    map(gpu, "dequantised", x, scale)
}

fn map(gpu: Gpu, kernel: &'static str, x: &Tensor, scale: &Tensor) -> Tensor {
    let out = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let n = x.len();
    let arguments = [out.memory().into(), x.memory().into(), scale.memory().into(), n.into()];
    gpu.launch(SOURCE.of(x.dtype()), kernel, Grid::packs(n), &arguments);
    out
}

pub(super) fn backward(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    scale: &Tensor,
    divisor: f32,
) -> (Tensor, Tensor) {
    let (n, device) = (x.len(), Device::Cuda(gpu));
    let (dx, ds) = (Tensor::stale_of(gpu, x.dtype(), x.shape()), Tensor::stale_on(device, &[1]));
    let blocks = n.div_ceil(256 * 8).clamp(1, 1024);
    let parts = Tensor::stale_on(device, &[blocks]);
    gpu.launch(
        SOURCE.of(x.dtype()),
        "backward",
        Grid::blocks(blocks),
        &[
            dx.memory().into(),
            parts.memory().into(),
            grad.memory().into(),
            x.memory().into(),
            scale.memory().into(),
            n.into(),
        ],
    );
    gpu.launch(
        &SOURCE,
        "scale_gradient",
        Grid::blocks(1),
        &[ds.memory().into(), parts.memory().into(), blocks.into(), divisor.into()],
    );
    (dx, ds)
}

pub(super) fn weight_codes(gpu: Gpu, w: &Tensor, mask: &Tensor, scale: &Tensor, element: DType) -> Tensor {
    let out = Tensor::stale_of(gpu, element, w.shape());
    gpu.launch(
        SOURCE.of(element),
        "weight_codes",
        Grid::blocks(w.rows()),
        &[
            out.memory().into(),
            w.memory().into(),
            mask.memory().into(),
            scale.memory().into(),
            w.width().into(),
        ],
    );
    out
}

pub(super) fn weight_backward(
    gpu: Gpu,
    grad: &Tensor,
    w: &Tensor,
    mask: &Tensor,
    scale: &Tensor,
) -> (Tensor, Tensor) {
    let device = Device::Cuda(gpu);
    let (dw, ds) = (Tensor::stale_on(device, w.shape()), Tensor::stale_on(device, &[w.rows()]));
    gpu.launch(
        &SOURCE,
        "weight_backward",
        Grid::blocks(w.rows()),
        &[
            dw.memory().into(),
            ds.memory().into(),
            grad.memory().into(),
            w.memory().into(),
            mask.memory().into(),
            scale.memory().into(),
            w.width().into(),
            (w.width() as f32 * QMAX).sqrt().into(),
        ],
    );
    (dw, ds)
}
