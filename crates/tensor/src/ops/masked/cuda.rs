use super::{Pruned, stacked};
use crate::cuda::{Gpu, Grid, Source, source};
use crate::{DType, Tensor};

pub(crate) static SOURCE: Source = source!("masked");

/// Elements that one block makes, as in `kernel.cu`.
const CHUNK: usize = 8192;

pub(super) fn multiplied(gpu: Gpu, groups: &[Vec<Pruned>], element: DType) -> Vec<Tensor> {
    let (mut table, mut entries, mut blocks) = (Vec::new(), 0, 0);
    let of = |group: &Vec<Pruned>| {
        if let [(w, None)] = &group[..]
            && w.value().dtype() == element
        {
            return w.value().clone();
        }
        let out = Tensor::stale_of(gpu, element, &stacked(group));
        let mut at = out.memory().address();
        for (w, mask) in group {
            let w = w.value();
            let mask = mask.as_ref().map_or(0, |m| m.memory().address());
            table.extend([at, w.memory().address(), mask, w.len() as u64, blocks as u64]);
            (entries, blocks) = (entries + 1, blocks + w.len().div_ceil(CHUNK));
            at += (w.len() * element.size()) as u64;
        }
        out
    };
    let out = groups.iter().map(of).collect();
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
