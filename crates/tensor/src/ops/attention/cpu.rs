use rayon::prelude::*;

use super::Attention;
use super::rounding::{GRID, LARGEST, ONES, ROOM, SCALE, TILE};
use crate::Tensor;
use crate::cpu::{Mat, Threads, exp, exp2, gemm, half, par_elements, simd};
use crate::ops::dropout::Drop;

/// A tensor's elements that several tasks write at once, each its own heads' columns.
struct Shared(*mut f32, usize);
// SAFETY: `columns` hands out overlapping slices, but tasks write disjoint elements only: each
// (sequence, head) pair belongs to one task, and a task writes the columns of its heads in the rows of
// its sequence.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(t: &mut Tensor) -> Self {
        let s = t.f32_mut();
        Shared(s.as_mut_ptr(), s.len())
    }

    /// The elements from `at` on.
    #[allow(clippy::mut_from_ref)]
    fn from(&self, at: usize) -> &mut [f32] {
        assert!(at <= self.1);
        // SAFETY: in bounds by the assert; see `Sync` above for aliasing.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), self.1 - at) }
    }
}

/// Sum in sixteen lanes. Zeros behind a row change nothing.
#[inline(always)]
fn padded_sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for c in x.chunks(16) {
        for (l, v) in lanes.iter_mut().zip(c) {
            *l += v;
        }
    }
    lanes.iter().sum()
}

impl Attention {
    /// Scores of one row become weights of the keys query `i` of sequence `b` may see, those that the pattern drops with a
    /// minus before them; returns their sum, 1 of a row without a key. Scores are in units of `unit`, in bits, where the
    /// attention rounds as the engine; `order` is memory for a row.
    fn weigh_row(&self, row: &mut [f32], order: &mut [f32], unit: f32, b: usize, i: usize) -> f32 {
        let mut sum = 1.0;
        let seen = if self.causal {
            (i + 1 + self.keys).saturating_sub(self.queries).min(self.keys)
        } else {
            self.keys
        };
        let mask = self.key_mask.as_ref().map(|m| &m[b * self.keys..b * self.keys + seen]);
        simd(|| {
            row[seen..].fill(f32::NEG_INFINITY);
            if let Some(mask) = mask {
                for (v, &m) in row.iter_mut().zip(mask) {
                    *v = if m { *v } else { f32::NEG_INFINITY };
                }
            }
            let mut lanes = [f32::NEG_INFINITY; 16];
            for c in row.chunks(16) {
                for (l, v) in lanes.iter_mut().zip(c) {
                    *l = if *v > *l { *v } else { *l };
                }
            }
            let max = lanes.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
            if max == f32::NEG_INFINITY {
                row.fill(0.0);
                return;
            }
            if let Some((keep, of)) = self.pattern {
                order.copy_from_slice(row);
                keep_largest(order, keep, of);
            }
            if let Some(half) = &self.half {
                sum = half_weights(row, unit, half.steps.is_some(), self.pattern.is_some());
            } else {
                for v in row.iter_mut() {
                    // exp saturates far below any score that counts; a masked key must be exactly 0.
                    *v = if *v == f32::NEG_INFINITY { 0.0 } else { exp(*v - max) };
                }
                sum = padded_sum(row);
            }
            if self.pattern.is_some() {
                for (v, o) in row.iter_mut().zip(order.iter()) {
                    *v = if *o == DROPPED { -*v } else { *v };
                }
            }
        });
        sum
    }

    /// The weights that pattern and dropout leave of the probabilities `p` of one row; `index` counts the row's first
    /// element.
    fn thin_row(&self, thinned: &mut [f32], p: &[f32], index: usize, drop: Option<Drop>) {
        simd(|| {
            for (t, p) in thinned.iter_mut().zip(p) {
                *t = if *p < 0.0 { 0.0 } else { *p };
            }
            if let Some(d) = drop {
                for (j, v) in thinned.iter_mut().enumerate() {
                    *v *= d.at((index + j) as u32);
                }
            }
        });
    }

