//! How operations use this CPU: threads (rayon), vector units (run-time dispatch) and matrix products
//! (the `gemm` crate).

use rayon::prelude::*;

/// Elements an element-wise task should have before another thread is worth waking.
const GRAIN: usize = 16 * 1024;

/// Runs `f` compiled for the widest vector unit this CPU has. Loops in `f` are vectorised by the
/// compiler; nothing is contracted to fused multiply-add, so results do not depend on the unit.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Splits `out` in blocks of whole rows and runs `f(first_row, block)` on each, on all threads.
pub(crate) fn par_rows<T: Send>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if out.is_empty() || width == 0 {
        return;
    }
    let rows = (GRAIN / width).max(1);
    if out.len() <= GRAIN {
        return f(0, out);
    }
    out.par_chunks_mut(rows * width).enumerate().for_each(|(i, block)| f(i * rows, block));
}

/// Element-wise: `f(first_element, block)` on all threads.
pub(crate) fn par_elements<T: Send>(out: &mut [T], f: impl Fn(usize, &mut [T]) + Sync) {
    par_rows(out, 1, f);
}

/// Column sums of `[rows, width]`, in an order that does not depend on the number of threads.
pub(crate) fn column_sums(x: &[f32], width: usize) -> Vec<f32> {
    fold_rows(x.len() / width.max(1), width, |range, sum| {
        for r in range {
            for (s, v) in sum.iter_mut().zip(&x[r * width..(r + 1) * width]) {
                *s += v;
            }
        }
    })
}

/// Sums vectors of `width` over rows: `f(rows, partial)` adds a block of rows to a partial sum. Blocks
/// and the order of their sum depend on the sizes alone, never on timing, so that runs repeat exactly.
pub(crate) fn fold_rows(
    rows: usize,
    width: usize,
    f: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
) -> Vec<f32> {
    let block = (4 * GRAIN / width.max(1)).max(1);
    let partials: Vec<Vec<f32>> = (0..rows.div_ceil(block))
        .into_par_iter()
        .map(|i| {
            let mut sum = vec![0.0; width];
            simd(|| f(i * block..rows.min((i + 1) * block), &mut sum));
            sum
        })
        .collect();
    let mut total = vec![0.0; width];
    for p in &partials {
        for (t, v) in total.iter_mut().zip(p) {
            *t += v;
        }
    }
    total
}

/// A read-only matrix inside a slice: `at(r, c) = data[r * row + c * col]`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    row: usize,
    col: usize,
}

impl<'a> Mat<'a> {
    /// Row-major with `width` columns.
    pub(crate) fn rows(data: &'a [f32], width: usize) -> Self {
        Mat { data, row: width, col: 1 }
    }

    /// Row-major rows that are `stride` apart.
    pub(crate) fn strided(data: &'a [f32], stride: usize) -> Self {
        Mat { data, row: stride, col: 1 }
    }

    pub(crate) fn t(self) -> Self {
        Mat { row: self.col, col: self.row, ..self }
    }
}

/// Threads for a product.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Threads {
    /// Inside a task that already runs beside others.
    One,
    /// The whole pool.
    All,
}

/// `c = alpha * a b + beta * c` with `a` `[m, k]`, `b` `[k, n]` and `c` row-major, its rows `ldc` apart.
pub(crate) fn gemm(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: Mat,
    b: Mat,
    beta: f32,
    c: &mut [f32],
    ldc: usize,
    threads: Threads,
) {
    if m == 0 || n == 0 {
        return;
    }
    let last = |m: usize, n: usize, row: usize, col: usize| (m - 1) * row + (n - 1) * col;
    assert!(last(m, n, ldc, 1) < c.len(), "gemm: output too short");
    assert!(k == 0 || last(m, k, a.row, a.col) < a.data.len(), "gemm: left operand too short");
    assert!(k == 0 || last(k, n, b.row, b.col) < b.data.len(), "gemm: right operand too short");
    let parallel = match threads {
        // Below this much work the pool's wake-up costs more than the second core brings.
        Threads::All if m * n * k > 64 * 64 * 64 => gemm::Parallelism::Rayon(rayon::current_num_threads()),
        _ => gemm::Parallelism::None,
    };
    // SAFETY: the asserts above put every element the strides reach inside its slice, `c` is borrowed
    // mutably and so overlaps neither operand, and `read_dst` is set exactly when `c` must be read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            ldc as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallel,
        );
    }
}

