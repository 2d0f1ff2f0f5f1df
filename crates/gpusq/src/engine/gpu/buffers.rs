//! What a pass works on: how many tokens and sequences, in which tensors, and what the host writes there.

use std::ops::Range;

use gpusq_tensor::cuda::{Arena, Layout};
use gpusq_tensor::ops::codes::Codes;
use gpusq_tensor::{DType, Segments, Tensor};

use super::maps::{Map, States};
use super::network::{Block, HeadMaps, Network};
use crate::engine::plan::Place;
use crate::inputs::Tokens;
use crate::{Error, Result};

/// What graphs are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Bucket {
    pub(super) tokens: usize,
    pub(super) sequences: usize,
}

impl Bucket {
    /// What a plan is made for: buckets of about the same size share one.
    pub(super) fn class(self, largest: Bucket) -> Bucket {
        let round = |n: usize, least: usize| n.next_multiple_of((n.next_power_of_two() / 4).max(least));
        Bucket {
            tokens: round(self.tokens, 16).min(largest.tokens),
            sequences: self.sequences.next_power_of_two().min(largest.sequences),
        }
    }

    /// The smallest that holds so many: at most a sixteenth is computed for nothing.
    pub(super) fn of(tokens: usize, sequences: usize) -> Bucket {
        let round = |n: usize, least: usize| n.next_multiple_of((n.next_power_of_two() / 32).max(least));
        Bucket { tokens: round(tokens, 16), sequences: round(sequences, 1) }
    }
}

/// Tensors of one bucket, in the arena.
pub(super) struct Buffers {
    /// All of what the host writes: the next four.
    pub(super) input: Tensor,
    pub(super) ids: Tensor,
    pub(super) positions: Tensor,
    pub(super) types: Tensor,
    pub(super) segments: Segments,
    /// f16 `[tokens, hidden]`
    pub(super) hidden: Tensor,
    /// i8 `[tokens, hidden]`
    pub(super) codes: Tensor,
    pub(super) qkv: Tensor,
    /// `[tokens, hidden]`: what attention gives.
    pub(super) mixed: Tensor,
    /// `[tokens, hidden]`: what attention's last map and the feed-forward's give.
    pub(super) added: [Tensor; 2],
    /// `[tokens, inner]`
    pub(super) inner: Tensor,
    /// The last four again, and the hidden states, of first tokens only.
    pub(super) first: Option<FirstRows>,
    /// i32 sums, or f32 outputs, of the last map.
    pub(super) sums: Option<Tensor>,
}

pub(super) struct FirstRows {
    pub(super) hidden: Tensor,
    pub(super) codes: Tensor,
    pub(super) mixed: Tensor,
    pub(super) added: [Tensor; 2],
    pub(super) inner: Tensor,
}

/// Numbers of the input block before each of its parts, and in all.
pub(super) fn input_parts(bucket: Bucket) -> [usize; 5] {
    let numbers = |n: usize| Layout::bytes(DType::I32, &[n]) / DType::I32.size();
    let sizes = [bucket.tokens; 3].into_iter().chain([Segments::size(bucket.sequences, bucket.tokens)]);
    let mut at = [0; 5];
    for (i, size) in sizes.enumerate() {
        at[i + 1] = at[i] + numbers(size);
    }
    at
}

