use rayon::prelude::*;

use super::Attention;
use crate::Tensor;
use crate::cpu::{Mat, Threads, exp, gemm, simd};
use crate::ops::dropout::Drop;
use crate::ops::layer_norm::lane_sum;

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

impl Attention {
    /// Scores of one row become probabilities over the keys query `i` of sequence `b` may see.
    fn softmax_row(&self, row: &mut [f32], b: usize, i: usize) {
        let seen = if self.causal {
            (i + 1 + self.keys).saturating_sub(self.queries).min(self.keys)
        } else {
            self.keys
        };
        row[seen..].fill(0.0);
        let row = &mut row[..seen];
        let mask = self.key_mask.as_ref().map(|m| &m[b * self.keys..b * self.keys + seen]);
        simd(|| {
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
            for v in row.iter_mut() {
                // exp saturates far below any score that counts; a masked key must be exactly 0.
                *v = if *v == f32::NEG_INFINITY { 0.0 } else { exp(*v - max) };
            }
            let inv = 1.0 / lane_sum(row, |v| v);
            for v in row.iter_mut() {
                *v *= inv;
            }
        });
    }

    /// Applies pattern and dropout to the probabilities `p` of one row; `index` counts the row's first element.
    fn thin_row(&self, p: &mut [f32], index: usize, drop: Option<Drop>) {
        if let Some((keep, of)) = self.pattern {
            simd(|| keep_largest(p, keep, of));
        }
        if let Some(d) = drop {
            simd(|| {
                for (j, v) in p.iter_mut().enumerate() {
                    *v *= d.at((index + j) as u32);
                }
            });
        }
    }
}

/// Zeroes all but the `keep` largest of each group of `of` nonnegative values, ties to the lower index.
#[inline(always)]
fn keep_largest(p: &mut [f32], keep: usize, of: usize) {
    if (keep, of) == (2, 4) {
        let mut groups = p.chunks_exact_mut(4);
        for g in &mut groups {
            // An element falls if two others beat it; comparing without branches lets this vectorise.
            let [a, b, c, d] = [g[0], g[1], g[2], g[3]];
            let (ba, ca, da) = ((b > a) as u8, (c > a) as u8, (d > a) as u8);
            let (cb, db, dc) = ((c > b) as u8, (d > b) as u8, (d > c) as u8);
            g[0] = if ba + ca + da < 2 { a } else { 0.0 };
            g[1] = if (1 - ba) + cb + db < 2 { b } else { 0.0 };
            g[2] = if (1 - ca) + (1 - cb) + dc < 2 { c } else { 0.0 };
            g[3] = if (1 - da) + (1 - db) + (1 - dc) < 2 { d } else { 0.0 };
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
                *v = 0.0;
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
    let head = |bh: usize, p: &mut [f32], scratch: &mut [f32]| {
        let (b, h) = (bh / s.heads, bh % s.heads);
        let g = h / (s.heads / s.kv_heads);
        let at_q = b * s.queries * qw + h * d;
        let at_k = b * s.keys * kw + g * d;
        let (qm, km) = (Mat::strided(&q.f32()[at_q..], qw), Mat::strided(&k.f32()[at_k..], kw));
        gemm((s.queries, s.keys, d), s.scale, qm, km.t(), 0.0, p, s.keys, Threads::One);
        for (i, row) in p.chunks_exact_mut(s.keys).enumerate() {
            s.softmax_row(row, b, i);
        }
        let mut weights: &[f32] = p;
        if thin {
            scratch.copy_from_slice(p);
            for (i, row) in scratch.chunks_exact_mut(s.keys).enumerate() {
                s.thin_row(row, bh * plane + i * s.keys, drop);
            }
            weights = scratch;
        }
        let vm = Mat::strided(&v.f32()[at_k..], kw);
        gemm(
            (s.queries, d, s.keys),
            1.0,
            Mat::rows(weights, s.keys),
            vm,
            0.0,
            to.from(at_q),
            qw,
            Threads::One,
        );
    };
    let scratch = || (vec![0.0; if keep { 0 } else { plane }], vec![0.0; if thin { plane } else { 0 }]);
    match &mut saved {
        Some(saved) => saved
            .f32_mut()
            .par_chunks_exact_mut(plane)
            .enumerate()
            .for_each_init(scratch, |(_, scratch), (bh, p)| head(bh, p, scratch)),
        None => (0..s.batch * s.heads)
            .into_par_iter()
            .for_each_init(scratch, |(p, scratch), bh| head(bh, p, scratch)),
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
                thinned.copy_from_slice(p);
                for (i, row) in thinned.chunks_exact_mut(s.keys).enumerate() {
                    s.thin_row(row, bh * plane + i * s.keys, drop);
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
                lanes[i] += p[i] * d[i];
            }
        }
        let along: f32 = lanes.iter().sum();
        for (d, p) in dp.iter_mut().zip(p) {
            *d = p * (*d - along);
        }
    });
}