/// e^x to about 2 units in the last place (Cody-Waite reduction, degree-6 polynomial); saturates
/// instead of overflowing. Written so that loops over it vectorise.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.336, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + 12_582_912.0;
    let n = shifted - 12_582_912.0;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // The low bits of `shifted` hold n as an integer; moved to the exponent they make 2^n.
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// 2^x to about 2 units in the last place, for x up to 127; 0 below -126. Written so that loops over it vectorise.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    let shifted = x.max(-126.0) + 12_582_912.0;
    let r = x - (shifted - 12_582_912.0);
    let p = 1.525_273_4e-5;
    let p = p * r + 1.540_353e-4;
    let p = p * r + 1.333_355_8e-3;
    let p = p * r + 9.618_129e-3;
    let p = p * r + 5.550_411e-2;
    let p = p * r + 2.402_265e-1;
    let p = p * r + 6.931_472e-1;
    let p = p * r + 1.0;
    if x < -126.0 { 0.0 } else { p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23) }
}

/// The f16 nearest to `x`, ties to even. Written so that loops over it vectorise.
#[inline(always)]
pub(crate) fn half(x: f32) -> f32 {
    let size = x.abs();
    let bits = size.to_bits();
    let normal = f32::from_bits(bits.wrapping_add(0xFFF + (bits >> 13 & 1)) & !0x1FFF);
    // Below 2^-14 an f16 is a multiple of 2^-24, as an f32 between 1/2 and 1 is.
    let small = (size + 0.5) - 0.5;
    let held = if size < 6.103_515_6e-5 { small } else { normal };
    let held = if size < 65_520.0 { held } else { size * f32::INFINITY };
    held.copysign(x)
}

/// tanh to 1e-7 absolute.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let e = exp(2.0 * x.clamp(-10.0, 10.0));
    (e - 1.0) / (e + 1.0)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function to a few units in the last place: an odd rational minimax fit on [-4, 4], beyond
/// which erf rounds to +-1 in f32.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let s = x * x;
    let p = -2.726_142_3e-10;
    let p = p * s + 2.770_681_5e-8;
    let p = p * s - 2.101_024e-6;
    let p = p * s - 5.692_506_5e-5;
    let p = p * s - 7.349_906e-4;
    let p = p * s - 2.954_6e-3;
    let p = p * s - 1.609_603_3e-2;
    let q = -1.456_607_2e-5;
    let q = q * s - 2.133_740_6e-4;
    let q = q * s - 1.682_827e-3;
    let q = q * s - 7.373_329e-3;
    let q = q * s - 1.426_473_9e-2;
    x * p / q
}

/// A counter-based generator (two rounds of the 32-bit Murmur finaliser): 32 random bits for `index`
/// under `key`. Needs no state, so that any element of a dropout mask can be made again in backward. Adding
/// [`ahead`] of `n` to the key counts from index `n` on.
#[inline(always)]
pub(crate) fn random(key: u64, index: u32) -> u32 {
    #[inline(always)]
    fn mix(mut h: u32) -> u32 {
        h ^= h >> 16;
        h = h.wrapping_mul(0x85EB_CA6B);
        h ^= h >> 13;
        h = h.wrapping_mul(0xC2B2_AE35);
        h ^ (h >> 16)
    }
    mix(mix(index.wrapping_mul(STRIDE).wrapping_add(key as u32)).wrapping_add((key >> 32) as u32))
}

