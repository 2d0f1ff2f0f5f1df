use super::{FakeWeight, takes_bytes};
use crate::cuda::reduce::Strips;
use crate::cuda::{Arg, Gpu, Grid, Memory, Source, source};
use crate::ops::add;
use crate::{DType, Device, Tensor};

pub(crate) static SOURCE: Source = source!("lsq");

/// Rows of weights that a block takes: a warp each.
const ROWS: usize = 8;

/// The codes in the type of `x` and, if `bytes`, also as i8.
pub(super) fn codes(gpu: Gpu, x: &Tensor, scale: &Tensor, bytes: bool) -> (Tensor, Option<Tensor>) {
    let out = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let small = bytes.then(|| Tensor::stale_of(gpu, DType::I8, x.shape()));
    let n = x.len();
    let arguments = [
        out.memory().into(),
        small.as_ref().map_or(Arg::Pointer(0), |t| t.memory().into()),
        x.memory().into(),
        scale.memory().into(),
        n.into(),
    ];
    gpu.launch(SOURCE.of(x.dtype()), "codes", Grid::packs(n), &arguments);
    (out, small)
}

pub(super) fn dequantised(gpu: Gpu, x: &Tensor, scale: &Tensor) -> Tensor {
    let out = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let n = x.len();
    let arguments = [out.memory().into(), x.memory().into(), scale.memory().into(), n.into()];
    gpu.launch(SOURCE.of(x.dtype()), "dequantised", Grid::packs(n), &arguments);
    out
}

/// Adds the gradient of `x` to `sum`, which may be empty, and gives that of the step size.
pub(super) fn backward(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    scale: &Tensor,
    divisor: f32,
    sum: &mut Option<Tensor>,
) -> Tensor {
    let (n, device) = (x.len(), Device::Cuda(gpu));
    // In place if nobody else has what is there.
    let add = sum.as_ref().is_some_and(|sum| !sum.shared() && sum.dtype() == x.dtype());
    let dx = match sum {
        Some(sum) if add => sum.clone(),
        _ => Tensor::stale_of(gpu, x.dtype(), x.shape()),
    };
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
            i32::from(add).into(),
        ],
    );
    match sum {
        Some(_) if add => {}
        Some(sum) => add::accumulate(sum, &dx),
        None => *sum = Some(dx),
    }
    scale_gradient(gpu, parts.memory().into(), blocks, divisor)
}

/// The sum of `parts` floats at `at`, divided.
pub(super) fn scale_gradient(gpu: Gpu, at: Arg, parts: usize, divisor: f32) -> Tensor {
    let ds = Tensor::stale_on(Device::Cuda(gpu), &[1]);
    let arguments = [ds.memory().into(), at, parts.into(), divisor.into()];
    gpu.launch(&SOURCE, "scale_gradient", Grid::blocks(1), &arguments);
    ds
}

/// Of [`super::ranges_backward`].
pub(super) fn ranges_backward(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    scales: &[&Tensor],
    divisor: f32,
) -> (Tensor, Tensor, Vec<Tensor>) {
    let (rows, width) = (x.rows(), x.width());
    let range = width / scales.len();
    let dx = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let strips = Strips::of(gpu, x, 2);
    assert!(strips.packed && range.is_multiple_of(8), "ranges of {range} columns");
    let scale = |i: usize| scales.get(i).map_or(Arg::Pointer(0), |s| s.memory().into());
    gpu.launch(
        SOURCE.of(x.dtype()),
        "ranges_backward",
        strips.grid,
        &[
            strips.parts.memory().into(),
            dx.memory().into(),
            grad.memory().into(),
            x.memory().into(),
            scale(0),
            scale(1),
            scale(2),
            range.into(),
            rows.into(),
            width.into(),
            strips.per_part.into(),
        ],
    );
    let [sums, shares] = strips.finish(gpu).try_into().expect("two sums");
    let first = shares.memory().address();
    let of_range = |i: usize| {
        let at = Arg::Pointer(first + (i * range * size_of::<f32>()) as u64);
        scale_gradient(gpu, at, range, divisor)
    };
    (dx, sums, (0..scales.len()).map(of_range).collect())
}

