//! The linear map of the engine on a GPU: INT8 codes times a 2:4 sparse (or dense) INT8 weight, on tensor cores.
//!
//! `acc[t, o] = sum of x[t, i] * w[o, i]` is exact in i32. Then, in f32 and each operation rounded by itself as in
//! [`super::int8_linear`]: `y = acc * scale[o] + bias[o]`; after the output pair, if there is one,
//! `y = code(y, output_step[o]) * output_step[o]`; and y is stored as it is, or as the codes of `activation(y)` that
//! the next map multiplies. `code` is that of [`super::lsq`] for steps between 1e-30 and 1e30: true division, half to
//! even, -127..=127. An activation after an output pair has 255 arguments, and is looked up ([`Store::table`]): codes are the
//! CPU's then. Other activations than ReLU are computed to a few units of 1e-7, so that codes next to ties may differ.
//!
//! Several kernels compute it, and which is fastest depends on GPU and shape: [`kernels`] lists those that can, for
//! the caller to time. All give the same accumulators.

mod cuda;
mod normed;
mod pack;

use std::fmt;

#[cfg(test)]
pub(crate) use cuda::variants;

use super::activation::{self, Activation};
use super::int8_linear::quantize;
use super::norm_codes;
use crate::cuda::Gpu;
use crate::{DType, Device, Tensor};

/// Rows of this length or more could overflow the i32 accumulator, as in [`super::int8_linear`].
const COLS_LIMIT: usize = 131_072;

/// A weight `[out, in]` of INT8 codes on a GPU, in the order that its kernels read.
#[derive(Clone)]
pub struct Weight {
    packed: Tensor,
    shape: Shape,
}

#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    cols: usize,
    sparse: bool,
}

impl Weight {
    /// A 2:4 weight from the packed format: `values` i8 `[out, in / 2]`, `meta` u8 `[out, ceil(in / 8)]`, both in host
    /// memory. Panics if the shapes disagree; what the indices say is the reader's to check.
    pub fn sparse(gpu: Gpu, values: &Tensor, meta: &Tensor) -> Weight {
        let (rows, cols) = (values.rows(), values.width() * 2);
        assert!(
            cols.is_multiple_of(4) && meta.shape() == [rows, cols.div_ceil(8)],
            "{values:?} with {meta:?}"
        );
        Self::new(gpu, pack::sparse(values.i8(), meta.u8(), rows, cols), rows, cols, true)
    }

    /// A dense weight from `codes` i8 `[out, in]` in host memory, for maps without a sparse weight and for comparison.
    /// Panics unless `in` is a multiple of 4.
    pub fn dense(gpu: Gpu, codes: &Tensor) -> Weight {
        let (rows, cols) = (codes.rows(), codes.width());
        assert!(cols.is_multiple_of(4), "a dense weight of {codes:?}");
        Self::new(gpu, pack::dense(codes.i8(), rows, cols), rows, cols, false)
    }

    fn new(gpu: Gpu, packed: Vec<i8>, rows: usize, cols: usize, sparse: bool) -> Weight {
        assert!(rows >= 1 && (1..COLS_LIMIT).contains(&cols), "INT8 weight of shape [{rows}, {cols}]");
        let bytes = packed.len();
        let packed = Tensor::from_i8(packed, &[bytes]).to(Device::Cuda(gpu));
        Weight { packed, shape: Shape { rows, cols, sparse } }
    }

    /// Number of output features.
    pub fn rows(&self) -> usize {
        self.shape.rows
    }

    /// Number of input features.
    pub fn cols(&self) -> usize {
        self.shape.cols
    }

    /// Whether it is 2:4.
    pub fn is_sparse(&self) -> bool {
        self.shape.sparse
    }

    fn gpu(&self) -> Gpu {
        match self.packed.device() {
            Device::Cuda(gpu) => gpu,
            Device::Cpu => unreachable!("weights are on a GPU"),
        }
    }

    /// Bytes it takes on the GPU.
    pub fn bytes(&self) -> usize {
        self.packed.len()
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_sparse() { "2:4" } else { "dense" };
        write!(f, "Weight[{}, {}] {kind} on {:?}", self.rows(), self.cols(), self.packed.device())
    }
}

