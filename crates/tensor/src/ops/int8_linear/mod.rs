//! The integer matrix product of the inference engine: `y = (codes · weightᵀ) · scale + bias`.
//!
//! Activations and weights are symmetric INT8 codes in -127..=127 (no zero point). Products accumulate in
//! i32, which is exact for every row shorter than 131,072, so all kernels give the same integers. A weight
//! is reordered once, by [`Int8Weight::new`], for the kernel of the CPU it runs on. 2:4 sparse weights are
//! expanded to dense codes before: no CPU has a sparse dot product.
//!
//! ```
//! use gpusq_tensor::ops::int8_linear::{Int8Weight, linear, quantize};
//!
//! let mut codes = [0i8; 3];
//! quantize(&[0.5, -1.0, 0.26], 0.5, &mut codes);
//! assert_eq!(codes, [1, -2, 1]);
//!
//! let weight = Int8Weight::new(&[1, 2, 3, /* row 1 */ 0, -1, 0], 2, 3);
//! let mut y = [0.0; 2];
//! linear(&codes, 1, &weight, &[0.5, 0.25], Some(&[10.0, 0.0]), &mut y);
//! assert_eq!(y, [10.0, 0.5]);
//! ```

mod cpu;

use std::fmt;
use std::ops::Range;

use rayon::prelude::*;

use cpu::{Kernel, Panels, Sink};

use crate::Tensor;

/// Rows of this length or more could overflow the i32 accumulator (131,072 · 128 · 128 = 2^31).
const COLS_LIMIT: usize = 131_072;

/// Tokens a thread takes at once: their codes and outputs stay in its L2 cache while it passes over the
/// weight.
const TOKENS_PER_BLOCK: usize = 64;

/// Multiply-adds that are worth waking another thread for: about 15 microseconds.
const BLOCK_WORK: usize = 1 << 22;

/// A pass over the weight costs at least as much as multiplying this many tokens: with fewer, reading the
/// weight is what takes the time.
const STREAMING_TOKENS: usize = 8;

/// Elements of [`quantize`] that are worth another thread.
const QUANTIZE_BLOCK: usize = 1 << 15;

/// A weight `[out, in]` of INT8 codes in the order that this CPU's kernel reads.
#[derive(Clone)]
pub struct Int8Weight {
    panels: Panels,
    rows: usize,
    cols: usize,
}

impl Int8Weight {
    /// Reorders row-major `codes` `[out, cols]`.
    ///
    /// Panics unless `codes` has `out * cols` elements, both are at least 1 and `cols` is below 131,072
    /// (the longest row whose sum always fits an i32).
    pub fn new(codes: &[i8], out: usize, cols: usize) -> Self {
        Self::for_kernel(Kernel::best(), codes, out, cols)
    }

    fn for_kernel(kernel: Kernel, codes: &[i8], out: usize, cols: usize) -> Self {
        assert!(out >= 1 && (1..COLS_LIMIT).contains(&cols), "INT8 weight of shape [{out}, {cols}]");
        assert_eq!(codes.len(), out * cols, "codes for an INT8 weight of shape [{out}, {cols}]");
        Int8Weight { panels: Panels::new(kernel, codes, out, cols), rows: out, cols }
    }

    /// Number of output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of input features.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

impl fmt::Debug for Int8Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Int8Weight[{}, {}] for {:?}", self.rows, self.cols, self.panels.kernel())
    }
}

/// The integer product: `acc[t, o] = Σ_i x[t, i] · w[o, i]`, exact.
///
/// `x` is `[tokens, in]`, `acc` `[tokens, out]`, both row-major; panics if a length disagrees.
pub fn matmul_i32(x: &[i8], tokens: usize, w: &Int8Weight, acc: &mut [i32]) {
    assert_eq!(acc.len(), tokens * w.rows, "accumulators for {tokens} tokens of {w:?}");
    run(x, tokens, w, &Sink::I32(acc.as_mut_ptr()));
}