    /// Queries, keys and values as the engine's kernels read them, the unit of scores in bits, and that of values.
    fn halved(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> ([Tensor; 3], f32, f32) {
        match self.half.as_ref().and_then(|h| h.steps.as_ref()) {
            Some(steps) => {
                let [qs, ks, vs] = steps.each_ref().map(Tensor::item);
                let codes = |x: &Tensor, step: f32| {
                    // A code times its step is within a unit in the last place of that.
                    let inverse = 1.0 / step;
                    map(x, |x| (x * inverse).round_ties_even())
                };
                ([codes(q, qs), codes(k, ks), codes(v, vs)], super::score_unit(self.scale, qs, ks), vs)
            }
            None => ([q, k, v].map(|x| map(x, half)), super::score_unit(self.scale, 1.0, 1.0), 1.0),
        }
    }
}

fn scale(x: &mut [f32], factor: f32) {
    simd(|| x.iter_mut().for_each(|x| *x *= factor));
}

/// Scores become weights as [`super::Half`] says; returns their sum.
#[inline(always)]
fn half_weights(row: &mut [f32], unit: f32, codes: bool, pattern: bool) -> f32 {
    let (grid, scale, room) = if codes { (GRID, SCALE, ROOM) } else { (0.0, 0.0, 0.0) };
    let mut base = f32::NEG_INFINITY;
    let mut huge = false;
    let mut sum = 0.0;
    let mut begin = 0;
    while begin < row.len() {
        let (before, after) = row.split_at_mut(begin);
        let tile = after.len().min(TILE);
        let tile = &mut after[..tile];
        begin += TILE;
        let mut lanes = [f32::NEG_INFINITY; 16];
        for c in tile.chunks(16) {
            for (l, v) in lanes.iter_mut().zip(c) {
                *l = if *v > *l { *v } else { *l };
            }
        }
        let top = lanes.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
        let bits = top * unit;
        if top > f32::NEG_INFINITY && if huge { top > base } else { bits >= base + room } {
            let large = bits.abs() >= LARGEST;
            let next = if large { top } else { bits.ceil() };
            let fall = match (huge, large) {
                (true, true) => (base - next) * unit,
                (true, false) => base * unit - next,
                (false, true) => base - bits,
                (false, false) => base - next,
            };
            let shrink = exp2(fall);
            (base, huge) = (next, large);
            sum *= shrink;
            before.iter_mut().for_each(|w| *w *= shrink);
        }
        // All keys so far are masked.
        if base == f32::NEG_INFINITY {
            tile.fill(0.0);
            continue;
        }
        for v in tile.iter_mut() {
            let bits = if huge { (*v - base) * unit + grid } else { v.mul_add(unit, grid - base) };
            *v = exp2(bits - (grid + scale));
        }
        let mut lanes = [0.0f32; 16];
        for c in tile.chunks(16) {
            for (l, v) in lanes.iter_mut().zip(c) {
                *l += if !codes {
                    *v
                } else if pattern {
                    (v + ONES) - ONES
                } else {
                    half(*v)
                };
            }
        }
        sum += lanes.iter().sum::<f32>();
        for v in tile.iter_mut() {
            *v = half(*v);
        }
    }
    sum
}

fn map(x: &Tensor, f: impl Fn(f32) -> f32 + Sync) -> Tensor {
    let mut out = Tensor::stale(x.shape());
    let x = x.f32();
    par_elements(out.f32_mut(), |at, block| {
        simd(|| block.iter_mut().zip(&x[at..]).for_each(|(o, x)| *o = f(*x)));
    });
    out
}

/// What [`keep_largest`] leaves of a score that falls. No score is it: NaN would give no weight either.
const DROPPED: f32 = f32::MIN;

/// Marks all but the `keep` largest of each group of `of` values as [`DROPPED`], ties to the lower index.
#[inline(always)]
fn keep_largest(p: &mut [f32], keep: usize, of: usize) {
    if (keep, of) == (2, 4) {
        let mut groups = p.chunks_exact_mut(4);
        for g in &mut groups {
            // An element falls if two others beat it; comparing without branches lets this vectorise.
            let [a, b, c, d] = [g[0], g[1], g[2], g[3]];
            let (ba, ca, da) = ((b > a) as u8, (c > a) as u8, (d > a) as u8);
            let (cb, db, dc) = ((c > b) as u8, (d > b) as u8, (d > c) as u8);
            g[0] = if ba + ca + da < 2 { a } else { DROPPED };
            g[1] = if (1 - ba) + cb + db < 2 { b } else { DROPPED };
            g[2] = if (1 - ca) + (1 - cb) + dc < 2 { c } else { DROPPED };
            g[3] = if (1 - da) + (1 - db) + (1 - dc) < 2 { d } else { DROPPED };
        }
        return general(groups.into_remainder(), 2, 4);
    }
    general(p, keep, of)
}

fn general(p: &mut [f32], keep: usize, of: usize) {
    let mut top = [0usize; 256];
    for group in p.chunks_mut(of) {
        if group.len() <= keep {
            continue;
        }
        // Insertion into the list of the best so far, in falling order; an equal later element stays behind.
        let mut n = 0;
        for i in 0..group.len() {
            let mut at = n;
            while at > 0 && group[i] > group[top[at - 1]] {
                at -= 1;
            }
            if at < keep {
                n = (n + 1).min(keep);
                top.copy_within(at..n - 1, at + 1);
                top[at] = i;
            }
        }
        let mut kept = [false; 256];
        for &i in &top[..n] {
            kept[i] = true;
        }
        for (v, k) in group.iter_mut().zip(kept) {
            if !k {
                *v = DROPPED;
            }
        }
    }
}

/// The output and, if `keep`, the full softmax `[batch, heads, queries, keys]`.
pub(super) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    s: &Attention,
    drop: Option<Drop>,
    keep: bool,
) -> (Tensor, Option<Tensor>) {
    let d = q.width() / s.heads;
    let (qw, kw) = (s.heads * d, s.kv_heads * d);
    let plane = s.queries * s.keys;
    let mut out = Tensor::stale(q.shape());
    let mut saved = keep.then(|| Tensor::stale(&[s.batch, s.heads, s.queries, s.keys]));
    let thin = s.pattern.is_some() || drop.is_some();
    let to = Shared::new(&mut out);
    let rounded = s.half.is_some().then(|| s.halved(q, k, v));
    let (q, k, v, factor, unit, value) = match &rounded {
        Some(([q, k, v], unit, value)) => (q, k, v, 1.0, *unit, *value),
        None => (q, k, v, s.scale, 1.0, 1.0),
    };
    let head = |bh: usize, p: &mut [f32], scratch: &mut [f32], sums: &mut [f32]| {
        let (b, h) = (bh / s.heads, bh % s.heads);
        let g = h / (s.heads / s.kv_heads);
        let at_q = b * s.queries * qw + h * d;
        let at_k = b * s.keys * kw + g * d;
        let (qm, km) = (Mat::strided(&q.f32()[at_q..], qw), Mat::strided(&k.f32()[at_k..], kw));
        gemm((s.queries, s.keys, d), factor, qm, km.t(), 0.0, p, s.keys, Threads::One);
        for (i, (row, sum)) in p.chunks_exact_mut(s.keys).zip(sums.iter_mut()).enumerate() {
            let order = scratch.get_mut(..s.keys).unwrap_or_default();
            *sum = s.weigh_row(row, order, unit, b, i);
            if s.half.is_none() {
                scale(row, 1.0 / *sum);
            }
        }
        let mut weights: &[f32] = p;
        if thin {
            for (i, (thinned, p)) in scratch.chunks_exact_mut(s.keys).zip(p.chunks_exact(s.keys)).enumerate()
            {
                s.thin_row(thinned, p, bh * plane + i * s.keys, drop);
            }
            weights = scratch;
        }
        let vm = Mat::strided(&v.f32()[at_k..], kw);
        let out = to.from(at_q);
        gemm((s.queries, d, s.keys), 1.0, Mat::rows(weights, s.keys), vm, 0.0, out, qw, Threads::One);
        if s.half.is_some() {
            // Sums of whole units were exact; now they are scaled.
            for (i, (row, sum)) in p.chunks_exact_mut(s.keys).zip(sums.iter()).enumerate() {
                scale(&mut out[i * qw..][..d], value / sum);
                if keep {
                    scale(row, 1.0 / sum);
                }
            }
        }
    };
    let scratch = || {
        let thinned = vec![0.0; if thin { plane } else { 0 }];
        (vec![0.0; if keep { 0 } else { plane }], thinned, vec![0.0; s.queries])
    };
    match &mut saved {
        Some(saved) => saved
            .f32_mut()
            .par_chunks_exact_mut(plane)
            .enumerate()
            .for_each_init(scratch, |(_, scratch, sums), (bh, p)| head(bh, p, scratch, sums)),
        None => (0..s.batch * s.heads)
            .into_par_iter()
            .for_each_init(scratch, |(p, scratch, sums), bh| head(bh, p, scratch, sums)),
    }
    (out, saved)
}

