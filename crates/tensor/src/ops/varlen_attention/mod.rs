//! Self-attention for inference, over sequences that lie one after the other without padding ([`Segments`]), with the
//! keep:of pattern of [`super::attention`]. For GPUs. Queries, keys and values are one tensor, f16 or INT8 codes; sums and
//! the softmax are f32, its weights are rounded to f16 before they meet the values.

mod cuda;

#[cfg(test)]
pub(crate) use cuda::variants;

use super::attention::allowed;
use super::codes::Codes;
use crate::{DType, Device, Segments, Tensor};

/// Queries, keys and values of all heads, `[tokens, 3 * hidden]`: a row has the token's queries, then keys, then values.
#[derive(Clone, Copy, Debug)]
pub enum Qkv<'a> {
    /// f16.
    Half(&'a Tensor),
    /// i8, with the step sizes of the three. Scores are exact then.
    Codes(&'a Tensor, [f32; 3]),
}

/// Where the result goes, `[tokens, hidden]`.
#[derive(Clone, Copy, Debug)]
pub enum Out<'a> {
    /// f16.
    Half(&'a Tensor),
    /// Codes of the output projection's input.
    Codes(Codes<'a>),
}

/// What varies between models.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Heads, each `hidden / heads` wide.
    pub heads: usize,
    /// Factor of the scores, positive.
    pub scale: f32,
    /// `keep` of every `of` keys of a sequence keep their weight.
    pub pattern: Option<(usize, usize)>,
}

/// `softmax(q k^T * scale) v` for each sequence and head, every query over all keys of its sequence. Rows of `out` beyond
/// the batch stay as they are. Panics where shapes differ.
pub fn attention(qkv: Qkv, segments: &Segments, how: Attention, out: Out) {
    let (x, of_codes) = match qkv {
        Qkv::Half(x) => (x, false),
        Qkv::Codes(x, steps) => {
            assert!(steps.iter().all(|&s| s > 0.0), "attention: step sizes {steps:?}");
            (x, true)
        }
    };
    let hidden = x.width() / 3;
    assert_eq!(x.dtype(), if of_codes { DType::I8 } else { DType::F16 }, "attention over {x:?}");
    assert_eq!((x.rows(), x.width()), (segments.tokens(), 3 * hidden), "attention over {x:?}");
    assert_eq!(hidden % how.heads, 0, "attention of {} heads over {x:?}", how.heads);
    assert!(hidden / how.heads <= 1024, "attention heads of {hidden} / {}", how.heads);
    assert!(how.scale > 0.0, "attention: scale {}", how.scale);
    if let Some((keep, of)) = how.pattern {
        assert!(
            allowed(keep, of),
            "attention pattern {keep}:{of}: 0 < keep < of, of a power of two up to 256"
        );
    }
    let shape = [segments.tokens(), hidden];
    match out {
        Out::Half(y) => assert_eq!((y.dtype(), y.shape()), (DType::F16, &shape[..]), "attention: output"),
        Out::Codes(c) => c.check("attention", &shape),
    }
    match x.device() {
        Device::Cpu => panic!("attention: {x:?} is not on a GPU"),
        Device::Cuda(gpu) => cuda::attention(gpu, qkv, segments, how, out),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{devices, noise};
    use super::cuda::{Kernel, attention_by, kernels};
    use super::*;
    use crate::cuda::Gpu;

    /// What a key's weight is, by definition: softmax over all keys of the sequence, then the pattern.
    fn weights(scores: &[f64], pattern: Option<(usize, usize)>) -> Vec<f64> {
        let top = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
        let mut p: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
        if let Some((keep, of)) = pattern {
            for begin in (0..p.len()).step_by(of) {
                let end = p.len().min(begin + of);
                let mut order: Vec<usize> = (begin..end).collect();
                order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
                for &i in order.iter().skip(keep) {
                    p[i] = 0.0;
                }
            }
        }
        p
    }

    /// Scores of codes are whole numbers until they are scaled, so that equal ones are equal.
    fn reference(x: &[f64], steps: [f32; 3], lengths: &[usize], how: Attention, width: usize) -> Vec<f64> {
        let [q, k, v] = steps.map(f64::from);
        let hidden = how.heads * width;
        let mut out = vec![0.0; x.len() / 3];
        let mut first = 0;
        for &n in lengths {
            for h in 0..how.heads {
                let part = |row: usize, part: usize| {
                    &x[(first + row) * 3 * hidden + part * hidden + h * width..][..width]
                };
                for i in 0..n {
                    let scores: Vec<f64> = (0..n)
                        .map(|j| {
                            part(i, 0).iter().zip(part(j, 1)).map(|(a, b)| a * b).sum::<f64>()
                                * (how.scale as f64 * q * k)
                        })
                        .collect();
                    let p = weights(&scores, how.pattern);
                    let y = &mut out[(first + i) * hidden + h * width..][..width];
                    for (j, p) in p.iter().enumerate() {
                        y.iter_mut().zip(part(j, 2)).for_each(|(y, x)| *y += p * v * x);
                    }
                }
            }
            first += n;
        }
        out
    }

    struct Case {
        lengths: Vec<usize>,
        width: usize,
        how: Attention,
        /// f16 values, or codes with their steps.
        x: Tensor,
        steps: Option<[f32; 3]>,
        /// Room for more rows and sequences than there are.
        spare: usize,
    }

    impl Case {
        /// By one kernel: f16 output, codes of step `step`, or both; every row beyond the batch must be untouched.
        fn run(&self, gpu: Gpu, kernel: Kernel, step: f32) -> (Option<Vec<f64>>, Option<Vec<i8>>) {
            let device = Device::Cuda(gpu);
            let (rows, hidden) = (self.x.rows(), self.how.heads * self.width);
            let (tokens, sequences) = (rows + self.spare, self.lengths.len() + self.spare);
            // What is beyond the batch is poison.
            let x = match self.steps {
                None => {
                    let mut v = self.x.f16().to_vec();
                    v.resize(tokens * 3 * hidden, crate::f16::NAN);
                    Tensor::from_f16(v, &[tokens, 3 * hidden])
                }
                Some(_) => {
                    let mut v = self.x.i8().to_vec();
                    v.resize(tokens * 3 * hidden, 127);
                    Tensor::from_i8(v, &[tokens, 3 * hidden])
                }
            }
            .to(device);
            let size = Segments::size(sequences, tokens);
            let mut table = vec![0; size];
            let on = |table| Segments::new(Tensor::from_i32(table, &[size]).to(device), sequences, tokens);
            on(table.clone()).describe(&self.lengths, &mut table);
            let segments = on(table);
            let qkv = self.steps.map_or(Qkv::Half(&x), |s| Qkv::Codes(&x, s));
            let at = rows * hidden;
            // With a pattern the output has the input's type: there are kernels enough to compile.
            let both = self.how.pattern.is_none();
            let half = (both || self.steps.is_none()).then(|| {
                let y = Tensor::full(&[tokens, hidden], 7.0).to_f16().to(device);
                attention_by(gpu, kernel, qkv, &segments, self.how, Out::Half(&y));
                let y = y.to(Device::Cpu).to_f32();
                assert!(y.f32()[at..].iter().all(|&v| v == 7.0), "{kernel:?}");
                y.f32()[..at].iter().map(|&v| v as f64).collect()
            });
            let codes = (both || self.steps.is_some()).then(|| {
                let to = Tensor::from_i8(vec![99; tokens * hidden], &[tokens, hidden]).to(device);
                attention_by(gpu, kernel, qkv, &segments, self.how, Out::Codes(Codes { to: &to, step }));
                let to = to.to(Device::Cpu);
                assert!(to.i8()[at..].iter().all(|&c| c == 99), "{kernel:?}");
                to.i8()[..at].to_vec()
            });
            gpu.check().unwrap();
            (half, codes)
        }

        /// Against the definition, by every kernel that takes it, up to a share of the largest output: of codes, weights are
        /// off by 0.14 % (1/512 of a bit), and are multiples of 2^-11 or 2^-10 of the largest, which hundreds of keys with
        /// less than that show.
        fn check(&self, gpu: Gpu) {
            let how_far = if self.steps.is_some() { 1.5e-2 } else { 2e-3 };
            let x: Vec<f64> = self.x.to_f32().f32().iter().map(|&v| v as f64).collect();
            let steps = self.steps.unwrap_or([1.0; 3]);
            let want = reference(&x, steps, &self.lengths, self.how, self.width);
            let most = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            let step = (most / 100.0) as f32;
            for kernel in kernels(gpu, self.width, self.how.pattern) {
                let what = format!(
                    "{kernel:?} {:?} width {} {:?} codes {}",
                    self.how,
                    self.width,
                    self.lengths,
                    self.steps.is_some()
                );
                let (half, codes) = self.run(gpu, kernel, step);
                for (i, (got, want)) in half.iter().flatten().zip(&want).enumerate() {
                    assert!((got - want).abs() <= how_far * most, "{what} [{i}]: {got}, {want}");
                }
                for (i, (&code, want)) in codes.iter().flatten().zip(&want).enumerate() {
                    let exact = want / step as f64;
                    assert!(
                        (code as f64 - exact).abs() <= 0.5 + 100.0 * how_far,
                        "{what} code [{i}]: {code}, {exact}"
                    );
                }
            }
        }
    }

    fn case(
        lengths: &[usize],
        width: usize,
        heads: usize,
        pattern: Option<(usize, usize)>,
        of_codes: bool,
    ) -> Case {
        let rows: usize = lengths.iter().sum();
        let hidden = heads * width;
        let how = Attention { heads, scale: 1.0 / (width as f32).sqrt(), pattern };
        let noise = noise(&[rows, 3 * hidden], (rows + width) as u64);
        let spread = |factor: f32| noise.f32().iter().map(move |v| v * factor);
        let (x, steps) = if of_codes {
            let codes = spread(127.0 / 1.5).map(|v| v.round().clamp(-127.0, 127.0) as i8).collect();
            (Tensor::from_i8(codes, &[rows, 3 * hidden]), Some([0.031, 0.023, 0.011]))
        } else {
            (Tensor::from_f32(spread(2.0).collect(), &[rows, 3 * hidden]).to_f16(), None)
        };
        Case { lengths: lengths.to_vec(), width, how, x, steps, spare: 3 }
    }

    fn each_gpu(f: impl Fn(Gpu)) {
        for device in devices() {
            if let Device::Cuda(gpu) = device {
                f(gpu);
            }
        }
    }

    #[test]
    fn every_width_and_length_matches_f64() {
        each_gpu(|gpu| {
            for of_codes in [false, true] {
                for width in [64, 32, 128, 40] {
                    for lengths in [&[1][..], &[63, 64, 65], &[5, 512, 1, 2, 130, 7], &[129, 3], &[200]] {
                        case(lengths, width, 2, None, of_codes).check(gpu);
                    }
                }
            }
        });
    }

    /// Groups are cut short at the end of a sequence, and begin anew with the next. What decides between keys whose
    /// scores are closer than rounding is chance, so a few elements may be off by a key's weight.
    #[test]
    fn every_pattern_matches_f64() {
        each_gpu(|gpu| {
            for of_codes in [false, true] {
                for pattern in
                    [(2, 4), (1, 4), (3, 4), (2, 8), (5, 8), (1, 16), (2, 16), (1, 2), (2, 32), (100, 256)]
                {
                    case(&[1, 30, 130, 65], 64, 2, Some(pattern), of_codes).check(gpu);
                }
                for (lengths, width) in [(&[66, 7][..], 32), (&[70, 2], 128), (&[11, 20], 24)] {
                    case(lengths, width, 2, Some((2, 4)), of_codes).check(gpu);
                }
            }
        });
    }

    /// Codes are those of the CPU's attention but for values that f32's last bits put on the other side of a tie.
    #[test]
    fn codes_are_those_of_the_cpu() {
        use super::super::attention::{self, Half};
        each_gpu(|gpu| {
            for (width, pattern) in [
                (32, None),
                (64, None),
                (128, None),
                (40, None),
                (32, Some((2, 4))),
                (64, Some((1, 4))),
                (64, Some((2, 8))),
            ] {
                let (lengths, heads) = ([300, 1, 77], 4);
                for of_codes in [true, false] {
                    let c = case(&lengths, width, heads, pattern, of_codes);
                    let steps = c.steps.unwrap_or([1.0; 3]);
                    let half = Half { steps: c.steps.map(|s| s.map(Tensor::scalar)) };
                    let x = c.x.to_f32();
                    let mut want = Vec::new();
                    let mut first = 0;
                    for n in lengths {
                        let part = |p: usize| {
                            let rows = x.f32()[first * x.width()..][..n * x.width()].chunks(x.width());
                            let own = rows.flat_map(|r| &r[p * heads * width..][..heads * width]);
                            Tensor::from_f32(own.map(|v| v * steps[p]).collect(), &[n, heads * width])
                        };
                        let spec = attention::Attention {
                            batch: 1,
                            queries: n,
                            keys: n,
                            heads,
                            kv_heads: heads,
                            scale: c.how.scale,
                            causal: false,
                            key_mask: None,
                            pattern,
                            dropout: 0.0,
                            half: Some(half.clone()),
                        };
                        want.extend_from_slice(attention::apply(&part(0), &part(1), &part(2), &spec).f32());
                        first += n;
                    }
                    let step = want.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 120.0;
                    let mut codes = vec![0; want.len()];
                    super::super::int8_linear::quantize(&want, step, &mut codes);
                    for kernel in kernels(gpu, width, pattern) {
                        // With a pattern the output has the input's type.
                        let (values, got) = c.run(gpu, kernel, step);
                        let off = match (got, values) {
                            (Some(got), _) => got.iter().zip(&codes).filter(|(a, b)| a != b).count(),
                            (None, values) => {
                                let halves = want.iter().map(|&v| crate::f16::from_f32(v).to_f64());
                                values.unwrap().iter().zip(halves).filter(|(a, b)| **a != *b).count()
                            }
                        };
                        println!(
                            "{kernel:?} {width} {pattern:?} {of_codes}: {off} of {} differ",
                            codes.len()
                        );
                        // Scores of halves are sums that f32 rounds, and may fall on another point of their grid.
                        let most = if of_codes { codes.len() / 10_000 } else { codes.len() / 50 };
                        assert!(
                            off <= most,
                            "{kernel:?} {width} {pattern:?} {of_codes}: {off} of {}",
                            codes.len()
                        );
                    }
                }
            }
        });
    }

    /// Equal keys have equal weights; the lower stay.
    #[test]
    fn ties_keep_the_lower_index() {
        each_gpu(|gpu| {
            for of_codes in [false, true] {
                for pattern in [(2, 4), (1, 4), (3, 4), (2, 8), (2, 16), (4, 32)] {
                    let mut c = case(&[150, 21], 64, 1, Some(pattern), of_codes);
                    // Two kinds of keys.
                    let (hidden, rows) = (64, 171);
                    for row in 2..rows {
                        let from = if row % 3 == 0 { 1 } else { 0 } * 3 * hidden + hidden;
                        let to = row * 3 * hidden + hidden;
                        if of_codes {
                            c.x.i8_mut().copy_within(from..from + hidden, to);
                        } else {
                            c.x.f16_mut().copy_within(from..from + hidden, to);
                        }
                    }
                    c.check(gpu);
                }
            }
        });
    }

    /// Scores far beyond what a model has: one key takes all, and nothing is NaN.
    #[test]
    fn extreme_scores_are_no_nan() {
        each_gpu(|gpu| {
            for pattern in [None, Some((2, 4))] {
                for factor in [30.0, 1000.0, 60000.0] {
                    let mut c = case(&[70, 1, 129], 64, 2, pattern, false);
                    for (i, v) in c.x.f16_mut().iter_mut().enumerate() {
                        // Queries and keys alone.
                        if i / 128 % 3 != 2 {
                            *v = crate::f16::from_f32((v.to_f32() / 3.0).clamp(-1.0, 1.0) * factor);
                        }
                    }
                    c.check(gpu);
                }
            }
        });
    }

    /// Weights of the same keys do not depend on what else is in the batch.
    #[test]
    fn a_sequence_comes_out_the_same_in_any_batch() {
        each_gpu(|gpu| {
            for of_codes in [false, true] {
                let all = case(&[70, 384, 31], 64, 2, None, of_codes);
                let mut alone = case(&[384], 64, 2, None, of_codes);
                let part = 70 * 384..(70 + 384) * 384;
                alone.x = if of_codes {
                    Tensor::from_i8(all.x.i8()[part].to_vec(), alone.x.shape())
                } else {
                    Tensor::from_f16(all.x.f16()[part].to_vec(), alone.x.shape())
                };
                for kernel in kernels(gpu, 64, None) {
                    let (all, alone) = (all.run(gpu, kernel, 0.1), alone.run(gpu, kernel, 0.1));
                    let rows = 70 * 128..454 * 128;
                    assert!(all.0.unwrap()[rows.clone()] == alone.0.unwrap()[..], "{kernel:?}");
                    assert!(all.1.unwrap()[rows] == alone.1.unwrap()[..], "{kernel:?}");
                }
            }
        });
    }
}
