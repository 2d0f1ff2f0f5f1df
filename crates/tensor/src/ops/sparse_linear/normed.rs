//! A map of few tokens with the norm behind it in one kernel (`normed.cu`).

use std::fmt;

use super::cuda::{ALIGNMENT, Chip, RESERVED, options};
use super::pack::{COLS, block_bytes};
use super::{AddNorm, Epilogue, Shape, Weight};
use crate::cuda::{Arg, Grid, Source, TensorMap, Variant};
use crate::ops::norm_codes::{ABSENT, Norm, outputs, parts};
use crate::{DType, Tensor};

pub(super) static NORMED: Source = Source {
    name: "sparse_linear_normed",
    text: concat!(
        include_str!("epilogue.cuh"),
        include_str!("../tma.cuh"),
        include_str!("hopper.cuh"),
        include_str!("../norm_codes/row.cuh"),
        "\n#line 1 \"normed.cu\"\n",
        include_str!("normed.cu")
    ),
};

/// A kernel that computes a map and the norm behind it, for Hopper, and the sizes it is compiled for. Its text (`Display`)
/// names it in plans and tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NormedKernel {
    /// Warpgroups of a block, 64 features each.
    groups: usize,
    /// Tokens of a cluster.
    tokens: usize,
    /// Blocks that share out the inputs of the same features.
    split: usize,
    /// Whether the weight stays in registers; it is read stage by stage if not.
    resident: bool,
}

impl fmt::Display for NormedKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = format!("with norm {}x{}", self.groups * 64, self.tokens);
        if self.split > 1 {
            name += &format!(" split {}", self.split);
        }
        name += if self.resident { " resident" } else { " streamed" };
        f.pad(&name)
    }
}

/// Blocks of a cluster that every Hopper GPU starts.
const MOST_BLOCKS: usize = 8;

/// Tokens of a cluster.
const TILES: [usize; 4] = [16, 32, 64, 128];

impl NormedKernel {
    /// Blocks of a cluster.
    fn blocks(self, rows: usize) -> usize {
        rows / (self.groups * 64) * self.split
    }

    fn grid(self, rows: usize, tokens: usize) -> usize {
        self.blocks(rows) * tokens.div_ceil(self.tokens)
    }

    /// Registers that a thread needs, which all those of a block have to share; with gain and bias of a row or without.
    fn registers(self, w: Shape, gain: bool) -> usize {
        let step = if w.sparse { 64 } else { 32 };
        let inputs = if self.resident { w.cols / self.split } else { 2 * COLS };
        let weight = inputs / step * (4 + usize::from(w.sparse));
        // A lane's share of the residual, in halves, and of gain and bias.
        let columns = (w.rows / 8).div_ceil(32) * 8;
        let held = columns / 2 + if gain { columns * 2 } else { 0 };
        // Sums, then those of other blocks or what they are finished with; and what else there is.
        self.tokens / 2 + self.tokens / 4 + weight + held + 12
    }

    fn threads(self) -> usize {
        self.groups * 128 + if self.resident { 0 } else { 32 }
    }

    fn fits(self, w: Shape, gain: bool) -> bool {
        self.registers(w, gain) <= ((64 << 10) / self.threads() / 8 * 8).min(255)
    }

    /// Bytes of a stage: 128 inputs of the tokens, and of the weight unless it is resident.
    fn stage(self, sparse: bool) -> usize {
        self.tokens * COLS + if self.resident { 0 } else { self.groups * block_bytes(sparse) }
    }

    /// Bytes for sums from other blocks, and for the rows that a block normalises (as halves, the most they take).
    fn exchanged(self, w: Shape) -> usize {
        let sums = (self.split - 1) * self.groups * 64 * self.tokens / self.split * 4;
        sums + self.tokens.div_ceil(self.blocks(w.rows)) * w.rows * DType::F16.size()
    }

    /// Stages: of a resident weight all, because none is used again.
    fn stages(self, shared: usize, w: Shape) -> usize {
        let all = w.cols / self.split / COLS;
        let room = shared.saturating_sub(RESERVED + ALIGNMENT + self.exchanged(w)) / self.stage(w.sparse);
        room.min(all)
    }

