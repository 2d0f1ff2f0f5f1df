//! Scaled dot-product attention with a keep:of pattern on its softmax (paper, equations 2 and 5).
//!
//! For each head: `P = softmax(Q K^T * scale)` over the keys that are neither padded nor causally
//! masked; `P' = pattern(P)` keeps the `keep` largest of every `of` neighbouring keys, ties to the lower
//! index, groups starting at key 0, a masked key counting as 0, without renormalisation; dropout on
//! `P'`; output `P' V`. The gradient passes through kept entries only, then through the full softmax.
//! A query without a key to attend to yields 0.

mod cpu;
mod cuda;
mod flash;
pub(crate) mod rounding;

pub(crate) use cuda::SOURCE;
pub(crate) use flash::kernels;
#[cfg(test)]
pub(crate) use flash::variants as flash_variants;

use super::dropout::Drop;
use crate::{Device, Flags, Tape, Tensor, Var};

/// Everything about an attention but its operands.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Sequences.
    pub batch: usize,
    /// Query positions of each sequence.
    pub queries: usize,
    /// Key positions of each sequence.
    pub keys: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads` (grouped-query attention).
    pub kv_heads: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Query `i` sees keys up to `i + keys - queries`.
    pub causal: bool,
    /// `[batch * keys]`, false for padding; `None` if nothing is padded.
    pub key_mask: Option<Flags>,
    /// `(keep, of)` with `0 < keep < of`, `of` a power of two up to 256; `None` for dense attention.
    pub pattern: Option<(usize, usize)>,
    /// Probability that an attention weight is dropped in training.
    pub dropout: f32,
    /// Whether, and of what, it computes as the engine's kernels do; `None` for plain f32.
    pub half: Option<Half>,
}

/// How a quantised model's attention rounds, so that whatever computes it gives the same codes. Scores are taken in bits, as
/// powers of 2, and rounded to multiples of 1/256. Their powers are divided by a base, so that they come to 2^-13 or less,
/// and rounded to f16, which holds such weights in units of 2^-24: sums of weights, and of weights times codes, are whole
/// numbers of units, exact in f32 in any order as long as they are below 2^24. The base is a whole number of bits not below
/// the highest score of the first 64 keys. Weights above 2^-13, of later keys, have an f16's precision, and so has what they
/// add to the sum of weights, but under a pattern, which has that of weights before they are f16; only a score 28 bits
/// or more above the base raises it. (Scores beyond 2^14 bits, which no model has, are taken from the highest instead of a
/// whole number.) What is computed in bf16 rounds by that instead.
#[derive(Clone, Debug)]
pub struct Half {
    /// Step sizes of queries, keys and values that are multiples of codes by them, each one f32. Without them the three, and
    /// weights of 1 and less, are rounded to f16 alone, and products summed in f32.
    pub steps: Option<[Tensor; 3]>,
}

/// A score in bits, if it is the product of a query and a key in units of `q` and `k`. A multiple of 2^-30, so that
/// kernels may add whole numbers to a score before they multiply, and not 0, of which a masked key's score would make NaN.
pub(crate) fn score_unit(scale: f32, q: f32, k: f32) -> f32 {
    let unit = f64::from(scale) * f64::from(q) * f64::from(k) * std::f64::consts::LOG2_E;
    let grid = (1u64 << 30) as f64;
    ((unit * grid).round_ties_even().max(1.0) / grid) as f32
}

/// What backward needs.
enum Saved {
    /// The full softmax, f32 `[batch, heads, queries, keys]`; weights that the pattern drops are negative.
    Softmax(Tensor),
    /// What it can be computed again from, and the output.
    Flash(flash::Kept, Tensor),
}

/// `q` `[batch * queries, heads * d]`, `k` and `v` `[batch * keys, kv_heads * d]`: `[batch * queries, heads * d]`.
pub fn attention(tape: &Tape, q: &Var, k: &Var, v: &Var, spec: &Attention) -> Var {
    let weights = spec.batch * spec.heads * spec.queries * spec.keys;
    let drop = Drop::next(tape, spec.dropout, weights);
    let keep = tape.tracks(&[q, k, v]);
    let (out, saved) = compute(q.value(), k.value(), v.value(), spec, drop, keep);
    let (q2, k2, v2, spec) = (q.clone(), k.clone(), v.clone(), spec.clone());
    tape.push(out, &[q, k, v], move |grad, grads| {
        let saved: Saved = saved.expect("kept when tracked");
        let (q, k, v) = (q2.value(), k2.value(), v2.value());
        let (dq, dk, dv) = match grad.device() {
            Device::Cpu => match &saved {
                Saved::Softmax(softmax) => cpu::backward(grad, q, k, v, softmax, &spec, drop),
                Saved::Flash(..) => unreachable!("kept by a GPU alone"),
            },
            Device::Cuda(gpu) => cuda::backward(gpu, grad, q, k, v, &saved, &spec, drop),
        };
        grads.add(&q2, dq);
        grads.add(&k2, dk);
        grads.add(&v2, dv);
    })
}

/// Whether [`attention_joint`] can attend to `qkv` as `spec` says.
pub fn takes_joint(qkv: &Tensor, spec: &Attention) -> bool {
    let columns = spec.heads + 2 * spec.kv_heads;
    let width = qkv.width() / columns;
    qkv.width() == width * columns && flash::takes(qkv, width, spec)
}

/// [`attention`] of queries, keys and values that one linear map made, side by side in the rows of `qkv`
/// `[batch * queries, (heads + 2 * kv_heads) * d]`; there are as many keys as queries. Where [`takes_joint`] says so.
pub fn attention_joint(tape: &Tape, qkv: &Var, spec: &Attention) -> Var {
    assert!(
        takes_joint(qkv.value(), spec) && spec.queries == spec.keys,
        "joint attention of {:?}",
        qkv.shape()
    );
    let Device::Cuda(gpu) = qkv.value().device() else { unreachable!("no CPU takes it") };
    let weights = spec.batch * spec.heads * spec.queries * spec.keys;
    let drop = Drop::next(tape, spec.dropout, weights);
    let (out, kept) =
        flash::forward(gpu, flash::Operands::joint(qkv.value(), spec), spec, drop, tape.tracks(&[qkv]));
    let (qkv2, out2, spec) = (qkv.clone(), out.clone(), spec.clone());
    tape.push(out, &[qkv], move |grad, grads| {
        let grads_of = Tensor::stale_of(gpu, grad.dtype(), qkv2.shape());
        let of = [qkv2.value(), &grads_of].map(|t| flash::Operands::joint(t, &spec));
        flash::backward(gpu, grad, of, &kept.expect("kept when tracked"), &out2, &spec, drop);
        grads.add(&qkv2, grads_of);
    })
}

/// [`attention`] without a tape, and so without dropout.
pub fn apply(q: &Tensor, k: &Tensor, v: &Tensor, spec: &Attention) -> Tensor {
    compute(q, k, v, spec, None, false).0
}

/// The output and, if `keep`, what backward needs.
fn compute(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spec: &Attention,
    drop: Option<Drop>,
    keep: bool,
) -> (Tensor, Option<Saved>) {
    spec.check(q, k, v);
    match q.device() {
        Device::Cpu => {
            let (out, softmax) = cpu::forward(q, k, v, spec, drop, keep);
            (out, softmax.map(Saved::Softmax))
        }
        Device::Cuda(gpu) => cuda::forward(gpu, q, k, v, spec, drop, keep),
    }
}

/// Whether attention can keep `keep` of every `of` keys: `0 < keep < of`, `of` a power of two up to 256.
pub fn allowed(keep: usize, of: usize) -> bool {
    0 < keep && keep < of && of.is_power_of_two() && of <= 256
}

impl Attention {
    fn check(&self, q: &Tensor, k: &Tensor, v: &Tensor) {
        let d = q.width() / self.heads;
        assert_eq!(q.width(), d * self.heads, "attention: {} heads in {:?}", self.heads, q.shape());
        assert_eq!(
            self.heads % self.kv_heads,
            0,
            "attention: {} heads, {} kv heads",
            self.heads,
            self.kv_heads
        );
        assert_eq!(q.rows(), self.batch * self.queries, "attention: queries {:?}", q.shape());
        for x in [k, v] {
            assert_eq!(x.rows(), self.batch * self.keys, "attention: keys {:?}", x.shape());
            assert_eq!(x.width(), d * self.kv_heads, "attention: keys {:?}", x.shape());
        }
        if let Some(m) = &self.key_mask {
            assert_eq!(m.len(), self.batch * self.keys, "attention: key mask");
        }
        if let Some((keep, of)) = self.pattern {
            assert!(
                allowed(keep, of),
                "attention pattern {keep}:{of}: 0 < keep < of, of a power of two up to 256"
            );
        }
        // The index of a dropout draw is 32 bits wide.
        let weights = self.batch * self.heads * self.queries * self.keys;
        assert!(self.dropout == 0.0 || weights <= u32::MAX as usize, "attention too large for dropout");
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, check_bf16, close, devices, noise};
    use super::super::weighted_sum::dot;
    use super::*;

    fn spec(batch: usize, queries: usize, keys: usize, heads: usize) -> Attention {
        Attention {
            batch,
            queries,
            keys,
            heads,
            kv_heads: heads,
            scale: 0.5,
            causal: false,
            key_mask: None,
            pattern: None,
            dropout: 0.0,
            half: None,
        }
    }

    /// Exhaustive definition of the kept keys: every subset of a group that is best by magnitude, ties
    /// to the lower index.
    fn kept(p: &[f64], keep: usize, of: usize) -> Vec<bool> {
        let mut out = vec![false; p.len()];
        for start in (0..p.len()).step_by(of) {
            let group = start..p.len().min(start + of);
            let mut order: Vec<usize> = group.collect();
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
            for &i in order.iter().take(keep) {
                out[i] = true;
            }
        }
        out
    }

    fn reference(x: &[Vec<f64>], s: &Attention) -> Vec<f64> {
        let d = x[0].len() / (s.batch * s.queries * s.heads);
        let (qw, kw) = (s.heads * d, s.kv_heads * d);
        let mut out = vec![0.0; x[0].len()];
        for b in 0..s.batch {
            for h in 0..s.heads {
                let g = h / (s.heads / s.kv_heads);
                for i in 0..s.queries {
                    let q = &x[0][(b * s.queries + i) * qw + h * d..][..d];
                    let mut p: Vec<f64> = (0..s.keys)
                        .map(|j| {
                            let seen = s.key_mask.as_ref().is_none_or(|m| m[b * s.keys + j])
                                && (!s.causal || j + s.queries <= i + s.keys);
                            let k = &x[1][(b * s.keys + j) * kw + g * d..][..d];
                            let dot: f64 = q.iter().zip(k).map(|(a, b)| a * b).sum();
                            if seen { (dot * s.scale as f64).exp() } else { 0.0 }
                        })
                        .collect();
                    let sum: f64 = p.iter().sum();
                    p.iter_mut().for_each(|v| *v = if sum > 0.0 { *v / sum } else { 0.0 });
                    if let Some((keep, of)) = s.pattern {
                        let kept = kept(&p, keep, of);
                        p.iter_mut().zip(kept).for_each(|(v, k)| *v *= k as u8 as f64);
                    }
                    for j in 0..s.keys {
                        for e in 0..d {
                            out[(b * s.queries + i) * qw + h * d + e] +=
                                p[j] * x[2][(b * s.keys + j) * kw + g * d + e];
                        }
                    }
                }
            }
        }
        out
    }

    fn run(s: &Attention, d: usize) {
        let q = noise(&[s.batch * s.queries, s.heads * d], 1);
        let k = noise(&[s.batch * s.keys, s.kv_heads * d], 2);
        let v = noise(&[s.batch * s.keys, s.kv_heads * d], 3);
        check(
            &[q.clone(), k.clone(), v.clone()],
            |t, x| attention(t, &x[0], &x[1], &x[2], s),
            |x| reference(x, s),
        );
        check_bf16(&[q, k, v], &[0, 1, 2], |t, x| attention(t, &x[0], &x[1], &x[2], s), |x| reference(x, s));
    }

    #[test]
    fn self_attention_matches_reference() {
        run(&spec(2, 5, 5, 2), 3);
        run(&spec(1, 1, 1, 1), 4);
    }

    #[test]
    fn padding_causal_cross_and_grouped_match_reference() {
        let mut s = spec(2, 4, 4, 4);
        s.key_mask = Some(vec![true, true, true, false, true, true, false, false].into());
        run(&s, 2);
        s.causal = true;
        s.kv_heads = 2;
        run(&s, 2);
        let mut cross = spec(2, 3, 6, 2);
        cross.key_mask = Some((0..12).map(|i| i % 5 != 4).collect::<Vec<bool>>().into());
        run(&cross, 2);
        let mut cached = spec(1, 2, 5, 2);
        cached.causal = true;
        run(&cached, 2);
    }

    #[test]
    fn every_pattern_matches_reference() {
        for pattern in [(2, 4), (1, 4), (2, 8), (1, 8), (2, 16), (3, 4), (1, 2)] {
            for causal in [false, true] {
                let mut s = spec(2, 10, 10, 2); // 10 leaves a short last group
                s.pattern = Some(pattern);
                s.causal = causal;
                s.key_mask = Some((0..20).map(|i| i < 17).collect::<Vec<bool>>().into());
                run(&s, 2);
            }
        }
    }

    #[test]
    fn ties_keep_the_lower_index() {
        // Equal scores make every probability equal.
        let mut s = spec(1, 1, 8, 1);
        s.pattern = Some((2, 4));
        let eye: Vec<f32> = (0..64).map(|i| (i % 9 == 0) as u8 as f32).collect();
        for device in devices() {
            let tape = Tape::inference();
            let [q, k] = [1, 8].map(|n| tape.constant(Tensor::zeros(&[n, 8]).to(device)));
            let v = tape.constant(Tensor::from_f32(eye.clone(), &[8, 8]).to(device));
            let out = attention(&tape, &q, &k, &v, &s).value().to(Device::Cpu);
            assert_eq!(out.f32(), [0.125, 0.125, 0.0, 0.0, 0.125, 0.125, 0.0, 0.0]);
        }
    }

    /// Queries, keys and values of whole numbers times the steps.
    fn of_codes(s: &mut Attention, d: usize) -> [Tensor; 3] {
        let steps = [0.043, 0.037, 0.01];
        s.half = Some(Half { steps: Some(steps.map(Tensor::scalar)) });
        let codes = |rows: usize, heads: usize, step: f32, seed| {
            let t = noise(&[rows, heads * d], seed);
            Tensor::from_f32(t.f32().iter().map(|v| (v * 90.0).round() * step).collect(), t.shape())
        };
        let (q, k) = (s.batch * s.queries, s.batch * s.keys);
        [codes(q, s.heads, steps[0], 1), codes(k, s.kv_heads, steps[1], 2), codes(k, s.kv_heads, steps[2], 3)]
    }

    /// As the engine rounds it is still attention, on every device the same to f32's last bits, keys of equal scores
    /// included.
    #[test]
    fn half_weights_are_close_and_alike_everywhere() {
        for pattern in [None, Some((2, 4)), Some((1, 8))] {
            for codes in [true, false] {
                let mut s = spec(2, 21, 70, 4);
                (s.kv_heads, s.pattern, s.scale) = (2, pattern, 0.01);
                s.key_mask = Some((0..140).map(|i| i % 70 < 63).collect::<Vec<bool>>().into());
                let x = of_codes(&mut s, 32);
                if !codes {
                    s.half = Some(Half { steps: None });
                }
                let plain = Attention { half: None, ..s.clone() };
                let on = |device: Device, s: &Attention| {
                    let mut s = s.clone();
                    if let Some(Half { steps: Some(steps) }) = &mut s.half {
                        *steps = steps.each_ref().map(|t| t.to(device));
                    }
                    let [q, k, v] = x.each_ref().map(|t| t.to(device));
                    apply(&q, &k, &v, &s).to(Device::Cpu).f32().to_vec()
                };
                let want = on(Device::Cpu, &s);
                let exact: Vec<f64> = on(Device::Cpu, &plain).iter().map(|&x| x as f64).collect();
                // Where a pattern chooses between scores that f32 told apart by rounding alone, it may differ.
                if pattern.is_none() {
                    close("plain", &want, &exact, 5e-3);
                }
                let want: Vec<f64> = want.iter().map(|&x| x as f64).collect();
                for device in devices() {
                    // A weight of halves may fall on the other side of a tie.
                    let far = if codes { 1e-6 } else { 1e-3 };
                    close(&format!("{device:?}, {pattern:?}, codes {codes}"), &on(device, &s), &want, far);
                }
            }
        }
    }

    /// Scores of next to nothing are equal, and masked keys have no weight still: outputs are means of the values.
    #[test]
    fn the_smallest_steps_are_no_nan() {
        for device in devices() {
            let mut s = spec(2, 3, 70, 2);
            s.key_mask = Some((0..140).map(|i| i % 70 < 63).collect::<Vec<bool>>().into());
            let [q, k, v] = of_codes(&mut s, 32);
            let Some(Half { steps: Some([q_step, k_step, v_step]) }) = &mut s.half else { unreachable!() };
            let tiny = |t: &Tensor, step: &mut Tensor| {
                let by = 1e-8 / step.item();
                *step = Tensor::scalar(1e-8).to(device);
                Tensor::from_f32(t.f32().iter().map(|x| x * by).collect(), t.shape())
            };
            let (q, k) = (tiny(&q, q_step), tiny(&k, k_step));
            *v_step = v_step.to(device);
            let got = apply(&q.to(device), &k.to(device), &v.to(device), &s).to(Device::Cpu);
            let width = v.width();
            let mean = |sequence: usize, c: usize| {
                (0..63).map(|i| f64::from(v.f32()[(sequence * 70 + i) * width + c])).sum::<f64>() / 63.0
            };
            let want: Vec<f64> = (0..6)
                .flat_map(|row| (0..width).map(move |c| (row / 3, c)))
                .map(|(n, c)| mean(n, c))
                .collect();
            close(&format!("{device:?}"), got.f32(), &want, 5e-3);
        }
    }

    /// What stands behind a sequence changes none of its bits.
    #[test]
    fn padding_changes_nothing() {
        for pattern in [None, Some((2, 4))] {
            let mut s = spec(1, 37, 37, 2);
            s.pattern = pattern;
            let [q, k, v] = of_codes(&mut s, 32);
            let want = apply(&q, &k, &v, &s);
            for padded in [38, 48, 64, 150, 384] {
                let longer = |t: &Tensor| {
                    let mut values = t.f32().to_vec();
                    values.resize(padded * t.width(), 0.02);
                    Tensor::from_f32(values, &[padded, t.width()])
                };
                let mask: Vec<bool> = (0..padded).map(|i| i < 37).collect();
                let s = Attention { queries: padded, keys: padded, key_mask: Some(mask.into()), ..s.clone() };
                let got = apply(&longer(&q), &longer(&k), &longer(&v), &s);
                assert_eq!(got.f32()[..want.len()], *want.f32(), "{padded}, {pattern:?}");
            }
        }
    }

    #[test]
    fn a_query_that_sees_nothing_yields_zero() {
        let mut s = spec(1, 2, 3, 1);
        s.key_mask = Some(vec![false; 3].into());
        for device in devices() {
            let tape = Tape::recording();
            let x: Vec<Var> =
                [2, 3, 3].iter().map(|&n| tape.leaf(noise(&[n, 4], n as u64).to(device))).collect();
            let out = attention(&tape, &x[0], &x[1], &x[2], &s);
            assert!(out.value().to(Device::Cpu).f32().iter().all(|&v| v == 0.0));
            let loss = dot(&tape, &out, &noise(&[2, 4], 9));
            let mut g = tape.backward(&loss);
            for v in &x {
                assert!(g.take(v).unwrap().to(Device::Cpu).f32().iter().all(|&v| v == 0.0));
            }
            if let Device::Cuda(gpu) = device {
                gpu.check().unwrap();
            }
        }
    }

    #[test]
    fn dropout_keeps_the_mean_and_its_gradient_matches_its_mask() {
        let mut s = spec(1, 64, 64, 2);
        s.dropout = 0.25;
        let inputs = [noise(&[64, 8], 1), noise(&[64, 8], 2), Tensor::full(&[64, 8], 1.0)];
        let tape = Tape::training(5);
        let x: Vec<Var> = inputs.iter().map(|t| tape.leaf(t.clone())).collect();
        let out = attention(&tape, &x[0], &x[1], &x[2], &s);
        let mean = out.value().f32().iter().sum::<f32>() / 512.0;
        assert!((mean - 1.0).abs() < 0.05, "{mean}");
        // The output is linear in V, so its gradient along V reproduces the output exactly.
        let w = noise(&[64, 8], 4);
        let loss = dot(&tape, &out, &w);
        let want = loss.value().item() as f64;
        let dv = tape.backward(&loss).take(&x[2]).unwrap();
        close("linear in V", &[dv.f32().iter().sum()], &[want], 1e-4);
    }

    /// Pattern, dropout, grouped heads and padding at once, at sizes that no block of threads divides: every device
    /// drops the same weights and gives the same gradients.
    #[test]
    fn devices_agree_on_sizes_beyond_a_block() {
        let mut s = spec(2, 37, 150, 4);
        (s.kv_heads, s.dropout, s.pattern) = (2, 0.2, Some((2, 4)));
        s.key_mask = Some((0..300).map(|i| i % 150 < 131).collect::<Vec<bool>>().into());
        let inputs = [noise(&[74, 4 * 36], 1), noise(&[300, 2 * 36], 2), noise(&[300, 2 * 36], 3)];
        let run = |device: Device| -> Vec<Vec<f32>> {
            let tape = Tape::training(5);
            let x: Vec<Var> = inputs.iter().map(|t| tape.leaf(t.to(device))).collect();
            let out = attention(&tape, &x[0], &x[1], &x[2], &s);
            let loss = dot(&tape, &out, &noise(&[74, 4 * 36], 4));
            let mut grads = tape.backward(&loss);
            let all = x.iter().map(|v| grads.take(v).unwrap()).chain([out.value().clone()]);
            all.map(|t| t.to(Device::Cpu).f32().to_vec()).collect()
        };
        let want = run(Device::Cpu);
        for device in devices() {
            for (i, (got, want)) in run(device).iter().zip(&want).enumerate() {
                let want: Vec<f64> = want.iter().map(|&x| x as f64).collect();
                close(&format!("{device:?} {i}"), got, &want, 1e-5);
            }
        }
    }

    /// Tensor cores in bf16 against the CPU in f32 from the same numbers: every width and pattern, shapes that no
    /// tile divides, more than one tile each way.
    #[test]
    fn tensor_cores_agree_with_the_cpu() {
        let mut cases = Vec::new();
        for width in [32, 64, 128] {
            for pattern in
                [None, Some((2, 4)), Some((1, 4)), Some((3, 4)), Some((1, 8)), Some((3, 16)), Some((2, 32))]
            {
                let mut s = spec(2, 133, 133, 2);
                (s.scale, s.pattern) = (1.0 / (width as f32).sqrt(), pattern);
                // More queries than keys, so that the first see none; then a sequence without keys.
                let mut few = Attention { keys: 70, causal: true, ..s.clone() };
                cases.push((few.clone(), width));
                (few.causal, few.key_mask) =
                    (false, Some((0..140).map(|i| i < 70).collect::<Vec<bool>>().into()));
                cases.push((few, width));
                s.key_mask = Some((0..266).map(|i| i % 133 < 70 + i / 4).collect::<Vec<bool>>().into());
                cases.push((s.clone(), width));
                (s.causal, s.dropout) = (true, 0.1);
                cases.push((s.clone(), width));
                (s.queries, s.kv_heads, s.key_mask) = (65, 1, None);
                cases.push((s, width));
            }
        }
        for (s, width) in cases {
            let inputs = [(s.queries, s.heads, 1), (s.keys, s.kv_heads, 2), (s.keys, s.kv_heads, 3)]
                .map(|(n, heads, seed)| noise(&[s.batch * n, heads * width], seed).to_bf16());
            let shape = inputs[0].shape().to_vec();
            let weights = noise(&shape, 4).to_bf16().to_f32();
            let run = |device: Device| -> Vec<Vec<f32>> {
                let tape = Tape::training(5);
                let on = |t: &Tensor| if device == Device::Cpu { t.to_f32() } else { t.to(device) };
                let x: Vec<Var> = inputs.iter().map(|t| tape.leaf(on(t))).collect();
                let out = attention(&tape, &x[0], &x[1], &x[2], &s);
                let loss = dot(&tape, &out, &weights);
                let mut grads = tape.backward(&loss);
                let all = [out.value().clone()].into_iter().chain(x.iter().map(|v| grads.take(v).unwrap()));
                all.map(|t| t.to(Device::Cpu).to_f32().f32().to_vec()).collect()
            };
            let want = run(Device::Cpu);
            for device in devices().into_iter().filter(|d| *d != Device::Cpu) {
                for (what, (got, want)) in ["out", "dq", "dk", "dv"].iter().zip(run(device).iter().zip(&want))
                {
                    let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| (x * x) as f64).sum::<f64>();
                    let error = square(&mut got.iter().zip(want).map(|(g, w)| g - w));
                    let relative = (error / square(&mut want.iter().copied())).sqrt();
                    assert!(relative < 1e-2, "{what} on {device:?}: {relative:.4} off, width {width}, {s:?}");
                }
                device.check().unwrap();
            }
        }
    }

    /// What `s` makes of `x` (queries, keys, values) in bf16 on a GPU, or in f32 of the same numbers on a CPU, where
    /// the output's gradient is `grad`: output and gradients.
    fn run_half(device: Device, s: &Attention, x: [&Tensor; 3], grad: &Tensor) -> [Vec<f32>; 4] {
        let tape = Tape::recording();
        let on = |t: &Tensor| if device == Device::Cpu { t.clone() } else { t.to_bf16().to(device) };
        let x = x.map(|t| tape.leaf(on(t)));
        let out = attention(&tape, &x[0], &x[1], &x[2], s);
        let loss = dot(&tape, &out, grad);
        let mut grads = tape.backward(&loss);
        let [q, k, v] = x.map(|v| grads.take(&v).unwrap());
        device.check().unwrap();
        [out.value().clone(), q, k, v].map(|t| t.to(Device::Cpu).to_f32().f32().to_vec())
    }

    /// Queries, keys and values side by side give the bits that they give apart.
    #[test]
    fn joint_is_what_the_parts_are() {
        for device in devices().into_iter().filter(|d| *d != Device::Cpu) {
            for (width, kv_heads, pattern, dropout) in
                [(64, 4, None, 0.0), (64, 2, Some((2, 4)), 0.2), (32, 1, None, 0.1), (128, 4, None, 0.0)]
            {
                let mut s = spec(2, 133, 133, 4);
                (s.scale, s.kv_heads, s.pattern, s.dropout) = (0.1, kv_heads, pattern, dropout);
                s.key_mask = Some((0..266).map(|i| i % 133 < 100).collect::<Vec<bool>>().into());
                let widths = [4 * width, kv_heads * width, kv_heads * width];
                let x = noise(&[266, widths.iter().sum()], 1).to_bf16();
                let weights = noise(&[266, 4 * width], 4);
                let run = |together: bool| {
                    let tape = Tape::training(3);
                    let x = tape.leaf(x.to(device));
                    assert!(takes_joint(x.value(), &s));
                    let out = if together {
                        attention_joint(&tape, &x, &s)
                    } else {
                        let parts = super::super::select::split_columns(&tape, &x, &widths);
                        attention(&tape, &parts[0], &parts[1], &parts[2], &s)
                    };
                    let loss = dot(&tape, &out, &weights);
                    let grad = tape.backward(&loss).take(&x).unwrap();
                    [out.value().to(Device::Cpu), grad.to(Device::Cpu)]
                };
                assert!(run(true) == run(false), "{device:?}, width {width}, {s:?}");
                device.check().unwrap();
            }
        }
    }

    fn identity(n: usize) -> Tensor {
        Tensor::from_f32((0..n * n).map(|i| f32::from(i % (n + 1) == 0)).collect(), &[n, n])
    }

    /// Scores that are small integers, so that many tie and every device has the same: with the identity as values the
    /// output is the thinned softmax, and with the identity as the output's gradient the values' gradient is its
    /// transpose. Forward and both backward kernels keep the weights that the CPU keeps.
    #[test]
    fn tensor_cores_keep_the_lower_of_ties_forward_and_backward() {
        for width in [32, 64, 128] {
            let small = |seed, most: f32| {
                let t = noise(&[width, width], seed);
                Tensor::from_f32(t.f32().iter().map(|x| (x * most).round()).collect(), t.shape())
            };
            let eye = identity(width);
            for pattern in [(1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (5, 8), (1, 16), (4, 16)] {
                for (q, causal) in
                    [(Tensor::zeros(&[width, width]), false), (small(1, 0.5), false), (small(1, 1.4), true)]
                {
                    let mut s = spec(1, width, width, 1);
                    (s.scale, s.pattern, s.causal) = (0.125, Some(pattern), causal);
                    let k = small(2, 0.6);
                    let run = |device| run_half(device, &s, [&q, &k, &eye], &eye);
                    let want = run(Device::Cpu);
                    for device in devices() {
                        let got = run(device);
                        for i in 0..width * width {
                            let at = format!("{device:?}, {s:?}, width {width}, {i}");
                            assert_eq!(got[0][i] == 0.0, want[0][i] == 0.0, "forward, {at}");
                            assert_eq!(got[3][i] == 0.0, want[3][i] == 0.0, "values' gradient, {at}");
                        }
                        for (what, (got, want)) in ["out", "dq", "dk", "dv"].iter().zip(got.iter().zip(&want))
                        {
                            let want: Vec<f64> = want.iter().map(|&x| x as f64).collect();
                            close(&format!("{what}, {device:?}, {s:?}"), got, &want, 1e-2);
                        }
                    }
                }
            }
        }
    }

    /// Scores beyond the largest float: minus infinity is a key that is not seen, plus infinity gives no number.
    #[test]
    fn infinite_scores_are_the_cpus_under_a_pattern() {
        let one = |v: Vec<f32>| {
            let rows = v.len();
            Tensor::from_f32(
                v.iter().flat_map(|&x| [[x].as_slice(), &[0.0; 63]].concat()).collect(),
                &[rows, 64],
            )
        };
        // Groups with none, one, two, three and four scores of minus infinity.
        let far = 1e6;
        let low = [0.0, 0.0, 0.0, 0.0, 0.0, -far, 0.0, 0.0, -far, -far, 0.0, 0.0, -far, -far, -far, 0.0];
        let keys = one([&low[..], &[-far; 4]].concat());
        let high = one([&low[..], &[0.0, far, 0.0, 0.0]].concat());
        let (q, eye) = (one(vec![1e37]), identity(64));
        let values = Tensor::from_f32(eye.f32()[..20 * 64].to_vec(), &[20, 64]);
        for pattern in [None, Some((1, 4)), Some((2, 4)), Some((3, 4)), Some((2, 8)), Some((3, 16))] {
            let mut s = spec(1, 1, 20, 1);
            (s.scale, s.pattern) = (1.0, pattern);
            let run =
                |device, k: &Tensor| run_half(device, &s, [&q, k, &values], &Tensor::full(&[1, 64], 1.0));
            let want: Vec<f64> = run(Device::Cpu, &keys)[0].iter().map(|&x| x as f64).collect();
            assert_eq!(want.iter().filter(|&&p| p > 0.0).count() == 10, pattern.is_none());
            for device in devices() {
                close(&format!("{device:?}, {pattern:?}"), &run(device, &keys)[0], &want, 1e-2);
                assert!(run(device, &high)[0].iter().any(|x| x.is_nan()), "{device:?}, {pattern:?}");
            }
        }
    }
}