/// The quantised linear layer: `y[t, o] = acc[t, o] as f32 * scale[o] + bias[o]`, with `acc` as in
/// [`matmul_i32`] and `scale` `[out]` the input's scale times the weight row's.
///
/// The multiplication and the addition are rounded separately (no fused multiply-add), in that order, so
/// that fake quantisation, which evaluates the same expression, agrees to the last bit; without a bias
/// nothing is added. `x` is `[tokens, in]`, `y` `[tokens, out]`, both row-major; panics if a length
/// disagrees.
pub fn linear(x: &[i8], tokens: usize, w: &Int8Weight, scale: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    assert_eq!(y.len(), tokens * w.rows, "outputs for {tokens} tokens of {w:?}");
    assert_eq!(scale.len(), w.rows, "scales of {w:?}");
    assert!(bias.is_none_or(|b| b.len() == w.rows), "biases of {w:?}");
    run(x, tokens, w, &Sink::F32 { y: y.as_mut_ptr(), scale, bias });
}

/// [`linear`] into a new tensor `[tokens, out]`.
pub fn apply(x: &[i8], tokens: usize, w: &Int8Weight, scale: &[f32], bias: Option<&[f32]>) -> Tensor {
    let mut y = Tensor::stale(&[tokens, w.rows]);
    linear(x, tokens, w, scale, bias, y.f32_mut());
    y
}

/// Splits the product into blocks of tokens by panels of outputs and computes them on all threads.
fn run(x: &[i8], tokens: usize, w: &Int8Weight, sink: &Sink<'_>) {
    assert_eq!(x.len(), tokens * w.cols, "codes of {tokens} tokens for {w:?}");
    if tokens == 0 {
        return;
    }
    let panels = w.panels.count();
    let work = tokens.max(STREAMING_TOKENS) * w.rows * w.cols;
    // Four blocks a thread, so that one that was held up leaves the others something to take over.
    let wanted = match rayon::current_num_threads() {
        1 => 1,
        threads => (work / BLOCK_WORK).clamp(1, 4 * threads),
    };
    let tile = w.panels.kernel().tokens();
    let token_blocks =
        tokens.div_ceil(TOKENS_PER_BLOCK).max(wanted.div_ceil(panels)).min(tokens.div_ceil(tile));
    let tokens_each = tokens.div_ceil(token_blocks).next_multiple_of(tile).min(TOKENS_PER_BLOCK);
    let token_blocks = tokens.div_ceil(tokens_each);
    let panels_each = panels.div_ceil(wanted.div_ceil(token_blocks).min(panels));
    let panel_blocks = panels.div_ceil(panels_each);

    let block = |i: usize| {
        // Neighbouring blocks share their tokens, so that a thread that takes several keeps them in cache.
        let rows = part(i / panel_blocks, tokens_each, tokens);
        let panels = part(i % panel_blocks, panels_each, panels);
        // SAFETY: the lengths of `x` and of the sink were checked against `tokens` and the weight, and no two
        // blocks have an output (token, panel) in common.
        unsafe { w.panels.multiply(x, rows, panels, sink) };
    };
    if wanted == 1 {
        (0..token_blocks * panel_blocks).for_each(block);
    } else {
        (0..token_blocks * panel_blocks).into_par_iter().with_max_len(1).for_each(block);
    }
}

fn part(index: usize, each: usize, total: usize) -> Range<usize> {
    index * each..((index + 1) * each).min(total)
}