    fn takes(self, chip: Chip, w: Shape) -> bool {
        let whole = w.rows.is_multiple_of(self.groups * 64)
            && w.rows <= 1024
            && w.cols.is_multiple_of(self.split * COLS)
            && (1..=MOST_BLOCKS).contains(&self.blocks(w.rows))
            && self.tokens / self.split >= 8;
        let enough = if self.resident { w.cols / self.split / COLS } else { 2 };
        chip.hopper && whole && self.fits(w, false) && self.stages(chip.shared, w) >= enough
    }
}

pub(super) fn kernels(w: &Weight, tokens: usize) -> Vec<NormedKernel> {
    candidates(Chip::of(w.gpu()), w.shape, tokens)
}

fn candidates(chip: Chip, w: Shape, tokens: usize) -> Vec<NormedKernel> {
    let mut found = Vec::new();
    for tile in TILES.into_iter().filter(|&t| t == 16 || t < tokens * 2) {
        for groups in [2, 3, 1] {
            for split in [1, 2, 4, 8] {
                // What fits in registers is not read again and again.
                let forms =
                    [true, false].map(|resident| NormedKernel { groups, tokens: tile, split, resident });
                let form = forms.into_iter().find(|k| k.takes(chip, w));
                // Blocks that wait for others' end are later than a second kernel.
                found.extend(form.filter(|k| k.grid(w.rows, tokens) <= chip.multiprocessors));
            }
        }
    }
    // A third to three quarters of the multiprocessors were best where it was measured (README): clusters find room beside the
    // kernel before.
    let cost = |k: &NormedKernel| {
        let blocks = k.grid(w.rows, tokens) as f64;
        let exchange = if w.cols > 1024 { 0.25 } else { 0.5 } * (k.split as f64).log2();
        (blocks / (0.55 * chip.multiprocessors as f64)).log2().abs()
            + exchange
            + if k.resident { 0.0 } else { 0.5 }
    };
    found.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
    found
}

/// What a kernel is compiled from, and its dynamic shared memory.
fn variant(kernel: NormedKernel, w: Shape, shared: usize, e: &Epilogue, norm: usize) -> (Variant, usize) {
    let stages = kernel.stages(shared, w);
    let mut constants = options(w.sparse, kernel.tokens, stages, kernel.split, kernel.resident, e);
    constants.extend([
        ("WGS", kernel.groups),
        ("COLS", if kernel.resident { w.cols / kernel.split } else { COLS }),
        ("WIDTH", w.rows),
        ("NORM", norm),
        // Read before the products where registers are left for them.
        ("GAIN_FIRST", kernel.fits(w, true).into()),
    ]);
    let bytes = ALIGNMENT + stages * kernel.stage(w.sparse) + kernel.exchanged(w);
    (NORMED.with(DType::F32, &constants), bytes)
}

pub(super) fn prepare(all: &[(NormedKernel, &Weight, &Epilogue, Norm)]) {
    let Some((_, w, ..)) = all.first() else { return };
    let gpu = w.gpu();
    let shared = gpu.shared_memory();
    let of = |(k, w, e, norm): &(NormedKernel, &Weight, &Epilogue, Norm)| {
        variant(*k, w.shape, shared, e, parts(Some(*norm)).0).0
    };
    gpu.prepare(&all.iter().map(of).collect::<Vec<_>>());
}