pub(super) fn backward(
    grad: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax: &Tensor,
    s: &Attention,
    drop: Option<Drop>,
) -> (Tensor, Tensor, Tensor) {
    let d = q.width() / s.heads;
    let (qw, kw) = (s.heads * d, s.kv_heads * d);
    let plane = s.queries * s.keys;
    let (mut dq, mut dk, mut dv) =
        (Tensor::stale(q.shape()), Tensor::stale(k.shape()), Tensor::stale(v.shape()));
    let (to_q, to_k, to_v) = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
    let group = s.heads / s.kv_heads;
    // One task owns a key/value head with all query heads that share it, so that their sums have one order.
    (0..s.batch * s.kv_heads).into_par_iter().for_each_init(
        || (vec![0.0f32; plane], vec![0.0f32; plane]),
        |(thinned, dp), bg| {
            let (b, g) = (bg / s.kv_heads, bg % s.kv_heads);
            let at_k = b * s.keys * kw + g * d;
            for (n, h) in (g * group..(g + 1) * group).enumerate() {
                let bh = b * s.heads + h;
                let at_q = b * s.queries * qw + h * d;
                let p = &softmax.f32()[bh * plane..(bh + 1) * plane];
                let beta = if n == 0 { 0.0 } else { 1.0 };
                for (i, (thinned, p)) in
                    thinned.chunks_exact_mut(s.keys).zip(p.chunks_exact(s.keys)).enumerate()
                {
                    s.thin_row(thinned, p, bh * plane + i * s.keys, drop);
                }
                let g_out = Mat::strided(&grad.f32()[at_q..], qw);
                let size_k = (s.keys, d, s.queries);
                gemm(
                    size_k,
                    1.0,
                    Mat::rows(thinned, s.keys).t(),
                    g_out,
                    beta,
                    to_v.from(at_k),
                    kw,
                    Threads::One,
                );
                let vm = Mat::strided(&v.f32()[at_k..], kw);
                gemm((s.queries, s.keys, d), 1.0, g_out, vm.t(), 0.0, dp, s.keys, Threads::One);
                for i in 0..s.queries {
                    let range = i * s.keys..(i + 1) * s.keys;
                    softmax_backward_row(&p[range.clone()], &thinned[range.clone()], &mut dp[range], s, drop);
                }
                let km = Mat::strided(&k.f32()[at_k..], kw);
                gemm(
                    (s.queries, d, s.keys),
                    s.scale,
                    Mat::rows(dp, s.keys),
                    km,
                    0.0,
                    to_q.from(at_q),
                    qw,
                    Threads::One,
                );
                let qm = Mat::strided(&q.f32()[at_q..], qw);
                gemm(size_k, s.scale, Mat::rows(dp, s.keys).t(), qm, beta, to_k.from(at_k), kw, Threads::One);
            }
        },
    );
    (dq, dk, dv)
}

/// `dp` holds the gradient of the thinned probabilities and receives that of the scores:
/// `p * (g - sum(p g))` with `g` the gradient of the probabilities.
fn softmax_backward_row(p: &[f32], thinned: &[f32], dp: &mut [f32], s: &Attention, drop: Option<Drop>) {
    simd(|| {
        if drop.is_some() || s.pattern.is_some() {
            let factor = drop.map_or(1.0, |d| d.factor);
            for (d, t) in dp.iter_mut().zip(thinned) {
                // A kept probability of exactly 0 has no gradient through the softmax either way.
                *d = if *t != 0.0 { *d * factor } else { 0.0 };
            }
        }
        let mut lanes = [0.0f32; 16];
        for (p, d) in p.chunks(16).zip(dp.chunks(16)) {
            for i in 0..p.len() {
                lanes[i] += p[i].abs() * d[i];
            }
        }
        let along: f32 = lanes.iter().sum();
        for (d, p) in dp.iter_mut().zip(p) {
            *d = p.abs() * (*d - along);
        }
    });
}
