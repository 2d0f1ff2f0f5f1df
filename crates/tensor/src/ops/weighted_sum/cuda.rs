use crate::cuda::{Gpu, Grid, Source, source};
use crate::{Device, Tensor, Var};

pub(crate) static SOURCE: Source = source!("weighted_sum");

const ONE: Grid = Grid { blocks: [1, 1, 1], threads: 1, shared: 0 };

/// A launch for each term: there are a handful.
pub(super) fn forward(gpu: Gpu, terms: &[(f32, Var)]) -> Tensor {
    let out = Tensor::zeros_on(Device::Cuda(gpu), &[1]);
    for (w, t) in terms {
        let arguments = [out.memory().into(), t.value().memory().into(), (*w).into()];
        gpu.launch(&SOURCE, "add_term", ONE, &arguments);
    }
    out
}

/// `weight * x` of a one-element `x`, in shape `shape`.
pub(super) fn scale(gpu: Gpu, x: &Tensor, weight: f32, shape: &[usize]) -> Tensor {
    let out = Tensor::stale_on(Device::Cuda(gpu), shape);
    gpu.launch(&SOURCE, "scale", ONE, &[out.memory().into(), x.memory().into(), weight.into()]);
    out
}
