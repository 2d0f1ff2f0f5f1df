use crate::Tensor;

pub(super) fn column(x: &Tensor, column: usize, lead: &[usize]) -> Tensor {
    Tensor::from_f32(x.f32().iter().skip(column).step_by(x.width()).copied().collect(), lead)
}

pub(super) fn columns(x: &Tensor, first: usize, out: &mut Tensor) {
    let (count, width) = (out.width(), x.width());
    for (to, from) in out.f32_mut().chunks_exact_mut(count).zip(x.f32().chunks_exact(width)) {
        to.copy_from_slice(&from[first..][..count]);
    }
}

pub(super) fn add_columns(grad: &Tensor, first: usize, sum: &mut Tensor) {
    let (count, width) = (grad.width(), sum.width());
    for (to, from) in sum.f32_mut().chunks_exact_mut(width).zip(grad.f32().chunks_exact(count)) {
        for (s, g) in to[first..].iter_mut().zip(from) {
            *s += g;
        }
    }
}

pub(super) fn add_column(grad: &Tensor, column: usize, sum: &mut Tensor) {
    let width = sum.width();
    for (s, g) in sum.f32_mut().iter_mut().skip(column).step_by(width).zip(grad.f32()) {
        *s += g;
    }
}
