//! Cross-entropy with class labels: the hard loss (paper, algorithm 1, L_CSE).

mod cpu;
mod cuda;

pub(crate) use cpu::log_sum_exp;
pub(crate) use cuda::SOURCE;
pub(crate) use cuda::mean;

use crate::{Device, Tape, Tensor, Var};

/// Label of a row that does not count.
pub const IGNORE: i32 = -100;

/// `mean over counted rows of -log softmax(logits)[label]`, shape `[1]`; 0 if no row counts.
/// `logits` is `[.., classes]`, `labels` has one entry per row, in `0..classes` or [`IGNORE`].
pub fn cross_entropy(tape: &Tape, logits: &Var, labels: &[i32]) -> Var {
    let classes = logits.value().width();
    assert_eq!(logits.value().rows(), labels.len(), "cross_entropy: one label per row");
    assert!(
        labels.iter().all(|&l| l == IGNORE || (0..classes as i32).contains(&l)),
        "label outside 0..{classes}"
    );
    let loss = match logits.value().device() {
        Device::Cpu => Tensor::scalar(cpu::forward(logits.value(), labels)),
        Device::Cuda(gpu) => cuda::forward(gpu, logits.value(), labels),
    };
    let (x, labels) = (logits.clone(), labels.to_vec());
    tape.push(loss, &[logits], move |grad, grads| {
        let dx = match grad.device() {
            Device::Cpu => cpu::backward(grad.item(), x.value(), &labels),
            Device::Cuda(gpu) => cuda::backward(gpu, grad, x.value(), &labels),
        };
        grads.add(&x, dx);
    })
}

fn counted(labels: &[i32]) -> usize {
    labels.iter().filter(|&&l| l != IGNORE).count()
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, devices, noise};
    use super::*;

    #[test]
    fn matches_reference() {
        // Few classes; more classes than a block has threads; more rows than a block has threads.
        for (rows, classes) in [(4, 3), (3, 300), (290, 2)] {
            let labels: Vec<i32> =
                (0..rows).map(|r| if r % 4 == 1 { IGNORE } else { (r * 7 + 2) % classes }).collect();
            check(
                &[noise(&[rows as usize, classes as usize], 1)],
                |t, v| cross_entropy(t, &v[0], &labels),
                |x| {
                    let mut sum = 0.0;
                    for (row, &l) in x[0].chunks(classes as usize).zip(&labels) {
                        if l != IGNORE {
                            sum += row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[l as usize];
                        }
                    }
                    vec![sum / counted(&labels) as f64]
                },
            );
        }
    }

    #[test]
    fn no_counted_row_is_zero_loss_and_zero_gradient() {
        for device in devices() {
            let tape = Tape::recording();
            let x = tape.leaf(noise(&[2, 3], 1).to(device));
            let loss = cross_entropy(&tape, &x, &[IGNORE, IGNORE]);
            assert_eq!(loss.value().item(), 0.0);
            let dx = tape.backward(&loss).take(&x).unwrap().to(Device::Cpu);
            assert!(dx.f32().iter().all(|&g| g == 0.0));
        }
    }

    #[test]
    fn huge_logits_stay_finite() {
        for device in devices() {
            let tape = Tape::recording();
            let x = tape.leaf(Tensor::from_f32(vec![1e30, -1e30], &[1, 2]).to(device));
            let loss = cross_entropy(&tape, &x, &[0]);
            assert_eq!(loss.value().item(), 0.0);
            let dx = tape.backward(&loss).take(&x).unwrap().to(Device::Cpu);
            assert!(dx.f32().iter().all(|g| g.is_finite()));
        }
    }
}
