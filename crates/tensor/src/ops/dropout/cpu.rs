use super::Drop;
use crate::Tensor;
use crate::cpu::{par_elements, simd};

pub(super) fn apply(x: &Tensor, drop: Drop) -> Tensor {
    let mut out = Tensor::stale(x.shape());
    let x = x.f32();
    par_elements(out.f32_mut(), |at, block| {
        simd(|| {
            for (i, (o, x)) in block.iter_mut().zip(&x[at..]).enumerate() {
                *o = x * drop.at((at + i) as u32);
            }
        })
    });
    out
}
