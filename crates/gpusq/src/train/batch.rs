//! Examples become padded batches, in an order that depends on seed and epoch alone.

use crate::distill::Targets;
use crate::forward::{Inputs, Tokens};
use crate::task::{Example, HeadKind, Target};

/// Padded examples with their targets.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Model inputs.
    pub inputs: Inputs,
    /// What the outputs should be.
    pub targets: Targets,
}

/// Pads the examples `which` of `examples` to the longest among them with `pad`.
pub fn collate(examples: &[Example], which: &[usize], head: HeadKind, pad: u32) -> Batch {
    let length = which.iter().map(|&i| examples[i].ids.len()).max().unwrap_or(0);
    let n = which.len() * length;
    let (mut ids, mut types, mut mask) =
        (Vec::with_capacity(n), Vec::with_capacity(n), Vec::with_capacity(n));
    for &i in which {
        let e = &examples[i];
        let fill = length - e.ids.len();
        ids.extend(e.ids.iter().copied().chain(std::iter::repeat_n(pad, fill)));
        types.extend(e.types.iter().copied().chain(std::iter::repeat_n(0, fill)));
        mask.extend((0..length).map(|p| p < e.ids.len()));
    }
    let target = |i: &usize| examples[*i].target;
    let targets = match head {
        HeadKind::Classes(_) => Targets::Classes(
            which.iter().map(|i| if let Target::Class(c) = target(i) { c as i32 } else { -100 }).collect(),
        ),
        HeadKind::Value => Targets::Values(
            which.iter().map(|i| if let Target::Value(v) = target(i) { v } else { f32::NAN }).collect(),
        ),
        HeadKind::Span => {
            let part = |last: bool| {
                let of = |i: &usize| match target(i) {
                    Target::Span { start, end } => (if last { end } else { start }) as i32,
                    _ => -100,
                };
                which.iter().map(of).collect()
            };
            Targets::Spans { start: part(false), end: part(true) }
        }
    };
    // Without padding no mask is needed, and attention is quicker.
    let mask = mask.iter().any(|m| !m).then_some(mask);
    let tokens = Tokens { batch: which.len(), length, ids, types, mask };
    Batch { inputs: Inputs { tokens, target: None }, targets }
}

/// Batches in file order, sorted by length so that little is padded.
pub fn by_length(examples: &[Example], size: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|&i| examples[i].ids.len());
    order.chunks(size.max(1)).map(<[usize]>::to_vec).collect()
}

/// The batches of one epoch: a random order, sorted by length within windows of 32 batches (so that little
/// is padded), batches shuffled again.
pub fn shuffled(examples: &[Example], size: usize, seed: u64, epoch: usize) -> Vec<Vec<usize>> {
    const WINDOW: usize = 32;
    let mut random = Shuffle(seed ^ (epoch as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let mut order: Vec<usize> = (0..examples.len()).collect();
    random.shuffle(&mut order);
    let mut batches = Vec::new();
    for window in order.chunks_mut(size * WINDOW) {
        window.sort_by_key(|&i| examples[i].ids.len());
        batches.extend(window.chunks(size).map(<[usize]>::to_vec));
    }
    random.shuffle(&mut batches);
    batches
}

/// SplitMix64 (Steele et al. 2014) with Fisher-Yates.
struct Shuffle(u64);

impl Shuffle {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, (self.next() % (i as u64 + 1)) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples(n: usize) -> Vec<Example> {
        (0..n)
            .map(|i| Example {
                ids: vec![i as u32; 1 + i % 7],
                types: vec![0; 1 + i % 7],
                target: Target::Class((i % 2) as u32),
            })
            .collect()
    }

    #[test]
    fn an_epoch_visits_every_example_once_in_a_repeatable_order() {
        let e = examples(103);
        let a = shuffled(&e, 4, 1, 0);
        let mut seen: Vec<usize> = a.concat();
        seen.sort();
        assert_eq!(seen, (0..103).collect::<Vec<_>>());
        assert_eq!(a, shuffled(&e, 4, 1, 0));
        assert!(a != shuffled(&e, 4, 1, 1) && a != shuffled(&e, 4, 2, 0));
    }

    #[test]
    fn padding_is_masked() {
        let e = examples(3);
        let b = collate(&e, &[2, 0], HeadKind::Classes(2), 9);
        assert_eq!(b.inputs.tokens.ids, [2, 2, 2, 0, 9, 9]);
        assert_eq!(b.inputs.tokens.mask, Some(vec![true, true, true, true, false, false]));
        assert_eq!(b.targets, Targets::Classes(vec![0, 0]));
        assert_eq!(collate(&e, &[1], HeadKind::Classes(2), 9).inputs.tokens.mask, None);
    }
}
