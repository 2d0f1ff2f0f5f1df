//! Sums of columns, which several operations need. Their order depends on the sizes alone, so that runs repeat exactly.

use super::{Arg, Gpu, Grid, Source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = Source { name: "reduce", text: include_str!("reduce.cu") };

/// Rows that one block sums; more are split into parts, summed in a second pass.
const ROWS: usize = 128;

/// How a kernel that passes over rows in strips of columns (`strip` in `packs.cuh`) is started.
pub(crate) struct Strips {
    pub(crate) grid: Grid,
    /// `name_pack` or `name_1` of the kernel.
    pub(crate) packed: bool,
    /// f32 `[parts, sums, width]`.
    pub(crate) parts: Tensor,
    pub(crate) per_part: usize,
    sums: usize,
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
            sums,
        }
    }

    /// The sums: f32 `[width]` each.
    pub(crate) fn finish(self, gpu: Gpu) -> Vec<Tensor> {
        let [parts, sums, width] = self.parts.shape()[..] else { unreachable!("made with three dimensions") };
        let mut t = self.parts.reshape(&[parts, sums * width]);
        if parts > 1 {
            t = column_sums(gpu, &t, None).remove(0);
        }
        t.reshape(&[sums * width]).split(&vec![vec![width]; self.sums])
    }
}

/// Column sums of `x` `[.., width]`, and of the element-wise product `x * y` where there is a `y`: f32 `[width]`.
pub(crate) fn column_sums(gpu: Gpu, x: &Tensor, y: Option<&Tensor>) -> Vec<Tensor> {
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
    strips.finish(gpu)
}