/// What the kernels know of all weights: a table, and for each group its first entry, entries, first block and blocks.
pub(super) struct Weights {
    table: Memory,
    groups: Vec<[usize; 4]>,
}

/// Words of the table for a weight.
const ENTRY: usize = 11;

/// A group's codes: of type `element`; or as i8, and with them the values in that type.
pub(super) fn weight_codes(
    gpu: Gpu,
    groups: &[Vec<FakeWeight>],
    element: DType,
) -> (Weights, Vec<(Tensor, Option<Tensor>, Tensor)>) {
    let (mut table, mut of_groups, mut out) = (Vec::new(), Vec::new(), Vec::new());
    let mut blocks = 0;
    for group in groups {
        let rows: usize = group.iter().map(|w| w.weight.shape()[0]).sum();
        let width = group[0].weight.value().width();
        let bytes = takes_bytes(Device::Cuda(gpu), element, width) && rows.is_multiple_of(8);
        let codes = Tensor::stale_of(gpu, if bytes { DType::I8 } else { element }, &[rows, width]);
        let values = bytes.then(|| Tensor::stale_of(gpu, element, &[rows, width]));
        let scale = Tensor::stale_on(Device::Cuda(gpu), &[rows]);
        let (first_block, first_entry) = (blocks, table.len() / ENTRY);
        let mut row = 0;
        for w in group {
            assert_eq!(w.weight.value().width(), width, "weights of one group");
            let rows = w.weight.shape()[0];
            let at = |t: &Tensor, row: usize| match t.memory().address() {
                0 => 0,
                first => first + (row * t.width() * t.dtype().size()) as u64,
            };
            let (plain, small) = if bytes { (0, at(&codes, row)) } else { (at(&codes, row), 0) };
            table.extend([
                w.weight.value().memory().address(),
                w.scale.value().memory().address(),
                w.mask.memory().address(),
                plain,
                small,
                values.as_ref().map_or(0, |v| at(v, row)),
                at(&scale.reshape(&[scale.len(), 1]), row),
                rows as u64,
                width as u64,
                row as u64,
                blocks as u64,
            ]);
            row += rows;
            blocks += rows.div_ceil(ROWS);
        }
        of_groups.push([first_entry, group.len(), first_block, blocks - first_block]);
        out.push((codes, values, scale));
    }
    let entries = (table.len() / ENTRY) as i32;
    let table = gpu.upload(&table);
    let arguments = [(&table).into(), entries.into()];
    gpu.launch(SOURCE.of(element), "weight_codes", Grid::blocks(blocks), &arguments);
    (Weights { table, groups: of_groups }, out)
}

/// Gradients of the weights and step sizes of group `which`, `[rows, width]` and `[rows]`; they must be alive.
pub(super) fn weight_backward(
    gpu: Gpu,
    grad: &Tensor,
    weights: &Weights,
    which: usize,
    element: DType,
) -> (Tensor, Tensor) {
    let device = Device::Cuda(gpu);
    let (dw, ds) = (Tensor::stale_on(device, grad.shape()), Tensor::stale_on(device, &[grad.rows()]));
    let [first, entries, before, blocks] = weights.groups[which];
    let table = weights.table.address() + (first * ENTRY * size_of::<u64>()) as u64;
    gpu.launch(
        SOURCE.of(element),
        "weight_backward",
        Grid::blocks(blocks),
        &[
            dw.memory().into(),
            ds.memory().into(),
            grad.memory().into(),
            Arg::Pointer(table),
            (entries as i32).into(),
            (before as u32).into(),
        ],
    );
    (dw, ds)
}