/// What becomes of the accumulators. Tensors are f32 `[out]` on the weight's GPU.
#[derive(Clone, Debug)]
pub struct Epilogue {
    /// Step size of the input times that of the weight's row.
    pub scale: Tensor,
    /// Added after scaling.
    pub bias: Option<Tensor>,
    /// Step sizes of the output pair: y is rounded to their grid. One for each feature, because several maps of one
    /// input (queries, keys and values) are one product.
    pub output_step: Option<Tensor>,
    /// What is written.
    pub store: Store,
}

impl Epilogue {
    fn check(&self, w: &Weight) {
        let step = self.store.parameters().filter(|t| t.dtype() == DType::F32);
        for t in
            [Some(&self.scale), self.bias.as_ref(), self.output_step.as_ref(), step].into_iter().flatten()
        {
            assert!(t.dtype() == DType::F32 && t.len() == w.rows(), "{t:?} of {w:?}");
        }
    }
}

/// What a map writes.
#[derive(Clone, Debug)]
pub enum Store {
    /// The integer sums, i32. Scale, bias and output pair do not count.
    Accumulators,
    /// y, f16.
    Half,
    /// The codes of `activation(y)`, i8.
    Codes {
        /// The function, none for the codes of y.
        activation: Option<Activation>,
        /// Step sizes of the codes.
        step: Tensor,
    },
    /// The code, i8, that a table has for that of y in the output pair; see [`Store::table`].
    Table {
        /// Those for -127 to 127.
        codes: Tensor,
        /// Whether every y is known to be less than 2^23 steps of the pair, so that its place needs no comparison.
        bounded: bool,
    },
}

/// Places of a table: one more than there are codes, which makes it words.
const TABLE: usize = 256;

impl Store {
    /// The codes of step `step` of what `activation` makes of codes of an output pair, all of step `pair`. No |y| is more
    /// than `most`, which may be infinite: kernels are faster for less than 2^23 steps.
    pub fn table(gpu: Gpu, activation: Activation, pair: f32, step: f32, most: f32) -> Store {
        let y = (0..TABLE).map(|place| (place as f32 - 127.0).min(127.0) * pair).collect();
        let y = activation::apply(&Tensor::from_f32(y, &[TABLE]), activation);
        let mut codes = vec![0; TABLE];
        quantize(y.f32(), step, &mut codes);
        let codes = Tensor::from_i8(codes, &[TABLE]).to(Device::Cuda(gpu));
        Store::Table { codes, bounded: most / pair < 8_388_608.0 }
    }

    /// What is stored for each feature or code: step sizes, or a table.
    fn parameters(&self) -> Option<&Tensor> {
        match self {
            Store::Codes { step, .. } => Some(step),
            Store::Table { codes, .. } => Some(codes),
            Store::Accumulators | Store::Half => None,
        }
    }

    /// Element type of the output.
    pub fn dtype(&self) -> DType {
        match self {
            Store::Accumulators => DType::I32,
            Store::Half => DType::F16,
            Store::Codes { .. } | Store::Table { .. } => DType::I8,
        }
    }
}

pub use cuda::Kernel;
pub use normed::NormedKernel;

/// The kernels that can multiply `w` with this many tokens on its GPU, the likely fastest first. Never empty.
pub fn kernels(w: &Weight, tokens: usize) -> Vec<Kernel> {
    cuda::kernels(w, tokens)
}

/// Compiles, on all threads, what a launch of each kernel with this weight and epilogue needs.
pub fn prepare(all: &[(Kernel, &Weight, &Epilogue)]) {
    cuda::prepare(all);
}

/// Changes with the kernels: what was measured of others says nothing.
pub fn version() -> u64 {
    cuda::version()
}

/// Writes the map of `x`, i8 `[tokens, in]`, to `out`, `[tokens, out]` of [`Store::dtype`], both on the weight's GPU.
///
/// Nothing is allocated and nothing waited for, so the launch can be captured in a CUDA graph. Panics if shapes or
/// types disagree, or if the kernel is none of [`kernels`] for this weight.
pub fn sparse_linear(kernel: &Kernel, x: &Tensor, w: &Weight, e: &Epilogue, out: &mut Tensor) {
    let tokens = x.rows();
    assert!(x.dtype() == DType::I8 && x.width() == w.cols(), "{x:?} for {w:?}");
    assert!(
        out.dtype() == e.store.dtype() && out.width() == w.rows() && out.rows() == tokens,
        "{out:?} of {w:?}"
    );
    if let Store::Table { codes, .. } = &e.store {
        assert!(e.output_step.is_some() && codes.dtype() == DType::I8 && codes.len() == TABLE, "{codes:?}");
    }
    e.check(w);
    cuda::launch(kernel, x, w, e, out);
}

