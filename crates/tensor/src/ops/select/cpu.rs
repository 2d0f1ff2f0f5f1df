use crate::Tensor;

pub(super) fn column(x: &Tensor, column: usize, lead: &[usize]) -> Tensor {
    Tensor::from_f32(x.f32().iter().skip(column).step_by(x.width()).copied().collect(), lead)
}

pub(super) fn add_column(grad: &Tensor, column: usize, sum: &mut Tensor) {
    let width = sum.width();
    for (s, g) in sum.f32_mut().iter_mut().skip(column).step_by(width).zip(grad.f32()) {
        *s += g;
    }
}
