//! Mean squared error against a constant: the feature loss (paper, algorithm 1, L_MSE) and regression.

mod cpu;

use crate::{Device, Tape, Tensor, Var};

/// `mean over counted rows and their elements of (x - target)^2`, shape `[1]`. Same shapes; rows whose
/// `counts` is false (padding) are left out.
pub fn mse(tape: &Tape, x: &Var, target: &Tensor, counts: Option<&[bool]>) -> Var {
    assert_eq!(x.shape(), target.shape(), "mse");
    if let Some(c) = counts {
        assert_eq!(c.len(), target.rows(), "mse: one flag per row");
    }
    let rows = counts.map_or(target.rows(), |c| c.iter().filter(|&&c| c).count());
    let n = (rows * target.width()).max(1) as f32;
    let loss = match target.device() {
        Device::Cpu => cpu::forward(x.value(), target, counts) / n,
    };
    let (x2, target, counts) = (x.clone(), target.clone(), counts.map(<[bool]>::to_vec));
    tape.push(Tensor::scalar(loss), &[x], move |grad, grads| {
        grads.add(&x2, cpu::backward(2.0 * grad.item() / n, x2.value(), &target, counts.as_deref()));
    })
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, noise};
    use super::*;

    #[test]
    fn matches_reference() {
        let target = noise(&[3, 4], 2);
        let counts = [true, false, true];
        for (counts, n) in [(None, 12.0), (Some(&counts[..]), 8.0)] {
            check(
                &[noise(&[3, 4], 1)],
                |t, v| mse(t, &v[0], &target, counts),
                |x| {
                    let mut sum = 0.0;
                    for i in 0..12 {
                        if counts.is_none_or(|c| c[i / 4]) {
                            sum += (x[0][i] - target.f32()[i] as f64).powi(2);
                        }
                    }
                    vec![sum / n]
                },
            );
        }
    }
}