/// What follows a map in the same kernel: [`norm_codes::add_norm`] of what it would have written.
#[derive(Clone, Copy, Debug)]
pub struct AddNorm<'a> {
    /// Step size of the map's codes, where it stores such.
    pub pair: f32,
    /// f16 `[tokens, out]`. `out.hidden` may be the same tensor.
    pub residual: &'a Tensor,
    /// Which norm.
    pub norm: norm_codes::Norm<'a>,
    /// What is written.
    pub out: norm_codes::Out<'a>,
}

/// The kernels that can do both for `w` and this many tokens on its GPU, the likely fastest first. There are none for many
/// tokens, and none for most widths.
pub fn normed_kernels(w: &Weight, tokens: usize) -> Vec<NormedKernel> {
    normed::kernels(w, tokens)
}

/// [`prepare`] of these.
pub fn prepare_normed(all: &[(NormedKernel, &Weight, &Epilogue, norm_codes::Norm)]) {
    normed::prepare(all);
}

/// [`sparse_linear`] and [`norm_codes::add_norm`] in one kernel, bit for bit, for maps that store halves or codes without an
/// activation. Panics as they do, or if the kernel is none of [`normed_kernels`] for this weight.
pub fn sparse_linear_norm(kernel: &NormedKernel, x: &Tensor, w: &Weight, e: &Epilogue, then: AddNorm) {
    let shape = [x.rows(), w.rows()];
    assert!(x.dtype() == DType::I8 && x.width() == w.cols(), "{x:?} for {w:?}");
    assert!(
        matches!(e.store, Store::Half | Store::Codes { activation: None, .. }),
        "a norm of {:?}",
        e.store
    );
    assert!(then.residual.dtype() == DType::F16 && then.residual.shape() == shape, "{:?}", then.residual);
    e.check(w);
    norm_codes::check(Some(then.norm), then.out, &shape);
    normed::launch(kernel, x, w, e, then);
}

#[cfg(test)]
mod tests {
    use super::super::check::devices;
    use super::*;
    use crate::cpu::random;
    use crate::ops::int8_linear::{Int8Weight, matmul_i32};

    /// Repeatable codes; a few rows of one sign and full size, which make the largest sums.
    pub(super) fn codes(rows: usize, cols: usize, seed: u64) -> Vec<i8> {
        let row = |r: usize| {
            let kind = random(seed ^ 77, r as u32) % 8;
            (0..cols).map(move |c| match kind {
                0 => 127,
                1 => -127,
                _ => (random(seed, (r * cols + c) as u32) % 255) as i32 as i8,
            })
        };
        (0..rows).flat_map(row).map(|c: i8| c.max(-127)).collect()
    }

    /// A 2:4 weight: dense codes, and values and indices of the packed format. Kept places are random; some kept values
    /// are zero, some groups are empty.
    pub(super) struct Sparse {
        pub(super) dense: Vec<i8>,
        pub(super) values: Tensor,
        pub(super) meta: Tensor,
    }

    pub(super) fn sparse(rows: usize, cols: usize, seed: u64) -> Sparse {
        const PAIRS: [[usize; 2]; 6] = [[0, 1], [0, 2], [1, 2], [0, 3], [1, 3], [2, 3]];
        let mut dense = codes(rows, cols, seed);
        let mut values = Vec::new();
        let mut meta = vec![0u8; rows * cols.div_ceil(8)];
        for (k, group) in dense.chunks_exact_mut(4).enumerate() {
            let r = random(seed ^ 5, k as u32);
            let kept = PAIRS[r as usize % 6];
            for (place, code) in group.iter_mut().enumerate() {
                if !kept.contains(&place) || r.is_multiple_of(31) {
                    *code = 0;
                }
            }
            values.extend(kept.map(|place| group[place]));
            let (row, at) = (k / (cols / 4), k % (cols / 4));
            meta[row * cols.div_ceil(8) + at / 2] |= ((kept[0] | kept[1] << 2) << (at % 2 * 4)) as u8;
        }
        Sparse {
            dense,
            values: Tensor::from_i8(values, &[rows, cols / 2]),
            meta: Tensor::from_u8(meta, &[rows, cols.div_ceil(8)]),
        }
    }

