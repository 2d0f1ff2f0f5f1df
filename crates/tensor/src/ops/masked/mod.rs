//! `weight * mask`: the forward of a pruned weight.

mod cpu;
mod cuda;

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

/// An f32 weight and, if it is pruned, its u8 mask of the same shape.
pub type Pruned = (Var, Option<Tensor>);

/// Each of `groups`' f32 weights as `element`, f32 or on a GPU bf16, times its mask where there is one, and the rows of
/// a group one below the other: on a GPU in one launch. Dropped elements are +0. The gradients are f32, also those of the
/// results.
pub fn multiplied(tape: &Tape, groups: &[Vec<Pruned>], gradient: MaskGradient, element: DType) -> Vec<Var> {
    for (w, mask) in groups.iter().flatten() {
        assert!(mask.as_ref().is_none_or(|m| m.shape() == w.shape()), "masked: {:?}", w.shape());
    }
    let Some((first, _)) = groups.iter().flatten().next() else { return Vec::new() };
    let values = match first.value().device() {
        Device::Cpu => {
            assert_eq!(element, DType::F32, "a CPU computes in f32");
            groups.iter().map(|group| cpu::multiplied(group)).collect()
        }
        Device::Cuda(gpu) => cuda::multiplied(gpu, groups, element),
    };
    let pushed = groups.iter().zip(values).map(|(group, value)| {
        let inputs: Vec<&Var> = group.iter().map(|(w, _)| w).collect();
        let group = group.clone();
        tape.push_owned(value, &inputs, move |grad, grads| {
            let shapes: Vec<Vec<usize>> = group.iter().map(|(w, _)| w.shape().to_vec()).collect();
            for ((w, mask), grad) in group.iter().zip(grad.split(&shapes)) {
                let mask = mask.as_ref().filter(|_| gradient == MaskGradient::Kept);
                let grad = match (mask, grad.device()) {
                    (None, _) => grad,
                    (Some(mask), Device::Cpu) => cpu::apply(&grad, mask),
                    (Some(mask), Device::Cuda(gpu)) => cuda::apply(gpu, &grad, mask),
                };
                grads.add(w, grad);
            }
        })
    });
    pushed.collect()
}

/// The shape of a group's result: all rows, or of vectors all elements.
fn stacked(group: &[Pruned]) -> Vec<usize> {
    let mut shape = group[0].0.shape().to_vec();
    shape[0] = group.iter().map(|(w, _)| w.shape()[0]).sum();
    shape
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, noise};
    use super::super::weighted_sum::dot;
    use super::*;

    fn masked(tape: &Tape, weight: &Var, mask: &Tensor, gradient: MaskGradient, element: DType) -> Var {
        multiplied(tape, &[vec![(weight.clone(), Some(mask.clone()))]], gradient, element).remove(0)
    }

    /// Weights with and without masks, one of them more than a block makes.
    #[test]
    fn many_weights_are_made_at_once() {
        let inputs = [noise(&[3], 1), noise(&[2, 4], 2), noise(&[83, 100], 3)];
        let mask = |n: usize| Tensor::from_u8((0..n).map(|i| (i % 3 == 0) as u8).collect(), &[n]);
        let masks = [None, Some(mask(8).reshape(&[2, 4])), Some(mask(8300).reshape(&[83, 100]))];
        let of = |t: &Tape, v: &[Var], element, which: usize| {
            let on = |m: &Option<Tensor>| m.as_ref().map(|m| m.to(v[0].value().device()));
            let weights: Vec<_> = v.iter().cloned().zip(masks.iter().map(on)).map(|w| vec![w]).collect();
            multiplied(t, &weights, MaskGradient::Kept, element)[which].clone()
        };
        for element in [DType::F32, DType::Bf16] {
            for device in super::super::check::devices() {
                if device == Device::Cpu && element == DType::Bf16 {
                    continue;
                }
                let tape = Tape::recording();
                let v: Vec<Var> = inputs.iter().map(|t| tape.leaf(t.to(device))).collect();
                for which in 0..3 {
                    let kept = |i: usize| which == 0 || i.is_multiple_of(3);
                    let want =
                        inputs[which].f32().iter().enumerate().map(|(i, &x)| if kept(i) { x } else { 0.0 });
                    let want = Tensor::from_f32(want.collect(), inputs[which].shape());
                    let want = if element == DType::Bf16 { want.to_bf16() } else { want };
                    assert_eq!(
                        of(&tape, &v, element, which).value().to(Device::Cpu),
                        want,
                        "{device:?} {which}"
                    );
                }
            }
        }
    }

    /// Rows of several weights become one matrix, and its gradient is divided among them; also where parts do not begin
    /// at packs.
    #[test]
    fn groups_are_stacked() {
        let keep: Vec<u8> = (0..15).map(|i| (i % 2 == 0) as u8).collect();
        let mask = Tensor::from_u8(keep.clone(), &[3, 5]);
        check(
            &[noise(&[1, 5], 1), noise(&[3, 5], 2), noise(&[8, 5], 3)],
            |t, v| {
                let mask = |i| (i == 1).then(|| mask.to(v[0].value().device()));
                let group = v.iter().cloned().enumerate().map(|(i, w)| (w, mask(i))).collect();
                multiplied(t, &[group], MaskGradient::Kept, DType::F32).remove(0)
            },
            |x| {
                let kept = x[1].iter().zip(&keep).map(|(x, &m)| x * m as f64);
                x[0].iter().copied().chain(kept).chain(x[2].iter().copied()).collect()
            },
        );
    }

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
