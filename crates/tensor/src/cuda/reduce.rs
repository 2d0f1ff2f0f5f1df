//! Sums of columns, which several operations need. Their order depends on the sizes alone, so that runs repeat exactly.
//!
//! A kernel that passes over many rows leaves sums of parts of them ([`Sums`]). They are gradients of biases, of norms'
//! gains and of step sizes, which nothing reads before the optimiser, so what is left is summed for all of them at once
//! ([`make`]): a step of a quantised BERT-base had two hundred launches for it.

use super::{Arg, Gpu, Grid, Source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = Source { name: "reduce", text: include_str!("reduce.cu") };

/// Rows that one block sums; more are split into parts.
const ROWS: usize = 128;

/// Columns that one block of `sum_parts` sums.
const COLUMNS: usize = 32;

/// What kernels left of sums of columns, f32 `[rows, stride]` of which `columns` from `first` on count: their sums, or the
/// sum of these, divided.
#[derive(Clone, Debug)]
pub(crate) struct Sums {
    parts: Tensor,
    first: usize,
    rows: usize,
    stride: usize,
    columns: usize,
    divisor: Option<f32>,
}

impl Sums {
    /// Of `parts` `[rows, columns]`.
    pub(crate) fn of(parts: Tensor) -> Sums {
        let (rows, columns) = (parts.rows(), parts.width());
        Sums { parts, first: 0, rows, stride: columns, columns, divisor: None }
    }

    /// Of `columns` of these columns, from `first` on.
    pub(crate) fn range(&self, first: usize, columns: usize) -> Sums {
        Sums { first: self.first + first, columns, ..self.clone() }
    }

    /// The sum of the columns' sums, divided by `divisor`.
    pub(crate) fn total(self, divisor: f32) -> Sums {
        Sums { divisor: Some(divisor), ..self }
    }

    /// How many sums they are.
    pub(crate) fn count(&self) -> usize {
        self.divisor.map_or(self.columns, |_| 1)
    }

    /// Where they are to go.
    pub(crate) fn place(&self, shape: &[usize]) -> Tensor {
        assert_eq!(shape.iter().product::<usize>(), self.count(), "sums for {shape:?}");
        Tensor::stale_on(self.parts.device(), shape)
    }
}

/// Makes sums, each into the tensor beside it: in one launch, and one for what is divided.
pub(crate) fn make(gpu: Gpu, wanted: &[(Sums, Tensor)]) {
    let of_columns: usize = wanted.iter().filter(|(s, _)| s.divisor.is_some()).map(|(s, _)| s.columns).sum();
    let between = Tensor::stale_on(Device::Cuda(gpu), &[of_columns]);
    let float = size_of::<f32>() as u64;
    let (mut columns, mut totals, mut at, mut blocks) =
        (Vec::new(), Vec::new(), between.memory().address(), 0);
    for (sums, out) in wanted {
        let mut to = out.memory().address();
        if let Some(divisor) = sums.divisor {
            totals.extend([at, to, sums.columns as u64, divisor.to_bits().into()]);
            (to, at) = (at, at + sums.columns as u64 * float);
        }
        let from = sums.parts.memory().address() + sums.first as u64 * float;
        columns.extend([from, to, sums.rows as u64, sums.stride as u64, sums.columns as u64, blocks as u64]);
        blocks += sums.columns.div_ceil(COLUMNS);
    }
    let entries = (wanted.len() as i32).into();
    let table = gpu.upload(&columns);
    gpu.launch(&SOURCE, "sum_parts", Grid::blocks(blocks), &[(&table).into(), entries]);
    let table = gpu.upload(&totals);
    gpu.launch(&SOURCE, "totals", Grid::blocks(totals.len() / 4), &[(&table).into()]);
}

/// How a kernel that passes over rows in strips of columns (`strip` in `packs.cuh`) is started.
pub(crate) struct Strips {
    pub(crate) grid: Grid,
    /// `name_pack` or `name_1` of the kernel.
    pub(crate) packed: bool,
    /// f32 `[parts, sums, width]`.
    pub(crate) parts: Tensor,
    pub(crate) per_part: usize,
}

impl Strips {
    /// For `sums` sums of each column of a matrix like `x`.
    pub(crate) fn of(gpu: Gpu, x: &Tensor, sums: usize) -> Strips {
        let (rows, width) = (x.rows(), x.width());
        let parts = rows.div_ceil(ROWS).clamp(1, 1 << 15);
        let pack = 16 / x.dtype().size();
        let packed = width.is_multiple_of(pack);
        let columns = if packed { 32 * pack } else { 32 };
        Strips {
            grid: Grid { blocks: [width.div_ceil(columns) as u32, parts as u32, 1], threads: 256, shared: 0 },
            packed,
            parts: Tensor::stale_on(Device::Cuda(gpu), &[parts, sums, width]),
            per_part: rows.div_ceil(parts),
        }
    }

    /// Of `width` columns each.
    pub(crate) fn sums(self) -> Vec<Sums> {
        let [parts, sums, width] = self.parts.shape()[..] else { unreachable!("made with three dimensions") };
        let all = Sums::of(self.parts.reshape(&[parts, sums * width]));
        (0..sums).map(|i| all.range(i * width, width)).collect()
    }
}

/// Column sums of `x` `[.., width]`, and of the element-wise product `x * y` where there is a `y`.
pub(crate) fn column_sums(gpu: Gpu, x: &Tensor, y: Option<&Tensor>) -> Vec<Sums> {
    let strips = Strips::of(gpu, x, if y.is_some() { 2 } else { 1 });
    gpu.launch(
        SOURCE.of(x.dtype()),
        if strips.packed { "column_sums_pack" } else { "column_sums_1" },
        strips.grid,
        &[
            strips.parts.memory().into(),
            x.memory().into(),
            y.map_or(Arg::Pointer(0), |y| y.memory().into()),
            x.rows().into(),
            x.width().into(),
            strips.per_part.into(),
        ],
    );
    strips.sums()
}
