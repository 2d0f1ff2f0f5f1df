//! Sums of scalars with constant weights: how loss terms become one loss.

use crate::{Tape, Tensor, Var};

/// `sum_i weight_i * term_i` of one-element terms.
pub fn weighted_sum(tape: &Tape, terms: &[(f32, Var)]) -> Var {
    let value = terms.iter().map(|(w, t)| w * t.value().item()).sum();
    let inputs: Vec<&Var> = terms.iter().map(|(_, t)| t).collect();
    let kept = terms.to_vec();
    tape.push(Tensor::scalar(value), &inputs, move |grad, grads| {
        for (w, t) in &kept {
            grads.add(t, Tensor::full(t.shape(), w * grad.item()));
        }
    })
}

/// `sum_i x_i * weight_i` with constant weights: makes a scalar of an output so that it can be differentiated.
#[cfg(test)]
pub(crate) fn dot(tape: &Tape, x: &Var, weights: &Tensor) -> Var {
    let value = x.value().f32().iter().zip(weights.f32()).map(|(a, b)| a * b).sum();
    let (x2, weights) = (x.clone(), weights.clone());
    tape.push(Tensor::scalar(value), &[x], move |grad, grads| {
        let g = weights.f32().iter().map(|w| w * grad.item()).collect();
        grads.add(&x2, Tensor::from_f32(g, x2.shape()));
    })
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, noise};

    #[test]
    fn matches_reference() {
        check(
            &[noise(&[1], 1), noise(&[1], 2)],
            |t, v| super::weighted_sum(t, &[(2.0, v[0].clone()), (-0.5, v[1].clone())]),
            |x| vec![2.0 * x[0][0] - 0.5 * x[1][0]],
        );
    }
}