impl Buffers {
    pub(super) fn new(arena: &Arena, network: &Network, bucket: Bucket) -> Buffers {
        let Bucket { tokens, sequences } = bucket;
        let mut parts = arena.start();
        let [ids, positions, types] = [0; 3].map(|_| parts.tensor(DType::I32, &[tokens]));
        let table = parts.tensor(DType::I32, &[Segments::size(sequences, tokens)]);
        let mut place = arena.start();
        let input = place.tensor(DType::I32, &[input_parts(bucket)[4]]);
        let Network { hidden, inner, .. } = *network;
        let mut tensor = |dtype, rows: usize, width: usize| place.tensor(dtype, &[rows, width]);
        let of = |map: fn(&Block) -> &Map| network.blocks.first().map_or(DType::I8, |b| map(b).dtype());
        let (qkv, added, inner_type) =
            (of(|b| &b.qkv), [of(|b| &b.out.map), of(|b| &b.ffn_out.map)], of(|b| &b.ffn_in));
        // What attention gives is read as the feed-forward's inner activations are: all maps are of one kind.
        let mixed = inner_type;
        let first = match network.head {
            HeadMaps::First { .. } => Some(FirstRows {
                hidden: tensor(DType::F16, sequences, hidden),
                codes: tensor(DType::I8, sequences, hidden),
                mixed: tensor(mixed, sequences, hidden),
                added: added.map(|of| tensor(of, sequences, hidden)),
                inner: tensor(inner_type, sequences, inner),
            }),
            HeadMaps::None | HeadMaps::Tokens { .. } => None,
        };
        let sums = match &network.head {
            HeadMaps::None => None,
            HeadMaps::Tokens { out, .. } => Some(tensor(out.map.dtype(), tokens, out.outputs)),
            HeadMaps::First { out, .. } => Some(tensor(out.map.dtype(), sequences, out.outputs)),
        };
        Buffers {
            input,
            ids,
            positions,
            types,
            segments: Segments::new(table, sequences, tokens),
            hidden: tensor(DType::F16, tokens, hidden),
            codes: tensor(DType::I8, tokens, hidden),
            qkv: tensor(qkv, tokens, 3 * hidden),
            mixed: tensor(mixed, tokens, hidden),
            added: added.map(|of| tensor(of, tokens, hidden)),
            inner: tensor(inner_type, tokens, inner),
            first,
            sums,
        }
    }

    /// What a map reads and writes, and the states that a norm behind it works on. A classifier's last map reads its `dense`
    /// layer's codes if there is one.
    pub(super) fn ends(
        &mut self,
        place: Place,
        first: bool,
        dense: bool,
    ) -> (&Tensor, &mut Tensor, States<'_>) {
        let sums = self.sums.as_mut();
        let sums = || sums.expect("a head has sums");
        // Which step the codes have makes no difference in time.
        let states = |hidden, to| States { hidden, codes: Some(Codes { to, step: 1.0 }) };
        match self.first.as_mut().filter(|_| first) {
            None => {
                let (x, out) = match place {
                    Place::Qkv => (&self.codes, &mut self.qkv),
                    Place::AttentionOut => (&self.mixed, &mut self.added[0]),
                    Place::FfnIn => (&self.codes, &mut self.inner),
                    Place::FfnOut => (&self.inner, &mut self.added[1]),
                    Place::HeadOut => (&self.codes, sums()),
                    Place::HeadDense => unreachable!("no map is there"),
                };
                (x, out, states(&self.hidden, &self.codes))
            }
            Some(f) => {
                let (x, out) = match place {
                    Place::AttentionOut => (&f.mixed, &mut f.added[0]),
                    Place::FfnIn => (&f.codes, &mut f.inner),
                    Place::FfnOut => (&f.inner, &mut f.added[1]),
                    Place::HeadDense => (&f.codes, &mut f.mixed),
                    Place::HeadOut => (if dense { &f.mixed } else { &f.codes }, sums()),
                    Place::Qkv => unreachable!("no map is there"),
                };
                (x, out, states(&f.hidden, &f.codes))
            }
        }
    }

    /// Bytes of the arena that a bucket needs at most.
    pub(super) fn bytes(network: &Network, bucket: Bucket) -> usize {
        let Bucket { tokens, sequences } = bucket;
        let Network { hidden, inner, .. } = *network;
        let outputs = match &network.head {
            HeadMaps::None => 0,
            HeadMaps::Tokens { out, .. } | HeadMaps::First { out, .. } => out.outputs,
        };
        let row = hidden * (2 + 1 + 6 + 2 + 2 * 2) + 2 * inner + 4 * outputs;
        // Each tensor may begin a little later than the one before it ends.
        input_parts(bucket)[4] * 4 + (tokens + sequences) * row + (64 << 10)
    }
}