    pub(super) fn floats(n: usize, seed: u64, low: f32, high: f32) -> Tensor {
        let at = |i: usize| low + random(seed, i as u32) as f32 / u32::MAX as f32 * (high - low);
        Tensor::from_f32((0..n).map(at).collect(), &[n])
    }

    pub(super) fn gpus() -> impl Iterator<Item = Gpu> {
        devices().into_iter().filter_map(|d| match d {
            Device::Cpu => None,
            Device::Cuda(gpu) => Some(gpu),
        })
    }

    /// Runs every kernel of `w` into memory that holds something else, and hands its output to `check`.
    fn each_kernel(gpu: Gpu, x: &Tensor, w: &Weight, e: &Epilogue, check: impl Fn(&Kernel, &Tensor)) {
        run(gpu, x, w, e, &all(w, x.rows()), check);
    }

    /// Those of this GPU, and those of every GPU.
    fn all(w: &Weight, tokens: usize) -> Vec<Kernel> {
        let mut all = kernels(w, tokens);
        let more = cuda::mma(tokens).into_iter().filter(|k| !all.contains(k));
        all.extend(more.collect::<Vec<_>>());
        all
    }

    fn run(gpu: Gpu, x: &Tensor, w: &Weight, e: &Epilogue, of: &[Kernel], check: impl Fn(&Kernel, &Tensor)) {
        let device = Device::Cuda(gpu);
        let x = x.to(device);
        for kernel in of {
            let shape = [x.rows(), w.rows()];
            let n = shape[0] * shape[1];
            let stale = match e.store.dtype() {
                DType::I32 => Tensor::from_i32(vec![i32::MIN; n], &shape),
                DType::F16 => Tensor::from_f16(vec![half::f16::NAN; n], &shape),
                _ => Tensor::from_i8(vec![-128; n], &shape),
            };
            let mut out = stale.to(device);
            sparse_linear(kernel, &x, w, e, &mut out);
            gpu.check().unwrap_or_else(|e| panic!("{kernel} of {w:?}: {e}"));
            check(kernel, &out.to(Device::Cpu));
        }
    }

    fn accumulators(x: &Tensor, dense: &[i8], rows: usize) -> Vec<i32> {
        let mut acc = vec![0; x.rows() * rows];
        matmul_i32(x.i8(), x.rows(), &Int8Weight::new(dense, rows, x.width()), &mut acc);
        acc
    }

    fn check_accumulators(tokens: usize, rows: usize, cols: usize, seed: u64) {
        if gpus().next().is_none() {
            return;
        }
        let weight = sparse(rows, cols, seed);
        let x = Tensor::from_i8(codes(tokens, cols, !seed), &[tokens, cols]);
        let want = accumulators(&x, &weight.dense, rows);
        for gpu in gpus() {
            let scale = Tensor::full(&[rows], 1.0).to(Device::Cuda(gpu));
            let e = Epilogue { scale, bias: None, output_step: None, store: Store::Accumulators };
            let dense = Tensor::from_i8(weight.dense.clone(), &[rows, cols]);
            let both = [Weight::sparse(gpu, &weight.values, &weight.meta), Weight::dense(gpu, &dense)];
            for (k, w) in both.into_iter().enumerate() {
                // Compiling takes most of the time: the likely fastest always, of the others a third for each shape.
                let mut of = all(&w, tokens);
                let mut at = 0..;
                of.retain(|_| {
                    at.next().is_some_and(|at: usize| at == 0 || at % 3 == (seed as usize + k) % 3)
                });
                run(gpu, &x, &w, &e, &of, |kernel, out| {
                    for (i, (got, want)) in out.i32().iter().zip(&want).enumerate() {
                        assert_eq!(got, want, "{kernel} of {w:?}, token {}, feature {}", i / rows, i % rows);
                    }
                });
            }
        }
    }

    /// Every layer of BERT base and large (and so DistilBERT and RoBERTa) and of MiniLM; queries, keys and values are
    /// one product.
    #[test]
    fn accumulators_of_every_layer_are_those_of_the_cpu() {
        let mut seed = 0;
        for (width, inner) in [(384, 1536), (768, 3072), (1024, 4096)] {
            for (rows, cols) in [(3 * width, width), (width, width), (inner, width), (width, inner)] {
                // One with tiles for few tokens, one with those for many.
                for tokens in [100, 1500] {
                    check_accumulators(tokens, rows, cols, seed);
                    seed += 1;
                }
            }
        }
    }

