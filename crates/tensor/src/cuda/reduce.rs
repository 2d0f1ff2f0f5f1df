//! Sums that several operations need. Their order depends on the sizes alone, so that runs repeat exactly.

use super::{Arg, Gpu, Grid, Source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = Source { name: "reduce", text: include_str!("reduce.cu") };

/// Rows that one block sums; more are split into parts, summed in a second pass.
const ROWS: usize = 256;

/// Column sums of `x` `[.., width]`, and of the element-wise product `x * y` where there is a `y`: f32 `[width]`.
pub(crate) fn column_sums(gpu: Gpu, x: &Tensor, y: Option<&Tensor>) -> [Option<Tensor>; 2] {
    let (rows, width) = (x.rows(), x.width());
    let parts = rows.div_ceil(ROWS).clamp(1, 1 << 15);
    let per_part = rows.div_ceil(parts);
    let stale = || Tensor::stale_on(Device::Cuda(gpu), &[parts, width]);
    let (out, products) = (stale(), y.map(|_| stale()));
    let pack = 16 / x.dtype().size();
    let (columns, kernel) =
        if width % pack == 0 { (32 * pack, "column_sums_pack") } else { (32, "column_sums_1") };
    let grid = Grid { blocks: [width.div_ceil(columns) as u32, parts as u32, 1], threads: 256, shared: 0 };
    let of = |t: Option<&Tensor>| t.map_or(Arg::Pointer(0), |t| t.memory().into());
    gpu.launch(
        SOURCE.of(x.dtype()),
        kernel,
        grid,
        &[
            out.memory().into(),
            of(products.as_ref()),
            x.memory().into(),
            of(y),
            rows.into(),
            width.into(),
            per_part.into(),
        ],
    );
    let finish = |t: Tensor| match parts {
        1 => Some(t.reshape(&[width])),
        _ => column_sums(gpu, &t, None)[0].take(),
    };
    [finish(out), products.and_then(finish)]
}
