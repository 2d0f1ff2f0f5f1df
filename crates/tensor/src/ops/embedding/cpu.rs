use super::Rows;
use crate::Tensor;
use crate::cpu::par_rows;

pub(super) fn forward(lookups: &[Rows], tokens: usize, width: usize) -> Tensor {
    let mut out = Tensor::stale(&[tokens, width]);
    par_rows(out.f32_mut(), width, |first, block| {
        for (k, row) in block.chunks_exact_mut(width).enumerate() {
            for (n, l) in lookups.iter().enumerate() {
                let entry = &l.table.f32()[l.ids[first + k] as usize * width..][..width];
                for (o, e) in row.iter_mut().zip(entry) {
                    *o = if n == 0 { l.factor * e } else { *o + l.factor * e };
                }
            }
        }
    });
    out
}

/// One thread: tokens repeat, and the order of the sum must not depend on timing.
pub(super) fn scatter(grad: &Tensor, ids: &[u32], factor: f32, sum: &mut Tensor) {
    let width = grad.width();
    let sum = sum.f32_mut();
    for (g, &id) in grad.f32().chunks_exact(width).zip(ids) {
        for (s, g) in sum[id as usize * width..][..width].iter_mut().zip(g) {
            *s += factor * g;
        }
    }
}
