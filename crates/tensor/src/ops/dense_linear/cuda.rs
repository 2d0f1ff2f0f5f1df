use crate::cuda::{Arg, Gpu, Grid, Source, Variant};
use crate::ops::activation::{self, Activation};
use crate::{DType, Tensor};

static SOURCE: Source =
    Source { name: "dense_linear", text: concat!(activation::functions!(), include_str!("kernel.cu")) };

/// Rows of a warp, and outputs of a block.
const ROWS: usize = 4;
const OUTPUTS: usize = 4;

fn variant(function: Option<Activation>, y: DType) -> Variant {
    let half = (y == DType::F16) as usize;
    SOURCE.with(DType::F32, &[("FUNCTION", activation::number(function)), ("HALF", half)])
}

/// For the test that compiles every kernel.
#[cfg(test)]
pub(crate) fn variants() -> Vec<Variant> {
    let both = |f| [DType::F16, DType::F32].map(|y| variant(f, y));
    [None, Some(Activation::Tanh), Some(Activation::Gelu)].into_iter().flat_map(both).collect()
}

pub(super) fn apply(
    gpu: Gpu,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    function: Option<Activation>,
    y: &Tensor,
) {
    let (rows, width, outputs) = (x.rows(), x.width(), weight.rows());
    let blocks = [rows.div_ceil(ROWS) as u32, outputs.div_ceil(OUTPUTS) as u32, 1];
    let grid = Grid { blocks, threads: 32 * OUTPUTS as u32, shared: 0 };
    let arguments = [
        y.memory().into(),
        x.memory().into(),
        weight.memory().into(),
        bias.map_or(Arg::Pointer(0), |b| b.memory().into()),
        (rows as i32).into(),
        (outputs as i32).into(),
        (width as i32).into(),
    ];
    gpu.launch_early(variant(function, y.dtype()), "forward", grid, &arguments);
}
