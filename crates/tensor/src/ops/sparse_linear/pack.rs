//! The order in which kernels read a weight: what a lane multiplies at a time lies together.
//!
//! Blocks of 64 rows x 128 inputs follow each other along a row of blocks; what is missing at the ends is zero. A
//! block has the steps of the tensor cores one after the other (64 inputs if sparse, of which 32 are kept, or 32), in
//! each the 16 bytes of 128 threads; then, if sparse, the 4 bytes of indices of 128 threads for each step.
//!
//! Thread `32 w + 4 g + t` holds codes `4 t..` and `16 + 4 t..` of rows `g` and `g + 8` of the 16 rows of warp `w`,
//! as mma and wgmma define. Row `g` is feature `2 g` and row `g + 8` feature `2 g + 1`, so that a thread ends up with
//! two neighbouring features. The indices of a row's inputs 0..32 are those of thread `4 g` (row `g + 8`: `4 g + 1`),
//! of inputs 32..64 those of `4 g + 2` (`4 g + 3`).

use rayon::prelude::*;

/// Rows of a block.
pub(super) const ROWS: usize = 64;

/// Inputs of a block.
pub(super) const COLS: usize = 128;

/// The indices of a group that keeps nothing: two distinct positions, as the hardware asks.
const ANY: u8 = 0x4;

/// Bytes of a block.
pub(super) fn block_bytes(sparse: bool) -> usize {
    if sparse { ROWS * COLS / 2 + ROWS * COLS / 8 } else { ROWS * COLS }
}

/// A dense weight `[rows, cols]`.
pub(super) fn dense(codes: &[i8], rows: usize, cols: usize) -> Vec<i8> {
    blocks(
        rows,
        cols,
        |block, row0, col0| {
            let code = |row: usize, col: usize| {
                if row < rows && col < cols { codes[row * cols + col] } else { 0 }
            };
            for (step, part) in block.chunks_exact_mut(2048).enumerate() {
                fragments(part, |row, col| code(row0 + row, col0 + step * 32 + col));
            }
        },
        false,
    )
}

/// A 2:4 weight `[rows, cols]` from the codes `[rows, cols / 2]` and indices `[rows, ceil(cols / 8)]` of the packed
/// format.
pub(super) fn sparse(values: &[i8], meta: &[u8], rows: usize, cols: usize) -> Vec<i8> {
    let (kept, pairs) = (cols / 2, cols.div_ceil(8));
    blocks(
        rows,
        cols,
        |block, row0, col0| {
            let (codes, indices) = block.split_at_mut(ROWS * COLS / 2);
            let value = |row: usize, col: usize| {
                if row < rows && col < kept { values[row * kept + col] } else { 0 }
            };
            // Two bits for each of two kept inputs of the group.
            let nibble = |row: usize, group: usize| {
                if row >= rows || group * 4 >= cols {
                    return ANY;
                }
                meta[row * pairs + group / 2] >> (group % 2 * 4) & 15
            };
            for (step, part) in codes.chunks_exact_mut(2048).enumerate() {
                fragments(part, |row, col| value(row0 + row, (col0 + step * 64) / 2 + col));
            }
            for (step, part) in indices.chunks_exact_mut(512).enumerate() {
                for (thread, word) in part.chunks_exact_mut(4).enumerate() {
                    let (warp, g, half, side) = (thread / 32, thread / 4 % 8, thread & 1, thread >> 1 & 1);
                    let row = row0 + warp * 16 + 2 * g + half;
                    let group = (col0 + step * 64 + side * 32) / 4;
                    for (k, byte) in word.iter_mut().enumerate() {
                        *byte = (nibble(row, group + 2 * k) | nibble(row, group + 2 * k + 1) << 4) as i8;
                    }
                }
            }
        },
        true,
    )
}

/// Fills each block, given its first row and input.
fn blocks(rows: usize, cols: usize, fill: impl Fn(&mut [i8], usize, usize) + Sync, sparse: bool) -> Vec<i8> {
    let along = cols.div_ceil(COLS);
    let mut out = vec![0; rows.div_ceil(ROWS) * along * block_bytes(sparse)];
    out.par_chunks_exact_mut(block_bytes(sparse)).enumerate().for_each(|(k, block)| {
        fill(block, k / along * ROWS, k % along * COLS);
    });
    out
}

/// The 16 bytes of each of 128 threads, of codes at (feature of 64, place of 32).
fn fragments(part: &mut [i8], code: impl Fn(usize, usize) -> i8) {
    for (thread, bytes) in part.chunks_exact_mut(16).enumerate() {
        let (warp, g, t) = (thread / 32, thread / 4 % 8, thread % 4);
        for (k, byte) in bytes.iter_mut().enumerate() {
            let (word, b) = (k / 4, k % 4);
            *byte = code(warp * 16 + 2 * g + word % 2, word / 2 * 16 + 4 * t + b);
        }
    }
}
