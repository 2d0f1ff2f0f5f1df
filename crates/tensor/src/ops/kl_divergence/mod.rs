//! Kullback-Leibler divergence from teacher to student logits: the soft loss (paper, algorithm 1, L_KLD).

mod cpu;
mod cuda;

pub(crate) use cuda::SOURCE;

use crate::{Device, Flags, Tape, Tensor, Var};

/// `mean over rows of sum_c p_c (log p_c - log q_c)` with `p = softmax(teacher / t)` and
/// `q = softmax(student / t)`, shape `[1]`. Both are `[.., classes]`; rows whose `counts` is false are
/// left out. There is no factor `t^2`: the loss's own weight (beta) takes its place.
pub fn kl_divergence(tape: &Tape, student: &Var, teacher: &Tensor, t: f32, counts: Option<&Flags>) -> Var {
    assert_eq!(student.shape(), teacher.shape(), "kl_divergence");
    assert!(t > 0.0, "temperature {t}");
    if let Some(c) = counts {
        assert_eq!(c.len(), teacher.rows(), "kl_divergence: one flag per row");
    }
    let loss = match teacher.device() {
        Device::Cpu => Tensor::scalar(cpu::forward(student.value(), teacher, t, counts.map(|c| &**c))),
        Device::Cuda(gpu) => cuda::forward(gpu, student.value(), teacher, t, counts),
    };
    let (s, teacher, counts) = (student.clone(), teacher.clone(), counts.cloned());
    tape.push(loss, &[student], move |grad, grads| {
        let dx = match grad.device() {
            Device::Cpu => cpu::backward(grad.item(), s.value(), &teacher, t, counts.as_deref()),
            Device::Cuda(gpu) => cuda::backward(gpu, grad, s.value(), &teacher, t, counts.as_ref()),
        };
        grads.add(&s, dx);
    })
}

fn rows_counted(counts: Option<&[bool]>, rows: usize) -> f32 {
    counts.map_or(rows, |c| c.iter().filter(|&&c| c).count()).max(1) as f32
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, devices, noise};
    use super::*;

    #[test]
    fn matches_reference() {
        let counts = Flags::from(vec![true, false, true]);
        let log_softmax = |row: &[f64], t: f64| -> Vec<f64> {
            let z = row.iter().map(|v| (v / t).exp()).sum::<f64>().ln();
            row.iter().map(|v| v / t - z).collect()
        };
        // The last has more classes than a block has threads.
        for (counts, n, w) in [(None, 3.0, 4), (Some(&counts), 2.0, 4), (Some(&counts), 2.0, 300)] {
            let teacher = noise(&[3, w], 2);
            check(
                &[noise(&[3, w], 1)],
                |t, v| kl_divergence(t, &v[0], &teacher.to(v[0].value().device()), 2.0, counts),
                |x| {
                    let mut sum = 0.0;
                    for r in 0..3 {
                        if counts.is_some_and(|c| !c[r]) {
                            continue;
                        }
                        let wide: Vec<f64> =
                            teacher.f32()[r * w..r * w + w].iter().map(|&v| v as f64).collect();
                        let (p, q) = (log_softmax(&wide, 2.0), log_softmax(&x[0][r * w..r * w + w], 2.0));
                        sum += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
                    }
                    vec![sum / n]
                },
            );
        }
    }

    #[test]
    fn equal_logits_have_no_divergence() {
        for device in devices() {
            let tape = Tape::recording();
            let t = noise(&[5, 7], 1).to(device);
            let s = tape.leaf(t.clone());
            let loss = kl_divergence(&tape, &s, &t, 3.0, None);
            assert!(loss.value().item().abs() < 1e-7);
            let ds = tape.backward(&loss).take(&s).unwrap().to(Device::Cpu);
            assert!(ds.f32().iter().all(|g| g.abs() < 1e-7));
        }
    }
}
