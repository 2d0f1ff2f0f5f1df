use crate::cuda::{Gpu, Grid, Source, source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = source!("gated");

pub(super) fn forward(gpu: Gpu, gate: &Tensor, up: &Tensor) -> Tensor {
    let out = Tensor::stale_on(Device::Cuda(gpu), gate.shape());
    let n = gate.len();
    let arguments = [out.memory().into(), gate.memory().into(), up.memory().into(), n.into()];
    gpu.launch(&SOURCE, "forward", Grid::elements(n), &arguments);
    out
}

pub(super) fn backward(gpu: Gpu, grad: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    let device = Device::Cuda(gpu);
    let (dgate, dup) = (Tensor::stale_on(device, gate.shape()), Tensor::stale_on(device, up.shape()));
    let n = gate.len();
    gpu.launch(
        &SOURCE,
        "backward",
        Grid::elements(n),
        &[
            dgate.memory().into(),
            dup.memory().into(),
            grad.memory().into(),
            gate.memory().into(),
            up.memory().into(),
            n.into(),
        ],
    );
    (dgate, dup)
}
