//! `weight * mask`: the forward of a pruned weight.

mod cpu;
mod cuda;

#[cfg(test)]
pub(crate) use cuda::SOURCE;

use crate::{DType, Device, Tape, Tensor, Var};

/// Which elements of a masked weight are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskGradient {
    /// Only the kept ones: the mask is fixed.
    Kept,
    /// All, the gradient passing straight through the mask, so that a later mask can revive an element
    /// (Zhou et al. 2021, arXiv 2102.04010, without its decay term).
    All,
}

/// `weight * mask` for f32 `weight` and u8 `mask` of one shape, as `element`: f32 or, on a GPU, bf16. Dropped
/// elements are +0. The gradient is f32, also that of the result.
pub fn masked(tape: &Tape, weight: &Var, mask: &Tensor, gradient: MaskGradient, element: DType) -> Var {
    assert_eq!(weight.shape(), mask.shape(), "masked");
    let apply = |x: &Tensor, mask: &Tensor, element| match x.device() {
        Device::Cpu => {
            assert_eq!(element, DType::F32, "a CPU computes in f32");
            cpu::apply(x, mask)
        }
        Device::Cuda(gpu) => cuda::apply(gpu, x, mask, element),
    };
    let out = apply(weight.value(), mask, element);
    let (w2, mask) = (weight.clone(), mask.clone());
    tape.push(out, &[weight], move |grad, grads| {
        grads.add(
            &w2,
            match gradient {
                MaskGradient::Kept => apply(grad, &mask, DType::F32),
                MaskGradient::All => grad.clone(),
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, noise};
    use super::super::weighted_sum::dot;
    use super::*;

    #[test]
    fn matches_reference_and_passes_straight_through_when_asked() {
        let keep = [1u8, 0, 1, 0, 0, 1, 1, 0];
        let mask = Tensor::from_u8(keep.to_vec(), &[2, 4]);
        check(
            &[noise(&[2, 4], 1)],
            |t, v| masked(t, &v[0], &mask.to(v[0].value().device()), MaskGradient::Kept, DType::F32),
            |x| x[0].iter().zip(keep).map(|(x, m)| x * m as f64).collect(),
        );
        let tape = Tape::recording();
        let (w, g) = (tape.leaf(noise(&[2, 4], 1)), noise(&[2, 4], 2));
        let y = masked(&tape, &w, &mask, MaskGradient::All, DType::F32);
        let loss = dot(&tape, &y, &g);
        assert_eq!(tape.backward(&loss).take(&w).unwrap(), g);
    }

    #[test]
    fn nothing_negative_survives_in_a_dropped_place() {
        let tape = Tape::inference();
        let w = tape.constant(Tensor::from_f32(vec![-3.0, f32::NEG_INFINITY], &[2]));
        let y = masked(&tape, &w, &Tensor::from_u8(vec![0, 0], &[2]), MaskGradient::Kept, DType::F32);
        assert!(y.value().f32().iter().all(|x| x.to_bits() == 0));
    }
}