    #[test]
    fn accumulators_of_odd_shapes_are_those_of_the_cpu() {
        check_accumulators(1, 1, 4, 1);
        check_accumulators(385, 768, 768, 2);
        check_accumulators(0, 5, 64, 3);
        for seed in 0..24 {
            let pick = |k: u32, most: u32| (random(seed, k) % most) as usize + 1;
            check_accumulators(pick(1, 300), pick(2, 500), 4 * pick(3, 300), seed);
        }
    }

    #[test]
    fn the_longest_row_does_not_overflow() {
        let (tokens, rows, cols) = (3, 2, COLS_LIMIT - 128);
        let x = Tensor::from_i8(vec![-127; tokens * cols], &[tokens, cols]);
        let dense = Tensor::from_i8(vec![127; rows * cols], &[rows, cols]);
        let want = -127 * 127 * cols as i32;
        for gpu in gpus() {
            let scale = Tensor::full(&[rows], 1.0).to(Device::Cuda(gpu));
            let e = Epilogue { scale, bias: None, output_step: None, store: Store::Accumulators };
            each_kernel(gpu, &x, &Weight::dense(gpu, &dense), &e, |kernel, out| {
                assert!(out.i32().iter().all(|&a| a == want), "{kernel}: {:?}", out.i32());
            });
        }
    }

    fn code(x: f32, s: f32) -> f32 {
        (x / s).round_ties_even().clamp(-127.0, 127.0) + 0.0
    }

    /// Each way to store against the definition, with and without what is optional.
    /// -128 is no code, however small a step is beside the minimum of the function.
    #[test]
    fn codes_of_activations_stay_on_the_grid() {
        let (tokens, rows, cols) = (100, 150, 200);
        let weight = sparse(rows, cols, 9);
        let x = Tensor::from_i8(codes(tokens, cols, 4), &[tokens, cols]);
        for gpu in gpus() {
            let device = Device::Cuda(gpu);
            let w = Weight::sparse(gpu, &weight.values, &weight.meta);
            for function in [Activation::Gelu, Activation::GeluTanh, Activation::Silu, Activation::Tanh] {
                let step = floats(rows, 4, 1e-4, 2e-4).to(device);
                let store = Store::Codes { activation: Some(function), step };
                let scale = floats(rows, 1, 1e-6, 2e-5).to(device);
                let e = Epilogue { scale, bias: None, output_step: None, store };
                run(gpu, &x, &w, &e, &all(&w, tokens)[..1], |kernel, out| {
                    let least = out.i8().iter().min();
                    assert_eq!(least, Some(&-127), "{kernel}, {function:?}");
                });
            }
        }
    }

