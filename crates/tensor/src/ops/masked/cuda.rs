use crate::cuda::{Gpu, Grid, Source, source};
use crate::{DType, Tensor, Var};

pub(crate) static SOURCE: Source = source!("masked");

/// Elements that one block makes, as in `kernel.cu`.
const CHUNK: usize = 8192;

pub(super) fn multiplied(gpu: Gpu, weights: &[(Var, Option<Tensor>)], element: DType) -> Vec<Tensor> {
    let (mut table, mut entries, mut blocks) = (Vec::new(), 0, 0);
    let of = |(w, mask): &(Var, Option<Tensor>)| {
        let w = w.value();
        if mask.is_none() && w.dtype() == element {
            return w.clone();
        }
        let out = Tensor::stale_of(gpu, element, w.shape());
        let mask = mask.as_ref().map_or(0, |m| m.memory().address());
        table.extend([out.memory().address(), w.memory().address(), mask, w.len() as u64, blocks as u64]);
        (entries, blocks) = (entries + 1, blocks + w.len().div_ceil(CHUNK));
        out
    };
    let out = weights.iter().map(of).collect();
    let table = gpu.upload(&table);
    gpu.launch(SOURCE.of(element), "multiplied", Grid::blocks(blocks), &[(&table).into(), entries.into()]);
    out
}

pub(super) fn apply(gpu: Gpu, x: &Tensor, mask: &Tensor) -> Tensor {
    let out = Tensor::stale_of(gpu, DType::F32, x.shape());
    let n = x.len();
    let arguments = [out.memory().into(), x.memory().into(), mask.memory().into(), n.into()];
    gpu.launch(&SOURCE, "masked", Grid::packs(n), &arguments);
    out
}
