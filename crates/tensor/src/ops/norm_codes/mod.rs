//! A residual sum or a sum of embeddings, its normalisation, and the INT8 codes of the next map's input, in one pass over
//! f16 rows. For GPUs. Statistics are f32, and codes are those of the f32 norm, before it is rounded to f16: what the CPU
//! engine and fake quantisation do.

mod cuda;

pub(crate) use cuda::{ABSENT, SOURCE, outputs, parts};

#[cfg(test)]
pub(crate) use cuda::variants;

use super::codes::Codes;
use crate::{DType, Device, Tensor};

/// Which normalisation.
#[derive(Clone, Copy, Debug)]
pub enum Norm<'a> {
    /// Mean and variance: [`super::layer_norm`]. Gain and bias are f32 `[width]`.
    Layer {
        /// Factors.
        gain: &'a Tensor,
        /// Summands.
        bias: &'a Tensor,
        /// Added to the variance.
        eps: f32,
    },
    /// Root mean square: [`super::rms_norm`].
    Rms {
        /// Factors, f32 `[width]`.
        gain: &'a Tensor,
        /// Added to the mean square.
        eps: f32,
    },
}

/// What a row is made into; at least one of the two.
#[derive(Clone, Copy, Debug)]
pub struct Out<'a> {
    /// f16 `[rows, width]`.
    pub hidden: Option<&'a Tensor>,
    /// i8 `[rows, width]`.
    pub codes: Option<Codes<'a>>,
}

/// What is added to a residual: `[rows, width]`.
#[derive(Clone, Copy, Debug)]
pub enum Summand<'a> {
    /// f16.
    Half(&'a Tensor),
    /// i8: codes of the step size, whose products are rounded to f16.
    Codes(&'a Tensor, f32),
}

/// `norm(x + residual)`, `residual` f16 `[rows, width]`. Works in place: `out.hidden` may be an f16 `x` or `residual`.
/// Panics where shapes differ.
pub fn add_norm(summand: Summand, residual: Option<&Tensor>, norm: Norm, out: Out) {
    let (x, dtype) = match summand {
        Summand::Half(x) => (x, DType::F16),
        Summand::Codes(x, _) => (x, DType::I8),
    };
    assert_eq!(x.dtype(), dtype, "norm of {x:?}");
    assert!(
        residual.is_none_or(|r| r.dtype() == DType::F16 && r.shape() == x.shape()),
        "norm: residual {residual:?}"
    );
    check(Some(norm), out, x.shape());
    match x.device() {
        Device::Cpu => panic!("norm: {x:?} is not on a GPU"),
        Device::Cuda(gpu) => cuda::add_norm(gpu, summand, residual, norm, out),
    }
}

/// A table and the row each token takes.
#[derive(Clone, Copy, Debug)]
pub struct Lookup<'a> {
    /// f16 `[entries, width]`.
    pub table: &'a Tensor,
    /// i32 `[rows]`. An id without an entry takes the last one: rows beyond a batch may hold anything.
    pub ids: &'a Tensor,
}

/// `norm(scale * words + positions + types)`; without a norm the sum itself. Panics where shapes differ.
pub fn embed_norm(
    words: Lookup,
    positions: Option<Lookup>,
    types: Option<Lookup>,
    scale: f32,
    norm: Option<Norm>,
    out: Out,
) {
    let shape = [words.ids.len(), words.table.width()];
    for l in [Some(words), positions, types].into_iter().flatten() {
        assert_eq!((l.table.dtype(), l.ids.dtype()), (DType::F16, DType::I32), "embedding: {l:?}");
        assert_eq!((l.ids.len(), l.table.width()), (shape[0], shape[1]), "embedding: {l:?}");
    }
    check(norm, out, &shape);
    match words.table.device() {
        Device::Cpu => panic!("embedding: {words:?} is not on a GPU"),
        Device::Cuda(gpu) => cuda::embed_norm(gpu, [Some(words), positions, types], scale, norm, out),
    }
}

