//! Inverted dropout with a counter-based generator: the mask is a function of the tape's seed and the
//! element's index, so that it is never stored and a resumed run repeats it.

mod cpu;
mod cuda;

pub(crate) use cuda::SOURCE;

use crate::{Device, Tape, Tensor, Var};

/// One dropout mask: which elements fall, and the factor of those that stay.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drop {
    pub(crate) key: u64,
    /// Elements whose random bits are below this are dropped.
    pub(crate) below: u32,
    /// `1 / (1 - probability)`.
    pub(crate) factor: f32,
}

impl Drop {
    /// The next mask of `tape`, for a tensor with `elements`; `None` if it does not drop or `probability` is 0.
    pub(crate) fn next(tape: &Tape, probability: f32, elements: usize) -> Option<Drop> {
        assert!((0.0..1.0).contains(&probability), "dropout probability {probability}");
        if probability == 0.0 {
            return None;
        }
        let below = (probability as f64 * 4_294_967_296.0) as u32;
        Some(Drop { key: tape.next_draw(elements)?, below, factor: 1.0 / (1.0 - probability) })
    }

    /// What element `index` is multiplied by.
    #[inline(always)]
    pub(crate) fn at(&self, index: u32) -> f32 {
        if crate::cpu::random(self.key, index) < self.below { 0.0 } else { self.factor }
    }
}

/// Zeroes each element with `probability` and scales the others by `1 / (1 - probability)`, on a tape
/// made by [`Tape::training`]; elsewhere the identity.
pub fn dropout(tape: &Tape, x: &Var, probability: f32) -> Var {
    let Some(drop) = Drop::next(tape, probability, x.value().len()) else { return x.clone() };
    let apply = move |x: &Tensor| match x.device() {
        Device::Cpu => cpu::apply(x, drop),
        Device::Cuda(gpu) => cuda::apply(gpu, x, drop),
    };
    let y = apply(x.value());
    let x2 = x.clone();
    tape.push(y, &[x], move |grad, grads| grads.add(&x2, apply(grad)))
}

#[cfg(test)]
mod tests {
    use super::super::check::noise;
    use super::super::weighted_sum::dot;
    use super::*;
    use crate::Part;

    #[test]
    fn drops_the_asked_share_and_repeats() {
        let x = Tensor::full(&[100_000], 1.0);
        let run = |seed| {
            let tape = Tape::training(seed);
            let v = tape.leaf(x.clone());
            let (a, b) = (dropout(&tape, &v, 0.1), dropout(&tape, &v, 0.1));
            (a.value().clone(), b.value().clone())
        };
        let (a, b) = run(1);
        assert_eq!(run(1), (a.clone(), b.clone()));
        assert!(a != b && run(2).0 != a);
        let dropped = a.f32().iter().filter(|&&v| v == 0.0).count();
        assert!((9_500..10_500).contains(&dropped), "{dropped}");
        assert!(a.f32().iter().all(|&v| v == 0.0 || (v - 1.0 / 0.9).abs() < 1e-6));
    }

    /// Two masks after another, so that the second draw counts too.
    #[test]
    fn parts_of_a_batch_get_the_masks_of_the_whole() {
        let run = |tape: Tape, rows: usize| {
            let v = tape.leaf(Tensor::full(&[rows, 30], 1.0));
            let (a, b) = (dropout(&tape, &v, 0.3), dropout(&tape, &v, 0.3));
            [a.value().f32().to_vec(), b.value().f32().to_vec()]
        };
        let whole = run(Tape::training(5), 7);
        for (first, count) in [(0, 3), (3, 1), (4, 3)] {
            let part = run(Tape::training(5).of_part(Part { first, count, of: 7 }), count);
            for (whole, part) in whole.iter().zip(&part) {
                assert_eq!(whole[first * 30..(first + count) * 30], *part);
            }
        }
    }

    #[test]
    fn gradient_uses_the_same_mask() {
        let tape = Tape::training(3);
        let x = tape.leaf(Tensor::full(&[1000], 1.0));
        let y = dropout(&tape, &x, 0.5);
        let w = noise(&[1000], 1);
        let loss = dot(&tape, &y, &w);
        let g = tape.backward(&loss).take(&x).unwrap();
        for i in 0..1000 {
            assert_eq!(g.f32()[i], w.f32()[i] * y.value().f32()[i]);
        }
    }

    #[test]
    fn evaluation_keeps_everything() {
        let tape = Tape::inference();
        let x = tape.constant(noise(&[50], 1));
        assert_eq!(dropout(&tape, &x, 0.5).value(), x.value());
    }
}