/// What neighbouring indices of [`random`] are apart.
const STRIDE: u32 = 0x9E37_79B9;

/// The key under which [`random`] gives for `index` what `key` gives for `index + n`.
pub(crate) fn ahead(key: u64, n: u64) -> u64 {
    let low = (key as u32).wrapping_add((n as u32).wrapping_mul(STRIDE));
    key >> 32 << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// erf by its Maclaurin series, enough terms for |x| <= 4 in f64.
    fn erf_series(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn transcendentals_match_f64() {
        for i in -4000..=4000 {
            let x = i as f32 * 1e-3;
            assert!((erf(x) as f64 - erf_series(x as f64)).abs() < 4e-7, "erf {x}");
            assert!((tanh(x) as f64 - (x as f64).tanh()).abs() < 3e-7, "tanh {x}");
            let y = x * 20.0;
            let want = (y as f64).exp();
            assert!((exp(y) as f64 - want).abs() <= 4e-7 * want, "exp {y}: {} {want}", exp(y));
        }
        assert!(exp(-1e9) < 1e-37 && exp(1e9).is_finite());
    }

    /// On the grid that attention's scores lie on, halves of powers are those of the exact powers: what else computes a
    /// power to 2^-22 agrees.
    #[test]
    fn halves_of_powers_on_the_grid_are_exact() {
        for i in 0..256 * 130 {
            let x = i as f32 / -256.0;
            let exact = (f64::from(x)).exp2();
            assert!((f64::from(exp2(x)) - exact).abs() <= 2.4e-7 * exact || x < -126.0, "2^{x}");
            assert_eq!(half(exp2(x)), crate::f16::from_f64(exact).to_f32(), "2^{x}");
            for off in [1.0 - 2.4e-7, 1.0 + 2.4e-7] {
                let other = crate::f16::from_f64(exact * off);
                // Half of the smallest half is a tie itself.
                assert!(x == -25.0 || other == crate::f16::from_f64(exact), "2^{x} is next to a tie");
            }
        }
        assert_eq!([exp2(f32::NEG_INFINITY), exp2(-1e9), exp2(0.0)], [0.0, 0.0, 1.0]);
    }

    #[test]
    fn half_is_the_f16_conversion() {
        for i in 0..1u32 << 20 {
            // Every exponent, the bits around ties, and the others now and then.
            for bits in [i << 12, (i << 12) - (i != 0) as u32, (i << 12) + 1, i.wrapping_mul(0x9E37_79B9)] {
                let x = f32::from_bits(bits);
                let (got, want) = (half(x), crate::f16::from_f32(x).to_f32());
                assert!(
                    got.to_bits() == want.to_bits() || x.is_nan() && got.is_nan(),
                    "{x:e}: {got:e}, {want:e}"
                );
            }
        }
    }

    #[test]
    fn gemm_reads_strides_and_adds() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // [2,3]
        let b = [1.0, 0.0, 2.0, 0.0, 1.0, 1.0]; // [2,3], used transposed
        let mut c = vec![10.0; 6]; // two columns of rows three apart
        gemm((2, 2, 3), 2.0, Mat::rows(&a, 3), Mat::rows(&b, 3).t(), 1.0, &mut c, 3, Threads::One);
        assert_eq!(c, [24.0, 20.0, 10.0, 42.0, 32.0, 10.0]);
    }

    #[test]
    fn random_bits_are_even() {
        let n = 100_000u32;
        let mean = (0..n).map(|i| random(7, i) as f64 / u32::MAX as f64).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 5e-3, "{mean}");
        let same = (0..n).filter(|&i| random(7, i) == random(8, i)).count();
        assert!(same < 5, "{same}");
        let key = 0xDEAD_BEEF_FFFF_FF00;
        for n in [0, 1, 77, 5_000_000_000] {
            assert!(
                (0..n.min(1000) as u32)
                    .all(|i| random(ahead(key, n), i) == random(key, i.wrapping_add(n as u32)))
            );
        }
    }
}