pub(super) fn launch(kernel: &NormedKernel, x: &Tensor, w: &Weight, e: &Epilogue, then: AddNorm) {
    let (gpu, shape, tokens) = (w.gpu(), w.shape, x.rows());
    let chip = Chip::of(gpu);
    assert!(kernel.takes(chip, shape), "{kernel} for {w:?}");
    if tokens == 0 {
        return;
    }
    let (which, norm) = parts(Some(then.norm));
    let (variant, shared) = variant(*kernel, shape, chip.shared, e, which);
    // The GPU has failed without, and nothing is started.
    let Some(from) = TensorMap::boxes(x.memory(), tokens, shape.cols, (kernel.tokens, COLS)) else { return };
    let optional = |t: Option<&Tensor>| t.map_or(ABSENT, |t| t.memory().into());
    let ([hidden, codes], step) = outputs(then.out);
    let mut arguments: Vec<Arg> = vec![
        from.into(),
        w.packed.memory().into(),
        e.scale.memory().into(),
        optional(e.bias.as_ref()),
        optional(e.output_step.as_ref()),
        optional(e.store.parameters()),
        then.pair.into(),
        then.residual.memory().into(),
    ];
    arguments.extend(norm);
    arguments.extend([hidden, codes, step, (tokens as i32).into(), (shape.cols as i32).into()]);
    let blocks = [kernel.grid(shape.rows, tokens) as u32, 1, 1];
    let grid = Grid { blocks, threads: kernel.threads() as u32, shared: shared as u32 };
    gpu.launch_early(variant, "linear_norm", grid, &arguments);
}