/// The INT8 codes of `x` on the grid of step `scale`: `clamp(round(x / scale), -127, 127)`.
///
/// Rounds half to even after a true f32 division (as fake quantisation does); infinities saturate and NaN
/// becomes 0. Panics unless `codes` is as long as `x`.
pub fn quantize(x: &[f32], scale: f32, codes: &mut [i8]) {
    assert_eq!(x.len(), codes.len(), "codes for {} values", x.len());
    let kernel = Kernel::best();
    if x.len() < 2 * QUANTIZE_BLOCK {
        return kernel.quantize(x, scale, codes);
    }
    codes
        .par_chunks_mut(QUANTIZE_BLOCK)
        .zip(x.par_chunks(QUANTIZE_BLOCK))
        .for_each(|(codes, x)| kernel.quantize(x, scale, codes));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(x: &[i8], tokens: usize, w: &[i8], out: usize, cols: usize) -> Vec<i64> {
        let mut acc = Vec::with_capacity(tokens * out);
        for t in 0..tokens {
            for o in 0..out {
                let products = x[t * cols..][..cols].iter().zip(&w[o * cols..][..cols]);
                acc.push(products.map(|(&a, &b)| i64::from(a) * i64::from(b)).sum());
            }
        }
        acc
    }

    /// Codes in -127..=127 from a seed; a few rows of one sign and full size, which make the largest sums.
    fn codes(rows: usize, cols: usize, seed: u64) -> Vec<i8> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as i64
        };
        let mut codes = Vec::with_capacity(rows * cols);
        for _ in 0..rows {
            match next() % 8 {
                0 => codes.resize(codes.len() + cols, 127),
                1 => codes.resize(codes.len() + cols, -127),
                _ => codes.extend((0..cols).map(|_| (next() % 255 - 127) as i8)),
            }
        }
        codes
    }

    /// Every kernel of this CPU gives the naive integers, and from them the bits of the scalar epilogue.
    fn check(x: &[i8], tokens: usize, w: &[i8], out: usize, cols: usize) {
        let expected = naive(x, tokens, w, out, cols);
        // Scales and biases of many magnitudes and signs: a fused or reordered epilogue rounds differently.
        let scale: Vec<f32> = (0..out).map(|o| (o as f32 * 0.37).sin() * 1e-3 + 1.1e-3).collect();
        let bias: Vec<f32> = (0..out).map(|o| (o as f32 * 1.3).cos() * 3.0).collect();
        for kernel in Kernel::available() {
            let weight = Int8Weight::for_kernel(kernel, w, out, cols);
            // Values that a kernel must overwrite, not add to; and a guard that it must leave alone.
            let mut acc = vec![i32::MIN; tokens * out + 64];
            matmul_i32(x, tokens, &weight, &mut acc[..tokens * out]);
            assert!(acc[tokens * out..].iter().all(|&a| a == i32::MIN), "{weight:?} wrote beyond the end");
            for (i, (&got, &want)) in acc.iter().zip(&expected).enumerate() {
                assert_eq!(i64::from(got), want, "{weight:?}, token {}, output {}", i / out, i % out);
            }
            for bias in [None, Some(&bias[..])] {
                let mut y = vec![f32::NAN; tokens * out + 64];
                linear(x, tokens, &weight, &scale, bias, &mut y[..tokens * out]);
                assert!(y[tokens * out..].iter().all(|y| y.is_nan()), "{weight:?} wrote beyond the end");
                for i in 0..tokens * out {
                    let mut want = acc[i] as f32 * scale[i % out];
                    if let Some(bias) = bias {
                        want += bias[i % out];
                    }
                    assert_eq!(y[i].to_bits(), want.to_bits(), "{weight:?}: {} for {want} at {i}", y[i]);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_kernel_is_exact(tokens in 1usize..40, out in 1usize..140, cols in 1usize..300, seed: u64) {
            let (x, w) = (codes(tokens, cols, seed), codes(out, cols, !seed));
            check(&x, tokens, &w, out, cols);
        }

        #[test]
        fn quantize_agrees_with_the_definition(
            x in prop::collection::vec(any::<f32>(), 0..200),
            near in prop::collection::vec(-300.0f32..300.0, 0..200),
            scale in prop_oneof![1e-6f32..10.0, Just(0.5), Just(1.0), Just(f32::MIN_POSITIVE), Just(1e-40)],
        ) {
            let x: Vec<f32> = x.into_iter().chain(near.into_iter().map(|v| v * scale)).collect();
            check_quantize(&x, scale);
        }
    }

    #[test]
    fn extreme_codes_do_not_saturate() {
        for cols in [1, 2, 3, 4, 5, 63, 64, 65, 4095, 4096] {
            for (a, b) in [(127, 127), (127, -127), (-127, 127), (-127, -127), (-128, -128), (-128, 127)] {
                check(&vec![a; 9 * cols], 9, &vec![b; 50 * cols], 50, cols);
            }
        }
    }

    #[test]
    fn every_remainder_of_tokens_and_outputs_is_covered() {
        let cols = 13;
        for tokens in 1..=17 {
            for out in 1..=100 {
                check(&codes(tokens, cols, 5), tokens, &codes(out, cols, 7), out, cols);
            }
        }
    }

    #[test]
    fn the_longest_row_fits_the_accumulator() {
        let cols = COLS_LIMIT - 1;
        for (a, b) in [(-128, -128), (127, 127), (127, -128)] {
            check(&vec![a; 2 * cols], 2, &vec![b; 3 * cols], 3, cols);
        }
    }

    #[test]
    fn large_products_are_split_without_gaps() {
        for (tokens, out, cols) in
            [(1, 3000, 999), (7, 1000, 640), (600, 200, 70), (257, 49, 129), (2000, 1, 600)]
        {
            check(&codes(tokens, cols, 3), tokens, &codes(out, cols, 4), out, cols);
        }
    }

    #[test]
    fn no_tokens_is_no_work() {
        let w = Int8Weight::new(&[1, 2, 3, 4], 2, 2);
        linear(&[], 0, &w, &[1.0; 2], None, &mut []);
        matmul_i32(&[], 0, &w, &mut []);
        assert_eq!((w.rows(), w.cols()), (2, 2));
    }

    #[test]
    #[should_panic(expected = "codes of 2 tokens")]
    fn too_few_activations_are_refused() {
        let w = Int8Weight::new(&[1, 2, 3, 4], 2, 2);
        matmul_i32(&[1, 2, 3], 2, &w, &mut [0; 4]);
    }

    #[test]
    #[should_panic(expected = "scales of")]
    fn too_few_scales_are_refused() {
        let w = Int8Weight::new(&[1, 2, 3, 4], 2, 2);
        linear(&[1, 2], 1, &w, &[1.0], None, &mut [0.0; 2]);
    }

    #[test]
    #[should_panic(expected = "biases of")]
    fn too_few_biases_are_refused() {
        let w = Int8Weight::new(&[1, 2, 3, 4], 2, 2);
        linear(&[1, 2], 1, &w, &[1.0; 2], Some(&[1.0]), &mut [0.0; 2]);
    }

    /// `quantize`, and each kernel's share of it, against the definition spelled out in order.
    fn check_quantize(x: &[f32], scale: f32) {
        let expected: Vec<i8> = x
            .iter()
            .map(|&x| {
                let rounded = (x / scale).round_ties_even();
                if rounded.is_nan() { 0 } else { rounded.clamp(-127.0, 127.0) as i8 }
            })
            .collect();
        let mut codes = vec![99; x.len()];
        quantize(x, scale, &mut codes);
        assert_eq!(codes, expected, "scale {scale:e}");
        for kernel in Kernel::available() {
            codes.fill(99);
            kernel.quantize(x, scale, &mut codes);
            for i in 0..x.len() {
                assert_eq!(codes[i], expected[i], "{kernel:?}: {:e} at scale {scale:e}", x[i]);
            }
        }
    }

    #[test]
    fn quantize_at_the_edges() {
        let mut x = vec![0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN];
        x.extend([f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, -1e-45, 1e-39, 5.9e-39]);
        for half in -260..=260 {
            // Every tie and its two neighbours.
            let tie = half as f32 / 2.0;
            x.extend([tie, tie.next_up(), tie.next_down()]);
        }
        for scale in [1.0, 0.5, 0.1, 3.0, 1e-3, 1e-38, 1e-40, 1e-45, 1e38, 0.0, f32::INFINITY, f32::NAN] {
            let scaled: Vec<f32> = x.iter().map(|x| x * scale).collect();
            check_quantize(&x, scale);
            check_quantize(&scaled, scale);
        }
    }

    #[test]
    fn quantize_divides() {
        // A value whose quotient is exactly 2.5, while its product with the rounded reciprocal is not: with
        // such values multiplying would give other codes than fake quantisation.
        let mut differ = 0;
        for i in 1..2000 {
            let scale = 0.001 + i as f32 * 1.7e-5;
            let x = [scale * 2.5, scale * 3.5, scale * 100.5];
            check_quantize(&x, scale);
            differ += x
                .iter()
                .filter(|&&x| (x / scale).round_ties_even() != (x * (1.0 / scale)).round_ties_even())
                .count();
        }
        assert!(differ > 0, "the values do not tell division from multiplication");
    }

    #[test]
    fn quantize_covers_large_inputs() {
        let x: Vec<f32> = (0..5 * QUANTIZE_BLOCK + 11).map(|i| (i as f32 * 0.01).sin() * 2.0).collect();
        check_quantize(&x, 0.0123);
    }
}
