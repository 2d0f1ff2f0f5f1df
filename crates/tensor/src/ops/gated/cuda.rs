use crate::Tensor;
use crate::cuda::{Gpu, Grid, Source, source};

pub(crate) static SOURCE: Source = source!("gated");

pub(super) fn forward(gpu: Gpu, gate: &Tensor, up: &Tensor) -> Tensor {
    let out = Tensor::stale_of(gpu, gate.dtype(), gate.shape());
    let n = gate.len();
    let arguments = [out.memory().into(), gate.memory().into(), up.memory().into(), n.into()];
    gpu.launch(SOURCE.of(gate.dtype()), "forward", Grid::packs(n), &arguments);
    out
}

pub(super) fn backward(gpu: Gpu, grad: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    let [dgate, dup] = [gate, up].map(|x| Tensor::stale_of(gpu, x.dtype(), x.shape()));
    let n = gate.len();
    gpu.launch(
        SOURCE.of(gate.dtype()),
        "backward",
        Grid::packs(n),
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