/// Some sequences of a batch.
pub(super) struct Part<'a> {
    pub(super) tokens: &'a Tokens,
    /// Rows of the position table, of all tokens of the batch.
    pub(super) positions: &'a [u32],
    pub(super) lengths: &'a [usize],
    /// The first sequence.
    pub(super) begin: usize,
}

/// Which sequences go together: as many as have at most `limit` tokens.
pub(super) fn passes(lengths: &[usize], limit: usize) -> Vec<Range<usize>> {
    let mut passes: Vec<Range<usize>> = Vec::new();
    let mut sum = 0;
    for (i, &length) in lengths.iter().enumerate() {
        match passes.last_mut() {
            Some(last) if sum + length <= limit => {
                last.end = i + 1;
                sum += length;
            }
            _ => {
                passes.push(i..i + 1);
                sum = length;
            }
        }
    }
    passes
}

/// How long each sequence is without its padding.
pub(super) fn lengths(tokens: &Tokens) -> Result<Vec<usize>> {
    let Some(mask) = &tokens.mask else { return Ok(vec![tokens.length; tokens.batch]) };
    let rows = mask.chunks_exact(tokens.length).enumerate();
    rows.map(|(i, row)| {
        let length = row.iter().take_while(|&&real| real).count();
        if length == 0 || row[length..].iter().any(|&real| real) {
            return Err(Error::Mismatch(format!(
                "sequence {} of the batch is masked elsewhere than at its end; on a GPU padding comes last, and leaves a \
                 token",
                i + 1
            )));
        }
        Ok(length)
    })
    .collect()
}

impl Part<'_> {
    /// Fills the input block of a bucket.
    pub(super) fn write(&self, segments: &Segments, input: &mut [i32]) {
        let bucket = Bucket { tokens: segments.tokens(), sequences: segments.sequences() };
        let [ids, positions, types, table, end] = input_parts(bucket);
        let t = self.tokens;
        let mut row = 0;
        for (i, &length) in self.lengths.iter().enumerate() {
            let from = (self.begin + i) * t.length;
            for at in from..from + length {
                input[ids + row] = t.ids[at] as i32;
                input[positions + row] = self.positions[at] as i32;
                input[types + row] = t.types.get(at).map_or(0, |&t| t as i32);
                row += 1;
            }
        }
        let size = Segments::size(bucket.sequences, bucket.tokens);
        debug_assert!(table + size <= end);
        segments.describe(self.lengths, &mut input[table..][..size]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_they_are_for_and_little_more() {
        for n in [1, 15, 16, 17, 100, 384, 385, 1000, 3072, 12_288, 32_768] {
            let b = Bucket::of(n, n);
            assert!(
                b.tokens >= n && b.sequences >= n && Bucket::of(b.tokens, b.sequences) == b,
                "{n}: {b:?}"
            );
            assert!((b.tokens - n) * 16 <= n.max(256), "{n}: {b:?}");
        }
        assert_eq!(Bucket::of(384 * 32, 32), Bucket { tokens: 12_288, sequences: 32 });
    }

    #[test]
    fn passes_take_every_sequence_once_and_are_no_longer_than_may_be() {
        assert_eq!(passes(&[3, 4, 5, 1, 1, 9], 9), [0..2, 2..5, 5..6]);
        assert_eq!(passes(&[9], 9), [Range { start: 0, end: 1 }]);
    }

    #[test]
    fn only_padding_at_the_end_is_left_out() {
        let tokens = |mask: &[u8]| Tokens {
            batch: 2,
            length: 3,
            ids: vec![5; 6],
            types: Vec::new(),
            mask: Some(mask.iter().map(|&m| m == 1).collect()),
        };
        assert_eq!(lengths(&tokens(&[1, 1, 0, 1, 1, 1])).unwrap(), [2, 3]);
        for mask in [[1, 1, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]] {
            let e = lengths(&tokens(&mask)).unwrap_err().to_string();
            assert!(e.contains("padding comes last"), "{e}");
        }
    }
}
