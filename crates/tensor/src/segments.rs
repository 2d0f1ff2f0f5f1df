//! Sequences that lie one after the other, without padding between them.

use crate::{DType, Tensor};

/// Where the sequences of an unpadded batch begin, on a GPU, for kernels that have to tell them apart. The tensor behind
/// it is as large as the largest batch needs, so that the same launches serve every batch up to that:
/// [`Segments::describe`] says what to copy into it.
///
/// It begins with the first row of each sequence; those of sequences that are not there are the number of rows. Tables
/// of tiles follow, one for each tile height: which queries a block of attention takes, four numbers each: the
/// sequence's first row, its length, the tile's first query in it, 0. A tile without a sequence has length 0.
#[derive(Clone, Debug)]
pub struct Segments {
    table: Tensor,
    sequences: usize,
    tokens: usize,
}

/// Rows of queries that a block of attention takes.
pub(crate) const TILES: [usize; 3] = [64, 128, 192];

impl Segments {
    /// Numbers in the table for up to `sequences` sequences of together up to `tokens` tokens.
    pub fn size(sequences: usize, tokens: usize) -> usize {
        starts(sequences) + TILES.iter().map(|&tile| 4 * tiles(sequences, tokens, tile)).sum::<usize>()
    }

    /// Over `table`, i32 `[size]` on a GPU, which is to be filled before kernels read it. Panics for another shape.
    pub fn new(table: Tensor, sequences: usize, tokens: usize) -> Segments {
        assert_eq!((table.dtype(), table.len()), (DType::I32, Self::size(sequences, tokens)), "segments");
        Segments { table, sequences, tokens }
    }

    /// Writes the table for sequences of `lengths` into `to`. Panics if they are more, or longer, than there is room for.
    pub fn describe(&self, lengths: &[usize], to: &mut [i32]) {
        let rows: usize = lengths.iter().sum();
        assert!(
            lengths.len() <= self.sequences && rows <= self.tokens,
            "{} sequences of {rows} tokens in room for {} of {}",
            lengths.len(),
            self.sequences,
            self.tokens
        );
        to.fill(0);
        let mut first = 0;
        let (begin, mut rest) = to.split_at_mut(starts(self.sequences));
        begin[..=self.sequences].fill(rows as i32);
        let mut order = Vec::with_capacity(lengths.len());
        for (begin, &length) in begin.iter_mut().zip(lengths) {
            *begin = first as i32;
            order.push((first, length));
            first += length;
        }
        // Long sequences first: what is started last should be done soon.
        order.sort_by_key(|&(_, length)| std::cmp::Reverse(length));
        for tile in TILES {
            let (own, others) = rest.split_at_mut(4 * tiles(self.sequences, self.tokens, tile));
            let all = order.iter().flat_map(|&(first, length)| {
                (0..length).step_by(tile).map(move |query| [first, length, query, 0])
            });
            for (to, tile) in own.chunks_exact_mut(4).zip(all) {
                to.copy_from_slice(&tile.map(|n| n as i32));
            }
            rest = others;
        }
    }

    /// The most sequences there can be.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// The most rows there can be.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub(crate) fn table(&self) -> &Tensor {
        &self.table
    }

    /// Where the table of tiles of so many queries begins, in numbers, and how many tiles there can be.
    pub(crate) fn tiles(&self, tile: usize) -> (usize, usize) {
        let before = TILES.iter().take_while(|&&t| t != tile);
        let at = starts(self.sequences)
            + before.map(|&t| 4 * tiles(self.sequences, self.tokens, t)).sum::<usize>();
        (at, tiles(self.sequences, self.tokens, tile))
    }
}

/// Numbers before the tables of tiles, which begin at a multiple of 16 bytes.
fn starts(sequences: usize) -> usize {
    (sequences + 1).next_multiple_of(4)
}

/// The most tiles of `tile` rows: each sequence may have one that is not full.
fn tiles(sequences: usize, tokens: usize, tile: usize) -> usize {
    tokens / tile + sequences.min(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_query_is_in_one_tile_of_each_size() {
        let lengths = [1, 130, 0, 64, 65, 512];
        let table = Tensor::from_i32(vec![0; Segments::size(8, 900)], &[Segments::size(8, 900)]);
        let s = Segments::new(table, 8, 900);
        let mut words = vec![-1; s.table().len()];
        s.describe(&lengths, &mut words);
        assert_eq!(words[..9], [0, 1, 131, 131, 195, 260, 772, 772, 772]);
        for tile in TILES {
            let (at, count) = s.tiles(tile);
            assert_eq!(at % 4, 0);
            let mut rows = vec![0; 772];
            for t in words[at..at + 4 * count].chunks_exact(4) {
                for query in t[2]..(t[2] + tile as i32).min(t[1]) {
                    rows[(t[0] + query) as usize] += 1;
                }
            }
            assert!(rows.iter().all(|&n| n == 1), "tiles of {tile}: {rows:?}");
        }
    }

    #[test]
    fn the_largest_batches_fit() {
        for (sequences, tokens, length) in [(5, 5, 1), (4, 260, 65), (1, 512, 512), (12, 100, 8)] {
            let size = Segments::size(sequences, tokens);
            let s = Segments::new(Tensor::from_i32(vec![0; size], &[size]), sequences, tokens);
            let mut words = vec![0; size];
            let lengths: Vec<usize> = (0..tokens / length).map(|_| length).collect();
            s.describe(&lengths, &mut words);
            let rows: i32 = words[s.tiles(64).0..]
                .chunks_exact(4)
                .take(s.tiles(64).1)
                .map(|t| (t[1] - t[2]).min(64))
                .sum();
            assert_eq!(rows as usize, lengths.len() * length);
        }
    }
}
