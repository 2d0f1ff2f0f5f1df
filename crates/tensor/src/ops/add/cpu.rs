use crate::Tensor;
use crate::cpu::{par_elements, simd};

pub(super) fn add(a: &Tensor, b: &Tensor) -> Tensor {
    let mut out = Tensor::stale(a.shape());
    let (a, b) = (a.f32(), b.f32());
    par_elements(out.f32_mut(), |at, block| {
        simd(|| {
            let (a, b) = (&a[at..at + block.len()], &b[at..at + block.len()]);
            for ((o, x), y) in block.iter_mut().zip(a).zip(b) {
                *o = x + y;
            }
        })
    });
    out
}

pub(super) fn accumulate(sum: &mut Tensor, x: &Tensor) {
    let x = x.f32();
    par_elements(sum.f32_mut(), |at, block| {
        simd(|| {
            for (o, x) in block.iter_mut().zip(&x[at..]) {
                *o += x;
            }
        })
    });
}
