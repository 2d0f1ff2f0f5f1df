//! Root-mean-square normalisation over rows (Zhang and Sennrich 2019, arXiv 1910.07467).

mod cpu;
mod cuda;

pub(crate) use cuda::SOURCE;

use crate::{Device, Tape, Tensor, Var};

/// `x / sqrt(mean(x^2) + eps) * gain`, the mean over each row; `gain` is `[width]`.
pub fn rms_norm(tape: &Tape, x: &Var, gain: &Var, eps: f32) -> Var {
    let (y, rstd) = compute(x.value(), gain.value(), eps);
    let (x2, g2) = (x.clone(), gain.clone());
    tape.push(y, &[x, gain], move |grad, grads| match grad.device() {
        Device::Cpu => {
            let (dx, dgain) = cpu::backward(grad, x2.value(), rstd.f32(), g2.value());
            grads.add(&x2, dx);
            grads.add(&g2, dgain);
        }
        Device::Cuda(gpu) => {
            let (dx, dgain) = cuda::backward(gpu, grad, x2.value(), &rstd, g2.value());
            grads.add(&x2, dx);
            grads.add_sums(&g2, dgain);
        }
    })
}

/// [`rms_norm`] without a tape.
pub fn apply(x: &Tensor, gain: &Tensor, eps: f32) -> Tensor {
    compute(x, gain, eps).0
}

fn compute(x: &Tensor, gain: &Tensor, eps: f32) -> (Tensor, Tensor) {
    assert_eq!(x.width(), gain.len(), "rms_norm: {:?}, {:?}", x.shape(), gain.shape());
    match x.device() {
        Device::Cpu => cpu::forward(x, gain, eps),
        Device::Cuda(gpu) => cuda::forward(gpu, x, gain, eps),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{check_both, noise};

    #[test]
    fn matches_reference() {
        for width in [3, 20] {
            check_both(
                &[noise(&[4, width], 1), noise(&[width], 2)],
                &[0],
                |t, v| super::rms_norm(t, &v[0], &v[1], 1e-6),
                |x| {
                    x[0].chunks(width)
                        .flat_map(|row| {
                            let ms = row.iter().map(|v| v * v).sum::<f64>() / width as f64;
                            let r = 1.0 / (ms + 1e-6f32 as f64).sqrt();
                            row.iter().zip(&x[1]).map(|(v, g)| v * r * g).collect::<Vec<_>>()
                        })
                        .collect()
                },
            );
        }
    }
}
