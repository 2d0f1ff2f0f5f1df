//! Cross-entropy with class labels: the hard loss (paper, algorithm 1, L_CSE).

mod cpu;

pub(crate) use cpu::log_sum_exp;

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
        Device::Cpu => cpu::forward(logits.value(), labels),
    };
    let (x, labels) = (logits.clone(), labels.to_vec());
    tape.push(Tensor::scalar(loss), &[logits], move |grad, grads| {
        grads.add(&x, cpu::backward(grad.item(), x.value(), &labels));
    })
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, noise};
    use super::*;

    #[test]
    fn matches_reference() {
        let labels = [2, IGNORE, 0, 1];
        check(
            &[noise(&[4, 3], 1)],
            |t, v| cross_entropy(t, &v[0], &labels),
            |x| {
                let mut sum = 0.0;
                for (row, &l) in x[0].chunks(3).zip(&labels) {
                    if l != IGNORE {
                        sum += row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[l as usize];
                    }
                }
                vec![sum / 3.0]
            },
        );
    }

    #[test]
    fn no_counted_row_is_zero_loss_and_zero_gradient() {
        let tape = Tape::recording();
        let x = tape.leaf(noise(&[2, 3], 1));
        let loss = cross_entropy(&tape, &x, &[IGNORE, IGNORE]);
        assert_eq!(loss.value().item(), 0.0);
        assert!(tape.backward(&loss).take(&x).unwrap().f32().iter().all(|&g| g == 0.0));
    }

    #[test]
    fn huge_logits_stay_finite() {
        let tape = Tape::recording();
        let x = tape.leaf(Tensor::from_f32(vec![1e30, -1e30], &[1, 2]));
        let loss = cross_entropy(&tape, &x, &[0]);
        assert_eq!(loss.value().item(), 0.0);
        assert!(tape.backward(&loss).take(&x).unwrap().f32().iter().all(|g| g.is_finite()));
    }
}
