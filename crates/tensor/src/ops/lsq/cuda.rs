use super::{FakeWeight, takes_bytes};
use crate::cuda::reduce::{Strips, Sums};
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
) -> Sums {
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
    Sums::of(parts).total(divisor)
}

/// Of [`super::ranges_backward`].
pub(super) fn ranges_backward(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    scales: &[&Tensor],
    divisor: f32,
) -> (Tensor, Sums, Vec<Sums>) {
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
    let [sums, shares] = strips.sums().try_into().expect("two sums");
    let of_range = |i: usize| shares.range(i * range, range).total(divisor);
    (dx, sums, (0..scales.len()).map(of_range).collect())
}

/// What the kernels know of all weights: a table, and of each weight its group, its first row there and its blocks.
pub(super) struct Weights {
    table: Memory,
    places: Vec<(usize, usize)>,
    blocks: usize,
}

/// A group's codes: of type `element`; or as i8, and with them the values in that type.
pub(super) fn weight_codes(
    gpu: Gpu,
    groups: &[Vec<FakeWeight>],
    element: DType,
) -> (Weights, Vec<(Tensor, Option<Tensor>, Tensor)>) {
    let (mut table, mut places, mut out) = (Vec::new(), Vec::new(), Vec::new());
    let mut blocks = 0;
    for (which, group) in groups.iter().enumerate() {
        let rows: usize = group.iter().map(|w| w.weight.shape()[0]).sum();
        let width = group[0].weight.value().width();
        let bytes = takes_bytes(Device::Cuda(gpu), element, width) && rows.is_multiple_of(8);
        let codes = Tensor::stale_of(gpu, if bytes { DType::I8 } else { element }, &[rows, width]);
        let values = bytes.then(|| Tensor::stale_of(gpu, element, &[rows, width]));
        let scale = Tensor::stale_on(Device::Cuda(gpu), &[rows]);
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
                blocks as u64,
            ]);
            places.push((which, row));
            row += rows;
            blocks += rows.div_ceil(ROWS);
        }
        out.push((codes, values, scale));
    }
    let table = gpu.upload(&table);
    let arguments = [(&table).into(), (places.len() as i32).into()];
    gpu.launch(SOURCE.of(element), "weight_codes", Grid::blocks(blocks), &arguments);
    (Weights { table, places, blocks }, out)
}

/// Makes the gradients of codes, `[rows, width]` for each group that has one, those of its weights, and gives those of its
/// step sizes, `[rows]`: in one launch. The weights must be alive.
pub(super) fn weight_backward(
    gpu: Gpu,
    grads: &mut [Option<Tensor>],
    weights: &Weights,
    element: DType,
) -> Vec<Option<Tensor>> {
    let of_steps =
        |grad: &Option<Tensor>| grad.as_ref().map(|g| Tensor::stale_on(Device::Cuda(gpu), &[g.rows()]));
    let steps: Vec<Option<Tensor>> = grads.iter().map(of_steps).collect();
    // Shared storage is copied.
    let bases: Vec<(u64, u64, usize)> = grads
        .iter_mut()
        .zip(&steps)
        .map(|(grad, steps)| match (grad, steps) {
            (Some(g), Some(s)) => (g.memory_mut().address(), s.memory().address(), g.width()),
            _ => (0, 0, 0),
        })
        .collect();
    let float = size_of::<f32>() as u64;
    let of_weight = |&(which, row): &(usize, usize)| match bases[which] {
        (0, ..) => [0, 0],
        (grad, steps, width) => [grad + (row * width) as u64 * float, steps + row as u64 * float],
    };
    let table: Vec<u64> = weights.places.iter().flat_map(of_weight).collect();
    let table = gpu.upload(&table);
    let arguments = [(&weights.table).into(), (&table).into(), (weights.places.len() as i32).into()];
    gpu.launch(SOURCE.of(element), "weight_backward", Grid::blocks(weights.blocks), &arguments);
    steps
}
