use super::{Pruned, stacked};
use crate::Tensor;
use crate::cpu::{par_elements, simd};

pub(super) fn apply(x: &Tensor, mask: &Tensor) -> Tensor {
    let mut out = Tensor::stale(x.shape());
    let (x, mask) = (x.f32(), mask.u8());
    par_elements(out.f32_mut(), |at, block| {
        simd(|| {
            // A product would leave -0.0 and NaN behind, so the choice is made by the mask alone.
            for ((o, x), m) in block.iter_mut().zip(&x[at..]).zip(&mask[at..]) {
                *o = if *m != 0 { *x } else { 0.0 };
            }
        })
    });
    out
}

/// The rows of all weights of a group, masked.
pub(super) fn multiplied(group: &[Pruned]) -> Tensor {
    let of = |(w, mask): &Pruned| mask.as_ref().map_or(w.value().clone(), |m| apply(w.value(), m));
    match group {
        [one] => of(one),
        _ => {
            let rows: Vec<f32> = group.iter().flat_map(|w| of(w).f32().to_vec()).collect();
            Tensor::from_f32(rows, &stacked(group))
        }
    }
}
