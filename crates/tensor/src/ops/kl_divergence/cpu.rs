use rayon::prelude::*;

use super::rows_counted;
use crate::Tensor;
use crate::cpu::{exp, par_rows, simd};
use crate::ops::cross_entropy::log_sum_exp;

pub(super) fn forward(student: &Tensor, teacher: &Tensor, t: f32, counts: Option<&[bool]>) -> f32 {
    let width = teacher.width();
    let rows: Vec<f64> = student
        .f32()
        .par_chunks_exact(width)
        .zip(teacher.f32().par_chunks_exact(width))
        .enumerate()
        .map(|(r, (s, p))| {
            if counts.is_some_and(|c| !c[r]) {
                return 0.0;
            }
            let ((sm, sl), (pm, pl)) = (log_sum_exp(s, 1.0 / t), log_sum_exp(p, 1.0 / t));
            let mut sum = 0.0f64;
            for (s, p) in s.iter().zip(p) {
                let (lp, lq) = (p / t - pm - pl, s / t - sm - sl);
                sum += exp(lp) as f64 * (lp - lq) as f64;
            }
            sum
        })
        .collect();
    (rows.iter().sum::<f64>() / rows_counted(counts, teacher.rows()) as f64) as f32
}

pub(super) fn backward(
    grad: f32,
    student: &Tensor,
    teacher: &Tensor,
    t: f32,
    counts: Option<&[bool]>,
) -> Tensor {
    let width = teacher.width();
    let mut dx = Tensor::stale(student.shape());
    let g = grad / (t * rows_counted(counts, teacher.rows()));
    let (s, p) = (student.f32(), teacher.f32());
    par_rows(dx.f32_mut(), width, |first, block| {
        for (k, d) in block.chunks_exact_mut(width).enumerate() {
            let r = first + k;
            if counts.is_some_and(|c| !c[r]) {
                d.fill(0.0);
                continue;
            }
            let (s, p) = (&s[r * width..][..width], &p[r * width..][..width]);
            let ((sm, sl), (pm, pl)) = (log_sum_exp(s, 1.0 / t), log_sum_exp(p, 1.0 / t));
            simd(|| {
                for ((d, s), p) in d.iter_mut().zip(s).zip(p) {
                    *d = g * (exp(s / t - sm - sl) - exp(p / t - pm - pl));
                }
            });
        }
    });
    dx
}