/// Every way to store, hold and normalise, for the test that compiles all sources.
#[cfg(test)]
pub(super) fn variants() -> Vec<Variant> {
    let ones = Tensor::full(&[1], 1.0);
    let chip = Chip { hopper: true, shared: 227 << 10, multiprocessors: 132 };
    let stores = [super::Store::Half, super::Store::Codes { activation: None, step: ones.clone() }];
    let mut all = Vec::new();
    for (rows, cols) in [(768, 768), (768, 3072), (1024, 4096), (384, 1536)] {
        for sparse in [true, false] {
            let w = Shape { rows, cols, sparse };
            for (i, kernel) in candidates(chip, w, 384).into_iter().enumerate() {
                let (scale, bias) = (ones.clone(), (i % 2 == 0).then(|| ones.clone()));
                let e = Epilogue { scale, bias, output_step: None, store: stores[i / 2 % 2].clone() };
                all.push(variant(kernel, w, chip.shared, &e, 1 + i % 2).0);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::tests::{codes, floats, gpus, sparse};
    use super::super::{Store, kernels, normed_kernels, prepare_normed, sparse_linear, sparse_linear_norm};
    use super::*;
    use crate::cuda::{Arena, Gpu, Layout, Pinned, Stream};
    use crate::ops::check::noise;
    use crate::ops::codes::Codes;
    use crate::ops::norm_codes::{Out, Summand, add_norm};
    use crate::{Device, f16};

    const HOPPER: Chip = Chip { hopper: true, shared: 227 << 10, multiprocessors: 132 };

    #[test]
    fn models_have_kernels_that_differ_and_fit() {
        for (rows, cols) in [(768, 768), (768, 3072), (1024, 1024), (1024, 4096), (384, 384), (384, 1536)] {
            for sparse in [true, false] {
                let w = Shape { rows, cols, sparse };
                for tokens in [1, 16, 100, 128, 384] {
                    let found = candidates(HOPPER, w, tokens);
                    let names: std::collections::HashSet<String> =
                        found.iter().map(|k| k.to_string()).collect();
                    assert!(!found.is_empty() && names.len() == found.len(), "{rows}x{cols}: {found:?}");
                    for k in found {
                        let bytes = k.stages(HOPPER.shared, w) * k.stage(sparse) + k.exchanged(w);
                        assert!(ALIGNMENT + bytes + RESERVED <= HOPPER.shared, "{k}: {bytes}");
                        assert!(
                            k.blocks(rows) * k.groups * 64 == rows * k.split && k.blocks(rows) <= 8,
                            "{k}"
                        );
                    }
                }
                assert!(candidates(HOPPER, w, 1 << 15).is_empty());
                assert!(candidates(Chip { hopper: false, ..HOPPER }, w, 16).is_empty());
            }
        }
        for (rows, cols) in [(2304, 768), (1280, 1280), (100, 768), (768, 100), (2, 768)] {
            assert!(candidates(HOPPER, Shape { rows, cols, sparse: true }, 16).is_empty(), "{rows}x{cols}");
        }
    }

    /// What was fastest on an H200 (README) is among the first that are offered.
    #[test]
    fn what_was_fastest_comes_first() {
        for (rows, cols, tokens, name) in [
            (768, 768, 16, "with norm 128x16 resident"),
            (768, 3072, 16, "with norm 192x16 split 2 resident"),
            (768, 768, 128, "with norm 128x16 resident"),
            (768, 768, 384, "with norm 192x32 resident"),
            (768, 3072, 768, "with norm 192x64 split 2 streamed"),
            (1024, 1024, 128, "with norm 128x32 resident"),
            (1024, 1024, 384, "with norm 128x64 resident"),
            (1024, 4096, 16, "with norm 128x16 streamed"),
            (384, 384, 384, "with norm 192x16 resident"),
            (384, 1536, 128, "with norm 192x16 split 2 resident"),
            (384, 1536, 384, "with norm 128x32 split 2 resident"),
        ] {
            let found = candidates(HOPPER, Shape { rows, cols, sparse: true }, tokens);
            let names: Vec<String> = found.iter().map(|k| k.to_string()).collect();
            let at = names.iter().position(|n| n == name);
            assert!(at.is_some_and(|at| at < 5), "{rows}x{cols}, {tokens} tokens: {name} in {names:?}");
        }
    }

    /// Rows beyond those of a batch, which are nobody's to write.
    const BEYOND: usize = 40;

    /// The rows of a tensor that has some more, and all of them.
    fn padded(gpu: Gpu, dtype: DType, rows: usize, width: usize) -> [Tensor; 2] {
        let shape = [rows + BEYOND, width];
        let arena = Arena::new(gpu, Layout::bytes(dtype, &shape)).unwrap();
        [[rows, width], shape].map(|shape| arena.start().tensor(dtype, &shape))
    }

    fn pinned<T: crate::cuda::Plain>(gpu: Gpu, of: &[T]) -> Pinned<T> {
        let mut p = Pinned::new(gpu, of.len()).unwrap();
        p.copy_from_slice(of);
        p
    }

    /// Hidden states and codes of every kernel are those of the map's kernel and the norm's, bit for bit, in place as the
    /// engine does it; rows beyond stay as they are.
    #[test]
    fn a_norm_in_the_same_kernel_is_the_norm_behind() {
        let cases = [
            (768, 768, vec![1, 16, 100, 385, 768]),
            (768, 3072, vec![7, 16, 129, 384]),
            (1024, 1024, vec![33, 384]),
            (1024, 4096, vec![16, 100, 384]),
            (384, 384, vec![50, 500]),
            (384, 1536, vec![1, 130]),
        ];
        for gpu in gpus() {
            let device = Device::Cuda(gpu);
            for (rows, cols, tokens) in &cases {
                let (rows, cols) = (*rows, *cols);
                let weight = sparse(rows, cols, rows as u64);
                let dense = Tensor::from_i8(weight.dense.clone(), &[rows, cols]);
                let weights = [Weight::sparse(gpu, &weight.values, &weight.meta), Weight::dense(gpu, &dense)];
                // Outputs of about 1, which the codes of the pair cover.
                let deviation = 74.0 * 74.0 * (cols as f32 / 2.0).sqrt();
                let scale = floats(rows, 1, 0.5 / deviation, 1.5 / deviation).to(device);
                let (bias, pair) = (floats(rows, 2, -1.0, 1.0).to(device), 0.031);
                let (gain, shift) = (noise(&[rows], 3).to(device), noise(&[rows], 4).to(device));
                for (&tokens, w) in tokens.iter().flat_map(|t| weights.iter().map(move |w| (t, w))) {
                    let found = normed_kernels(w, tokens);
                    assert_eq!(found.is_empty(), !gpu.hopper(), "{w:?}");
                    let epilogue = |half: bool, bias: Option<Tensor>| {
                        let step = Tensor::full(&[rows], pair).to(device);
                        let (scale, output_step) = (scale.clone(), None);
                        let codes = Store::Codes { activation: None, step };
                        Epilogue { scale, bias, output_step, store: if half { Store::Half } else { codes } }
                    };
                    let forms = [(false, Some(bias.clone())), (true, Some(bias.clone())), (false, None)];
                    let epilogues = forms.map(|(half, bias)| epilogue(half, bias));
                    let norms = [
                        Norm::Layer { gain: &gain, bias: &shift, eps: 1e-12 },
                        Norm::Rms { gain: &gain, eps: 1e-5 },
                    ];
                    // Every kernel with codes and with halves; each third without bias, each fifth with the other norm.
                    let runs: Vec<_> = found
                        .iter()
                        .flat_map(|k| [0, 1].map(|half| (*k, half)))
                        .enumerate()
                        .map(|(i, (k, half))| {
                            let e = if half == 0 && i % 3 == 2 { 2 } else { half };
                            (k, e, norms[usize::from(i % 5 == 4)])
                        })
                        .collect();
                    let launches = runs.iter().map(|&(k, e, norm)| (k, w, &epilogues[e], norm));
                    prepare_normed(&launches.collect::<Vec<_>>());
                    let [x, all_x] = padded(gpu, DType::I8, tokens, cols);
                    let [hidden, all_hidden] = padded(gpu, DType::F16, tokens, rows);
                    let [to, all_codes] = padded(gpu, DType::I8, tokens, rows);
                    let mut added = [DType::I8, DType::F16].map(|of| {
                        let [added, _] = padded(gpu, of, tokens, rows);
                        added
                    });
                    let inputs = pinned(gpu, &codes(tokens + BEYOND, cols, 9));
                    let states = noise(&[tokens + BEYOND, rows], 2).to_f16();
                    let states = pinned(gpu, states.f16());
                    let stale = pinned(gpu, &vec![-128i8; (tokens + BEYOND) * rows]);
                    let mut stream = Stream::new(gpu).unwrap();
                    let mut outputs = |launch: &mut dyn FnMut(AddNorm), norm, without: bool| {
                        let codes = Some(Codes { to: &to, step: 0.021 }).filter(|_| !without);
                        let out = Out { hidden: Some(&hidden), codes };
                        let mut got_hidden = pinned(gpu, &vec![f16::ZERO; states.len()]);
                        let mut got_codes = pinned(gpu, &vec![0i8; stale.len()]);
                        let done = stream.run(|| {
                            inputs.upload(&all_x);
                            states.upload(&all_hidden);
                            stale.upload(&all_codes);
                            launch(AddNorm { pair, residual: &hidden, norm, out });
                            got_hidden.download(&all_hidden);
                            got_codes.download(&all_codes);
                        });
                        done.unwrap();
                        let bits: Vec<u16> = got_hidden.iter().map(|h| h.to_bits()).collect();
                        (bits, got_codes.to_vec())
                    };
                    for (i, &(kernel, e, norm)) in runs.iter().enumerate() {
                        let without = i % 7 == 6;
                        let (e, half) = (&epilogues[e], e == 1);
                        let added = &mut added[usize::from(half)];
                        let mut two = |then: AddNorm| {
                            sparse_linear(&kernels(w, tokens)[0], &x, w, e, added);
                            let summand =
                                if half { Summand::Half(added) } else { Summand::Codes(added, pair) };
                            add_norm(summand, Some(then.residual), then.norm, then.out);
                        };
                        let want = outputs(&mut two, norm, without);
                        let mut one = |then: AddNorm| sparse_linear_norm(&kernel, &x, w, e, then);
                        let got = outputs(&mut one, norm, without);
                        let differ = |a: usize| {
                            format!("{kernel} of {w:?}, {tokens} tokens, halves {half}: row {}", a / rows)
                        };
                        for (i, (got, want)) in got.0.iter().zip(&want.0).enumerate() {
                            assert_eq!(got, want, "{}", differ(i));
                        }
                        for (i, (got, want)) in got.1.iter().zip(&want.1).enumerate() {
                            assert_eq!(got, want, "codes, {}", differ(i));
                        }
                        let beyond = tokens * rows;
                        assert!(
                            got.0[beyond..].iter().zip(&states[beyond..]).all(|(a, b)| *a == b.to_bits())
                        );
                        assert!(got.1[beyond..].iter().all(|&c| c == -128));
                        assert_eq!(got.1[..beyond].contains(&-128), without, "{kernel}");
                    }
                }
            }
            gpu.check().unwrap();
        }
    }
}
