use crate::cuda::{Factor, Gpu, Grid, Operand, Product, Source, Variant};
use crate::ops::activation::{self, Activation};
use crate::{DType, Tensor};

static SOURCE: Source =
    Source { name: "half_linear", text: concat!(activation::functions!(), include_str!("kernel.cu")) };

fn variant(function: Activation) -> Variant {
    SOURCE.with(DType::Bf16, &[("FUNCTION", activation::number(Some(function)))])
}

/// For the test that compiles every kernel.
#[cfg(test)]
pub(crate) fn variants() -> Vec<Variant> {
    [Activation::Gelu, Activation::Silu].map(variant).into()
}

pub(super) fn apply(
    gpu: Gpu,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    function: Option<Activation>,
    y: &Tensor,
) {
    gpu.gemm(&Product {
        m: x.rows(),
        n: weight.rows(),
        k: x.width(),
        alpha: Factor::Host(1.0),
        a: Operand::rows(x, x.width()),
        b: Operand::rows(weight, x.width()).t(),
        beta: 0.0,
        c: Operand::rows(y, weight.rows()),
        bias: Some(bias),
    });
    if let Some(function) = function {
        let n = y.len();
        let grid = Grid::elements(n.div_ceil(8));
        gpu.launch_early(variant(function), "activate", grid, &[y.memory().into(), n.into()]);
    }
}
