//! Mean squared error against a constant: the feature loss (paper, algorithm 1, L_MSE) and regression.

mod cpu;
mod cuda;

pub(crate) use cuda::SOURCE;

use crate::{Device, Flags, Tape, Tensor, Var};

/// `mean over counted rows and their elements of (x - target)^2`, shape `[1]`. Same shapes; rows whose
/// `counts` is false (padding) are left out.
pub fn mse(tape: &Tape, x: &Var, target: &Tensor, counts: Option<&Flags>) -> Var {
    assert_eq!(x.shape(), target.shape(), "mse");
    if let Some(c) = counts {
        assert_eq!(c.len(), target.rows(), "mse: one flag per row");
    }
    let rows = counts.map_or(target.rows(), |c| c.iter().filter(|&&c| c).count());
    let n = (rows * target.width()).max(1) as f32;
    let loss = match target.device() {
        Device::Cpu => Tensor::scalar(cpu::forward(x.value(), target, counts.map(|c| &**c)) / n),
        Device::Cuda(gpu) => cuda::forward(gpu, x.value(), target, counts, n),
    };
    let (x2, target, counts) = (x.clone(), target.clone(), counts.cloned());
    tape.push(loss, &[x], move |grad, grads| {
        let dx = match grad.device() {
            Device::Cpu => cpu::backward(2.0 * grad.item() / n, x2.value(), &target, counts.as_deref()),
            Device::Cuda(gpu) => cuda::backward(gpu, grad, x2.value(), &target, counts.as_ref(), n),
        };
        grads.add(&x2, dx);
    })
}

#[cfg(test)]
mod tests {
    use super::super::check::{check_both, noise};
    use super::*;

    /// `t` where the first of `v` is, in its type.
    fn as_first(t: &Tensor, v: &[Var]) -> Tensor {
        crate::ops::cast::apply(&t.to(v[0].value().device()), v[0].value().dtype())
    }

    #[test]
    fn matches_reference() {
        let counts = Flags::from(vec![true, false, true]);
        // The last has wider rows than a block has threads.
        for (counts, n, w) in [(None, 12.0, 4), (Some(&counts), 8.0, 4), (Some(&counts), 600.0, 300)] {
            let target = noise(&[3, w], 2);
            check_both(
                &[noise(&[3, w], 1)],
                &[0],
                |t, v| mse(t, &v[0], &as_first(&target, v), counts),
                |x| {
                    let mut sum = 0.0;
                    for i in 0..3 * w {
                        if counts.is_none_or(|c| c[i / w]) {
                            sum += (x[0][i] - target.f32()[i] as f64).powi(2);
                        }
                    }
                    vec![sum / n]
                },
            );
        }
    }
}