    #[test]
    fn epilogues_are_the_definition() {
        for (tokens, rows, cols) in [(200, 768, 768), (77, 150, 200)] {
            let weight = sparse(rows, cols, 9);
            let x = Tensor::from_i8(codes(tokens, cols, 4), &[tokens, cols]);
            let acc = accumulators(&x, &weight.dense, rows);
            let scale = floats(rows, 1, 1e-6, 2e-5);
            let bias = floats(rows, 2, -1.0, 1.0);
            let pair = floats(rows, 3, 0.01, 0.05);
            let step = floats(rows, 4, 0.01, 0.05);
            let functions = [
                None,
                Some(Activation::Gelu),
                Some(Activation::GeluTanh),
                Some(Activation::Relu),
                Some(Activation::Silu),
                Some(Activation::Tanh),
            ];
            for gpu in gpus() {
                let device = Device::Cuda(gpu);
                let w = Weight::sparse(gpu, &weight.values, &weight.meta);
                // All kernels share the epilogue's source: each takes its turn.
                let all = all(&w, tokens);
                let mut turns = all.iter().cycle();
                for with in 0..4 {
                    let (with_bias, with_pair) = (with & 1 != 0, with & 2 != 0);
                    let value = |i: usize| {
                        let o = i % rows;
                        let mut y = acc[i] as f32 * scale.f32()[o];
                        if with_bias {
                            y += bias.f32()[o];
                        }
                        if with_pair {
                            y = code(y, pair.f32()[o]) * pair.f32()[o];
                        }
                        y
                    };
                    let epilogue = |store| Epilogue {
                        scale: scale.to(device),
                        bias: with_bias.then(|| bias.to(device)),
                        output_step: with_pair.then(|| pair.to(device)),
                        store,
                    };
                    let kernel = turns.next().copied();
                    run(gpu, &x, &w, &epilogue(Store::Half), kernel.as_slice(), |kernel, out| {
                        for (i, got) in out.f16().iter().enumerate() {
                            let want = half::f16::from_f32(value(i));
                            assert_eq!(got.to_bits(), want.to_bits(), "{kernel}: {got} for {want} at {i}");
                        }
                    });
                    for (function, looked_up) in functions.into_iter().flat_map(|f| [(f, false), (f, true)]) {
                        if looked_up && (function.is_none() || !with_pair) {
                            continue;
                        }
                        // One pair and one step for all features.
                        let (pair, step) = match looked_up {
                            true => [&pair, &step].map(|t| Tensor::full(&[rows], t.f32()[0])).into(),
                            false => (pair.clone(), step.clone()),
                        };
                        let value = |i: usize| match looked_up {
                            true => {
                                let (o, s) = (i % rows, pair.f32()[0]);
                                let y = acc[i] as f32 * scale.f32()[o];
                                code(if with_bias { y + bias.f32()[o] } else { y }, s) * s
                            }
                            false => value(i),
                        };
                        let exact = looked_up || matches!(function, None | Some(Activation::Relu));
                        let y: Vec<f32> = (0..acc.len()).map(value).collect();
                        let y = Tensor::from_f32(y, &[acc.len()]);
                        let y = function.map_or(y.clone(), |f| activation::apply(&y, f));
                        let e = match function.filter(|_| looked_up) {
                            Some(f) => {
                                // Some functions know how large y can be.
                                let most = if with_bias {
                                    f32::INFINITY
                                } else {
                                    cols as f32 * 127.0 * 127.0 * 2e-5
                                };
                                let store = Store::table(gpu, f, pair.f32()[0], step.f32()[0], most);
                                Epilogue { output_step: Some(pair.to(device)), ..epilogue(store) }
                            }
                            None => epilogue(Store::Codes { activation: function, step: step.to(device) }),
                        };
                        let kernel = turns.next().copied();
                        run(gpu, &x, &w, &e, kernel.as_slice(), |kernel, out| {
                            let mut neighbours = 0;
                            for (i, &got) in out.i8().iter().enumerate() {
                                let want = code(y.f32()[i], step.f32()[i % rows]) as i8;
                                let off = (i32::from(got) - i32::from(want)).abs();
                                assert!(
                                    off <= i32::from(!exact),
                                    "{kernel}, {function:?}: {got} for {want} at {i} ({})",
                                    y.f32()[i]
                                );
                                neighbours += off;
                            }
                            let most = if exact { 0 } else { acc.len() as i32 / 5000 };
                            assert!(
                                neighbours <= most,
                                "{kernel}, {function:?}: {neighbours} of {}",
                                acc.len()
                            );
                        });
                    }
                }
            }
        }
    }

    /// Outputs of up to some 2^21, 2^23 and 2^25 steps of their pair, of either sign.
    #[test]
    fn far_outputs_have_the_last_codes_of_a_table() {
        let (tokens, rows, cols) = (200, 256, 256);
        let weight = sparse(rows, cols, 31);
        let x = Tensor::from_i8(codes(tokens, cols, 32), &[tokens, cols]);
        let acc = accumulators(&x, &weight.dense, rows);
        let largest = acc.iter().map(|a| a.unsigned_abs()).max().unwrap() as f32;
        let (pair, step) = (0.05, 0.07);
        for far in [2e6, 8e6, 3.2e7] {
            let scale = Tensor::full(&[rows], far / largest * pair);
            let y: Vec<f32> = acc.iter().map(|&a| code(a as f32 * scale.f32()[0], pair) * pair).collect();
            let y = activation::apply(&Tensor::from_f32(y, &[acc.len()]), Activation::Gelu);
            let want: Vec<i8> = y.f32().iter().map(|&y| code(y, step) as i8).collect();
            for gpu in gpus() {
                let device = Device::Cuda(gpu);
                let w = Weight::sparse(gpu, &weight.values, &weight.meta);
                let store = Store::table(gpu, Activation::Gelu, pair, step, far * pair);
                assert_eq!(matches!(store, Store::Table { bounded: true, .. }), far < 8_388_608.0);
                let output_step = Some(Tensor::full(&[rows], pair).to(device));
                let e = Epilogue { scale: scale.to(device), bias: None, output_step, store };
                let all = all(&w, tokens);
                let some = [all[0], all[all.len() - 1]];
                run(gpu, &x, &w, &e, &some, |kernel, out| assert!(out.i8() == want, "{kernel}, {far}"));
            }
        }
    }