pub(crate) fn check(norm: Option<Norm>, out: Out, shape: &[usize]) {
    let vectors = match norm {
        None => [None, None],
        Some(Norm::Layer { gain, bias, .. }) => [Some(gain), Some(bias)],
        Some(Norm::Rms { gain, .. }) => [Some(gain), None],
    };
    for v in vectors.into_iter().flatten() {
        assert!(v.dtype() == DType::F32 && v.len() == shape[1], "norm of {shape:?} with {v:?}");
    }
    assert!(out.hidden.is_some() || out.codes.is_some(), "norm: no output");
    if let Some(h) = out.hidden {
        assert_eq!((h.dtype(), h.shape()), (DType::F16, shape), "norm: output");
    }
    if let Some(c) = out.codes {
        c.check("norm", shape);
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{close, devices, noise};
    use super::*;

    /// Mean and variance, or root mean square, of rows in f64.
    fn normal(rows: &[f64], width: usize, norm: Option<Norm>) -> Vec<f64> {
        let mut out = rows.to_vec();
        let (gain, bias, eps, mean_of) = match norm {
            None => return out,
            Some(Norm::Layer { gain, bias, eps }) => (gain, Some(bias), eps, true),
            Some(Norm::Rms { gain, eps }) => (gain, None, eps, false),
        };
        for row in out.chunks_mut(width) {
            let mean = if mean_of { row.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let square = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
            for (c, v) in row.iter_mut().enumerate() {
                *v = (*v - mean) / (square + eps as f64).sqrt() * gain.f32()[c] as f64
                    + bias.map_or(0.0, |b| b.f32()[c] as f64);
            }
        }
        out
    }

    /// Codes are those of the reference, except by one where it lies within rounding of a tie.
    fn codes_agree(codes: &[i8], want: &[f64], step: f32) {
        for (i, (&code, w)) in codes.iter().zip(want).enumerate() {
            let exact = (w / step as f64).clamp(-127.0, 127.0);
            assert!((code as f64 - exact).abs() < 0.501, "codes[{i}]: {code}, {exact}");
        }
    }

    fn wide(t: &Tensor) -> Vec<f64> {
        t.to_f32().f32().iter().map(|&v| v as f64).collect()
    }

    fn on<'a>(norm: Norm, moved: &'a [Tensor; 2]) -> Norm<'a> {
        match norm {
            Norm::Layer { eps, .. } => Norm::Layer { gain: &moved[0], bias: &moved[1], eps },
            Norm::Rms { eps, .. } => Norm::Rms { gain: &moved[0], eps },
        }
    }

    #[test]
    fn rows_match_f64() {
        for gpu in devices().into_iter().filter(|d| *d != Device::Cpu) {
            for (rows, width) in
                [(1, 768), (37, 768), (5, 1024), (9, 384), (3, 8), (6, 101), (4, 1032), (3, 4096)]
            {
                let (gain, bias) = (noise(&[width], 3), noise(&[width], 4));
                let moved = [gain.to(gpu), bias.to(gpu)];
                for norm in [
                    Norm::Layer { gain: &gain, bias: &bias, eps: 1e-12 },
                    Norm::Rms { gain: &gain, eps: 1e-5 },
                ] {
                    for with in [false, true] {
                        let (x, r) = (noise(&[rows, width], 1).to_f16(), noise(&[rows, width], 2).to_f16());
                        let sum: Vec<f64> = wide(&x)
                            .iter()
                            .zip(wide(&r))
                            .map(|(a, b)| a + if with { b } else { 0.0 })
                            .collect();
                        let want = normal(&sum, width, Some(norm));
                        let r = r.to(gpu);
                        let to = Tensor::from_i8(vec![99; rows * width], &[rows, width]).to(gpu);
                        let codes = Codes { to: &to, step: 0.021 };
                        // In place, as the engine does.
                        let hidden = x.to(gpu);
                        let out = Out { hidden: Some(&hidden), codes: Some(codes) };
                        add_norm(Summand::Half(&hidden), with.then_some(&r), on(norm, &moved), out);
                        close(&format!("{rows}x{width}"), hidden.to(Device::Cpu).to_f32().f32(), &want, 1e-3);
                        codes_agree(to.to(Device::Cpu).i8(), &want, 0.021);
                        let again = Tensor::from_i8(vec![99; rows * width], &[rows, width]).to(gpu);
                        let out = Out { hidden: None, codes: Some(Codes { to: &again, step: 0.021 }) };
                        add_norm(Summand::Half(&x.to(gpu)), with.then_some(&r), on(norm, &moved), out);
                        assert_eq!(again, to);
                    }
                }
            }
            gpu.check().unwrap();
        }
    }

    /// Widths of models: bits of the CPU's norm of the same halves, whose codes are then equal too.
    #[test]
    fn rows_are_the_cpus() {
        for gpu in devices().into_iter().filter(|d| *d != Device::Cpu) {
            for (rows, width) in [(300, 768), (37, 1024), (90, 384), (21, 24), (5, 8)] {
                let (gain, bias) = (noise(&[width], 3), noise(&[width], 4));
                let (x, r) = (noise(&[rows, width], 1).to_f16(), noise(&[rows, width], 2).to_f16());
                let want = super::super::layer_norm::apply(
                    &x.to_f32(),
                    Some(&r.to_f32()),
                    &gain,
                    &bias,
                    1e-12,
                    true,
                );
                let step = 0.021;
                let mut codes = vec![0; want.len()];
                super::super::int8_linear::quantize(want.f32(), step, &mut codes);
                let moved = [gain.to(gpu), bias.to(gpu)];
                let norm = Norm::Layer { gain: &moved[0], bias: &moved[1], eps: 1e-12 };
                let to = Tensor::from_i8(vec![99; rows * width], &[rows, width]).to(gpu);
                let hidden = x.to(gpu);
                let out = Out { hidden: Some(&hidden), codes: Some(Codes { to: &to, step }) };
                add_norm(Summand::Half(&hidden), Some(&r.to(gpu)), norm, out);
                assert!(hidden.to(Device::Cpu).f16() == want.to_f16().f16(), "{rows}x{width}");
                assert!(to.to(Device::Cpu).i8() == codes, "{rows}x{width}");
            }
            gpu.check().unwrap();
        }
    }

    /// Codes are added as the halves that their products with the step size are rounded to, bit for bit.
    #[test]
    fn codes_are_added_as_halves() {
        for gpu in devices().into_iter().filter(|d| *d != Device::Cpu) {
            for (rows, width) in [(700, 768), (37, 1024), (9, 384), (3, 8), (6, 101), (3, 1032)] {
                let x: Vec<i8> =
                    (0..rows * width).map(|i| (i * 31 % 255) as u8 as i8).map(|c| c.max(-127)).collect();
                let step = 0.0371f32;
                let halves = x.iter().map(|&c| crate::f16::from_f32(f32::from(c) * step)).collect();
                let halves = Tensor::from_f16(halves, &[rows, width]).to(gpu);
                let x = Tensor::from_i8(x, &[rows, width]).to(gpu);
                let r = noise(&[rows, width], 2).to_f16().to(gpu);
                let moved = [noise(&[width], 3).to(gpu), noise(&[width], 4).to(gpu)];
                let norm = Norm::Layer { gain: &moved[0], bias: &moved[1], eps: 1e-12 };
                let outputs = [Summand::Codes(&x, step), Summand::Half(&halves)].map(|summand| {
                    let hidden = r.clone().to(Device::Cpu).to(gpu);
                    let to = Tensor::from_i8(vec![99; rows * width], &[rows, width]).to(gpu);
                    let out = Out { hidden: Some(&hidden), codes: Some(Codes { to: &to, step: 0.021 }) };
                    add_norm(summand, Some(&hidden), norm, out);
                    [hidden.to(Device::Cpu), to.to(Device::Cpu)]
                });
                assert!(outputs[0] == outputs[1], "{rows}x{width}");
            }
            gpu.check().unwrap();
        }
    }

    #[test]
    fn embeddings_match_f64_and_wrong_ids_read_no_other_memory() {
        for gpu in devices().into_iter().filter(|d| *d != Device::Cpu) {
            for width in [768, 384, 50] {
                let (gain, bias) = (noise(&[width], 3), noise(&[width], 4));
                let moved = [gain.to(gpu), bias.to(gpu)];
                let norm = Norm::Layer { gain: &gain, bias: &bias, eps: 1e-5 };
                let tables = [300, 40, 2].map(|n| noise(&[n, width], n as u64).to_f16());
                let mut ids = [300, 40, 2].map(|n| (0..21).map(|i| (i * 37 + 5) % n).collect::<Vec<i32>>());
                (ids[0][20], ids[1][20]) = (-1, 1 << 30);
                for (norm, parts) in [(Some(norm), 3), (Some(norm), 2), (None, 3), (None, 1)] {
                    let mut sum = vec![0.0; 21 * width];
                    for (t, (table, ids)) in tables.iter().zip(&ids).enumerate().take(parts) {
                        let rows = table.rows() as i32;
                        let table = wide(table);
                        for (i, v) in sum.iter_mut().enumerate() {
                            let id = ids[i / width];
                            let id = if id < 0 || id >= rows { rows - 1 } else { id };
                            let factor = if t == 0 { 1.5 } else { 1.0 };
                            *v += table[id as usize * width + i % width] * factor;
                        }
                    }
                    let want = normal(&sum, width, norm);
                    let on_gpu = tables.clone().map(|t| t.to(gpu));
                    let ids = ids.clone().map(|i| Tensor::from_i32(i, &[21]).to(gpu));
                    let lookup = |t: usize| (t < parts).then(|| Lookup { table: &on_gpu[t], ids: &ids[t] });
                    let hidden = Tensor::zeros(&[21, width]).to_f16().to(gpu);
                    let to = Tensor::from_i8(vec![99; 21 * width], &[21, width]).to(gpu);
                    let out = Out { hidden: Some(&hidden), codes: Some(Codes { to: &to, step: 0.05 }) };
                    embed_norm(
                        lookup(0).unwrap(),
                        lookup(1),
                        lookup(2),
                        1.5,
                        norm.map(|n| on(n, &moved)),
                        out,
                    );
                    close(&format!("{width}, {parts}"), hidden.to(Device::Cpu).to_f32().f32(), &want, 1e-3);
                    codes_agree(to.to(Device::Cpu).i8(), &want, 0.05);
                }
            }
            gpu.check().unwrap();
        }
    }
}
