//! Sums that several operations need. Their order depends on the sizes alone, so that runs repeat exactly.

use super::{Arg, Gpu, Grid, Source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = Source { name: "reduce", text: include_str!("reduce.cu") };

/// Rows that one block sums; more are split into parts, summed in a second pass.
const ROWS: usize = 256;

/// Column sums of `x` `[.., width]`, or of the element-wise product `x * y`: `[width]`.
pub(crate) fn column_sums(gpu: Gpu, x: &Tensor, y: Option<&Tensor>) -> Tensor {
    let (rows, width) = (x.rows(), x.width());
    let parts = rows.div_ceil(ROWS).clamp(1, 1 << 15);
    let per_part = rows.div_ceil(parts);
    let out = Tensor::stale_on(Device::Cuda(gpu), &[parts, width]);
    let grid = Grid { blocks: [width.div_ceil(32) as u32, parts as u32, 1], threads: 256, shared: 0 };
    let other = y.map_or(Arg::Pointer(0), |y| y.memory().into());
    let arguments =
        [out.memory().into(), x.memory().into(), other, rows.into(), width.into(), per_part.into()];
    gpu.launch(&SOURCE, "column_sums", grid, &arguments);
    match parts {
        1 => out.reshape(&[width]),
        _ => column_sums(gpu, &out, None),
    }
}