    /// Steps, scales and sums at which multiplying by a reciprocal would give another code.
    #[test]
    fn codes_at_ties_are_those_of_a_division() {
        let (tokens, rows, cols) = (128, 256, 64);
        let weight = sparse(rows, cols, 21);
        let x = Tensor::from_i8(codes(tokens, cols, 22), &[tokens, cols]);
        let acc = accumulators(&x, &weight.dense, rows);
        // y is an integer times the step, or that and a half, up to the rounding of the product.
        let scale = floats(rows, 5, 1e-4, 1.0);
        let step = Tensor::from_f32(scale.f32().iter().map(|s| s * 2.0 * 23.0).collect(), &[rows]);
        let want: Vec<i8> = (0..acc.len())
            .map(|i| code(acc[i] as f32 * scale.f32()[i % rows], step.f32()[i % rows]) as i8)
            .collect();
        for gpu in gpus() {
            let device = Device::Cuda(gpu);
            let w = Weight::sparse(gpu, &weight.values, &weight.meta);
            let store = Store::Codes { activation: None, step: step.to(device) };
            let e = Epilogue { scale: scale.to(device), bias: None, output_step: None, store };
            each_kernel(gpu, &x, &w, &e, |kernel, out| assert!(out.i8() == want, "{kernel}"));
        }
    }

    /// The packed order, read back as the instructions define it (lane by lane), is the weight.
    #[test]
    fn packing_puts_every_code_where_the_instructions_look() {
        for (rows, cols) in [(64, 128), (100, 260), (1, 4), (130, 520)] {
            let weight = sparse(rows, cols, 3);
            let dense = |block: &[i8], step: usize, lane: usize, word: usize, byte: usize| {
                block[step * 2048 + lane * 16 + word * 4 + byte]
            };
            let along = cols.div_ceil(pack::COLS);
            for kind in [true, false] {
                let packed = match kind {
                    true => pack::sparse(weight.values.i8(), weight.meta.u8(), rows, cols),
                    false => pack::dense(&weight.dense, rows, cols),
                };
                let mut found = vec![0i32; rows.next_multiple_of(64) * along * 128];
                for (k, block) in packed.chunks_exact(pack::block_bytes(kind)).enumerate() {
                    let (row0, col0) = (k / along * 64, k % along * 128);
                    for step in 0..if kind { 2 } else { 4 } {
                        for row in 0..64 {
                            // Instructions' rows g and g + 8 of a warp are features 2g and 2g + 1.
                            let (warp, g, half) = (row / 16, row % 16 / 2, row % 2);
                            for place in 0..32 {
                                let lane = warp * 32 + g * 4 + place % 16 / 4;
                                let code = dense(block, step, lane, place / 16 * 2 + half, place % 4);
                                let col = if kind {
                                    let group = place / 2;
                                    let lane = warp * 32 + g * 4 + group / 8 * 2 + half;
                                    let byte = block[4096 + step * 512 + lane * 4 + group % 8 / 2] as u8;
                                    let nibble = byte >> (group % 2 * 4) & 15;
                                    assert!(nibble & 3 < nibble >> 2, "indices ascend");
                                    step * 64 + group * 4 + (nibble >> (place % 2 * 2) & 3) as usize
                                } else {
                                    step * 32 + place
                                };
                                found[(row0 + row) * along * 128 + col0 + col] += i32::from(code);
                            }
                        }
                    }
                }
                for (i, &code) in found.iter().enumerate() {
                    let (row, col) = (i / (along * 128), i % (along * 128));
                    let inside = row < rows && col < cols;
                    let want = if inside { weight.dense[row * cols + col] } else { 0 };
                    assert_eq!(code, i32::from(want), "row {row}, column {col} of [{rows}, {cols}]");
                }
            }
        }
    }
}
