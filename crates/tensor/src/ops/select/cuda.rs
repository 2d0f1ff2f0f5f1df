use crate::cuda::{Gpu, Grid, Source, source};
use crate::{Segments, Tensor};

pub(crate) static SOURCE: Source = source!("select");

pub(super) fn column(gpu: Gpu, x: &Tensor, column: usize, lead: &[usize]) -> Tensor {
    let out = Tensor::stale_of(gpu, x.dtype(), lead);
    let n = out.len();
    let arguments = [out.memory().into(), x.memory().into(), column.into(), x.width().into(), n.into()];
    gpu.launch(SOURCE.of(x.dtype()), "column", Grid::elements(n), &arguments);
    out
}

pub(super) fn columns(gpu: Gpu, x: &Tensor, first: usize, out: &Tensor) {
    let (n, count, width) = (out.len(), out.width(), x.width());
    let arguments =
        [out.memory().into(), x.memory().into(), first.into(), count.into(), width.into(), n.into()];
    gpu.launch(SOURCE.of(x.dtype()), "columns", Grid::elements(n), &arguments);
}

pub(super) fn add_columns(gpu: Gpu, grad: &Tensor, first: usize, sum: &mut Tensor) {
    let (n, count, width) = (grad.len(), grad.width(), sum.width());
    let arguments =
        [sum.memory_mut().into(), grad.memory().into(), first.into(), count.into(), width.into(), n.into()];
    gpu.launch(SOURCE.of(grad.dtype()), "add_columns", Grid::elements(n), &arguments);
}

pub(super) fn add_column(gpu: Gpu, grad: &Tensor, column: usize, sum: &mut Tensor) {
    let (n, width) = (grad.len(), sum.width());
    let arguments = [sum.memory_mut().into(), grad.memory().into(), column.into(), width.into(), n.into()];
    gpu.launch(SOURCE.of(grad.dtype()), "add_column", Grid::elements(n), &arguments);
}

pub(super) fn first_rows(gpu: Gpu, x: &Tensor, segments: &Segments, out: &Tensor) {
    let bytes = x.width() * x.dtype().size();
    let arguments = [
        out.memory().into(),
        x.memory().into(),
        segments.table().memory().into(),
        bytes.into(),
        (x.rows() as i32 - 1).into(),
    ];
    let grid = Grid { threads: 128, ..Grid::blocks(segments.sequences()) };
    gpu.launch_early(&SOURCE, "first_rows", grid, &arguments);
}
