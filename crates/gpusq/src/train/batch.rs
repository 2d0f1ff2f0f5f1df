//! Examples become padded batches, in an order that depends on seed and epoch alone, and batches parts.

use std::ops::Range;

use gpusq_tensor::Part;

use crate::config;
use crate::distill::{Share, Targets};
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

/// A part of a batch that is computed at once (the whole, where it fits).
#[derive(Clone, Debug, PartialEq)]
pub struct MicroBatch {
    /// Its sequences, padded as those of the batch are.
    pub batch: Batch,
    /// Which they are.
    pub part: Part,
    /// How much of the loss is theirs.
    pub share: Share,
}

impl From<Batch> for MicroBatch {
    fn from(batch: Batch) -> Self {
        MicroBatch { batch, part: Part::WHOLE, share: Share::WHOLE }
    }
}

/// `0..n` in `parts` ranges, each as long as the next or longer by one.
fn cut(n: usize, parts: usize) -> impl Iterator<Item = Range<usize>> {
    (0..parts).map(move |i| i * n / parts..(i + 1) * n / parts)
}

impl Batch {
    /// What process `rank` of `size` computes of the batch, at most `most` sequences at a time; `taught` says whether
    /// there is a teacher. The losses of all parts sum to that of the batch, and so do the gradients.
    pub fn parts(&self, rank: usize, size: usize, most: usize, taught: bool) -> Vec<MicroBatch> {
        let own = cut(self.inputs.tokens.batch, size).nth(rank).expect("a rank is below the number of ranks");
        if own.is_empty() {
            // Fewer sequences than processes. All have the same work to agree on, and so this one's counts nothing.
            return vec![MicroBatch { share: Share::NOTHING, ..self.part(0..1, taught) }];
        }
        let pieces = cut(own.len(), own.len().div_ceil(most.max(1)));
        pieces.map(|r| self.part(own.start + r.start..own.start + r.end, taught)).collect()
    }

    /// Sequences `range`.
    fn part(&self, range: Range<usize>, taught: bool) -> MicroBatch {
        let whole = &self.inputs.tokens;
        let part = Part { first: range.start, count: range.len(), of: whole.batch };
        if range.len() == whole.batch {
            return MicroBatch { part, ..self.clone().into() };
        }
        let rows = |width: usize| range.start * width..range.end * width;
        let tokens = |t: &Tokens| Tokens {
            batch: range.len(),
            length: t.length,
            ids: t.ids[rows(t.length)].to_vec(),
            types: if t.types.is_empty() { Vec::new() } else { t.types[rows(t.length)].to_vec() },
            mask: t.mask.as_ref().map(|m| m[rows(t.length)].to_vec()).filter(|m| m.iter().any(|m| !m)),
        };
        let targets = match &self.targets {
            Targets::Classes(l) => Targets::Classes(l[range.clone()].to_vec()),
            Targets::Values(v) => Targets::Values(v[range.clone()].to_vec()),
            Targets::Spans { start, end } => {
                Targets::Spans { start: start[range.clone()].to_vec(), end: end[range.clone()].to_vec() }
            }
            Targets::Tokens(l) => Targets::Tokens(l[rows(l.len() / whole.batch)].to_vec()),
        };
        let inputs = Inputs { tokens: tokens(whole), target: self.inputs.target.as_ref().map(tokens) };
        let share = Share::new((&inputs.tokens, &targets), (whole, &self.targets), taught);
        MicroBatch { batch: Batch { inputs, targets }, part, share }
    }
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
    let mut random = Shuffle::of_epoch(seed, epoch);
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

/// The batches of one epoch of training as `fit` says: new ones, or the first epoch's in another order.
pub fn epoch(examples: &[Example], fit: &config::Fit, seed: u64, epoch: usize) -> Vec<Vec<usize>> {
    if !fit.fixed_batches || epoch == 0 {
        return shuffled(examples, fit.batch_size, seed, epoch);
    }
    let mut batches = shuffled(examples, fit.batch_size, seed, 0);
    Shuffle::of_epoch(seed, epoch).shuffle(&mut batches);
    batches
}

/// SplitMix64 (Steele et al. 2014) with Fisher-Yates.
struct Shuffle(u64);

impl Shuffle {
    fn of_epoch(seed: u64, epoch: usize) -> Self {
        Shuffle(seed ^ (epoch as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

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
    fn fixed_batches_come_in_another_order_every_epoch() {
        let e = examples(103);
        let fit = |fixed_batches| config::Fit { batch_size: 4, fixed_batches, ..config::Fit::default() };
        let of = |n| epoch(&e, &fit(true), 1, n);
        let sorted = |mut batches: Vec<Vec<usize>>| {
            batches.sort();
            batches
        };
        assert!(of(0) == shuffled(&e, 4, 1, 0) && of(0) != of(1) && of(1) != of(2));
        assert!(sorted(of(0)) == sorted(of(1)) && sorted(of(0)) == sorted(of(2)));
        let new = |n| epoch(&e, &fit(false), 1, n);
        assert!(new(1) == shuffled(&e, 4, 1, 1) && sorted(new(0)) != sorted(new(1)));
    }

    #[test]
    fn parts_are_the_batch_cut_and_their_shares_sum_to_it() {
        let e = examples(13);
        let which: Vec<usize> = (0..11).collect();
        let whole = collate(&e, &which, HeadKind::Classes(2), 9);
        assert_eq!(
            whole.parts(0, 1, 100, true),
            [MicroBatch { part: Part { first: 0, count: 11, of: 11 }, ..whole.clone().into() }]
        );
        for (size, most) in [(1, 1), (1, 4), (2, 100), (3, 2), (4, 3), (11, 1)] {
            let parts: Vec<MicroBatch> = (0..size).flat_map(|r| whole.parts(r, size, most, true)).collect();
            assert!(
                parts.iter().all(|p| p.part.count <= most && p.part.count == p.batch.inputs.tokens.batch)
            );
            let firsts: Vec<usize> = parts.iter().map(|p| p.part.first).collect();
            let ends = parts.iter().map(|p| p.part.first + p.part.count);
            assert_eq!(firsts, std::iter::once(0).chain(ends).take(parts.len()).collect::<Vec<_>>());
            let ids: Vec<u32> = parts.iter().flat_map(|p| p.batch.inputs.tokens.ids.clone()).collect();
            assert_eq!(ids, whole.inputs.tokens.ids);
            let labels = parts.iter().map(|p| match &p.batch.targets {
                Targets::Classes(l) => l.clone(),
                _ => unreachable!(),
            });
            assert_eq!(Targets::Classes(labels.flatten().collect()), whole.targets);
        }
        // Beyond the batch's sequences there is nothing to do, and it counts nothing.
        let idle = whole.parts(0, 12, 4, true);
        assert!(idle.len() == 1 && idle[0].share == Share::NOTHING);
        // Padding of the batch is none of a part that has the longest alone.
        let long = whole.parts(6, 11, 1, true);
        assert!(whole.inputs.tokens.mask.is_some() && long[0].batch.inputs.tokens.mask.is_none());
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
