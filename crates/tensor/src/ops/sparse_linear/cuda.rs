//! Which kernels there are and how they are started.

use std::fmt;

use super::pack::{COLS, block_bytes};
use super::{Epilogue, Store, Weight};
use crate::cuda::{Arg, Gpu, Grid, Source, TensorMap, Variant, fnv};
use crate::ops::activation::Activation;
use crate::{DType, Device, Tensor};

static MMA: Source = Source {
    name: "sparse_linear_mma",
    text: concat!(include_str!("epilogue.cuh"), "\n#line 1 \"mma.cu\"\n", include_str!("mma.cu")),
};

static WGMMA: Source = Source {
    name: "sparse_linear_wgmma",
    text: concat!(include_str!("epilogue.cuh"), "\n#line 1 \"wgmma.cu\"\n", include_str!("wgmma.cu")),
};

/// A kernel and the sizes it is compiled for. Its text (`Display`) names it in plans and tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel(Form);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Form {
    /// Any GPU: 64 features by `tokens`.
    Mma { tokens: usize },
    /// Hopper.
    Wgmma(Wgmma),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Wgmma {
    /// Warpgroups that multiply, 64 features each.
    groups: usize,
    /// Tokens of a tile.
    tokens: usize,
    /// Blocks that share their tokens.
    cluster: usize,
    /// Whether the weight stays in registers: its inputs, or 0.
    resident: usize,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Form::Mma { tokens } => write!(f, "mma 64x{tokens}"),
            Form::Wgmma(k) => {
                let weight = if k.resident > 0 { "resident" } else { "streamed" };
                write!(f, "wgmma {}x{} cluster {} {weight}", k.groups * 64, k.tokens, k.cluster)
            }
        }
    }
}

/// Tiles of wgmma kernels.
const GROUPS_BY_TOKENS: [(usize, usize); 8] =
    [(3, 128), (3, 192), (3, 96), (2, 256), (2, 192), (2, 128), (3, 64), (2, 64)];

/// Stages of mma's activations.
const MMA_STAGES: usize = 3;

/// Bytes that a block's barriers take at most, and what alignment of its stages costs.
const RESERVED: usize = 2 << 10;

impl Kernel {
    fn takes(self, gpu: Gpu, w: &Weight) -> bool {
        match self.0 {
            Form::Mma { .. } => true,
            Form::Wgmma(k) => {
                let resident = k.resident == 0 || k.resident == w.cols;
                let stages = k.stages(gpu.shared_memory(), w.sparse);
                gpu.hopper() && w.cols.is_multiple_of(16) && resident && k.fits(w.sparse) && stages >= 2
            }
        }
    }
}

impl Wgmma {
    /// Bytes of a stage: 128 inputs of the tokens, and of the weight unless it is resident.
    fn stage(self, sparse: bool) -> usize {
        let weight = if self.resident > 0 { 0 } else { self.groups * block_bytes(sparse) };
        self.tokens * COLS + weight
    }

    /// Whether a thread's registers hold the accumulators, the weight if it is resident, and what else there is.
    fn fits(self, sparse: bool) -> bool {
        let step = if sparse { 64 } else { 32 };
        let weight = if self.resident == 0 { 20 } else { self.resident / step * (4 + usize::from(sparse)) };
        let registers = if self.groups == 3 { 160 } else { 240 };
        self.resident.is_multiple_of(step) && self.tokens / 2 + weight + 36 <= registers
    }

    /// Bytes for finished tiles on their way out, the most of any epilogue.
    fn staging(self) -> usize {
        self.groups * 64 * self.tokens.min(64)
    }

    /// Stages that fit beside it.
    fn stages(self, shared: usize, sparse: bool) -> usize {
        (shared.saturating_sub(RESERVED + self.staging()) / self.stage(sparse)).min(24)
    }
}

pub(super) fn kernels(w: &Weight, tokens: usize) -> Vec<Kernel> {
    let Device::Cuda(gpu) = w.packed.device() else { unreachable!("weights are on a GPU") };
    let narrow = [16, 32, 64, 128].into_iter().filter(|&n| n == 16 || n < tokens * 2).rev();
    let mma = narrow.map(|tokens| Form::Mma { tokens });
    // Resident weights first: where they fit, they are fastest.
    let wgmma = GROUPS_BY_TOKENS.into_iter().flat_map(|(groups, tokens)| {
        let cluster = if w.rows > groups * 64 { 2 } else { 1 };
        [w.cols, 0].map(|resident| Wgmma { groups, tokens, cluster, resident })
    });
    let mut wgmma: Vec<Wgmma> = wgmma.filter(|k| k.tokens < tokens * 2).collect();
    wgmma.sort_by_key(|k| k.resident == 0);
    let all = wgmma.into_iter().map(Form::Wgmma).chain(mma).map(Kernel);
    all.filter(|k| k.takes(gpu, w)).collect()
}

/// The constants that both sources are compiled with.
fn options(sparse: bool, tokens: usize, stages: usize, e: &Epilogue) -> Vec<(&'static str, usize)> {
    let (store, act) = match &e.store {
        Store::Accumulators => (0, None),
        Store::Half => (1, None),
        Store::Codes { activation, .. } => (2, *activation),
    };
    let act = match act {
        None => 0,
        Some(Activation::Gelu) => 1,
        Some(Activation::GeluTanh) => 2,
        Some(Activation::Relu) => 3,
        Some(Activation::Silu) => 4,
        Some(Activation::Tanh) => 5,
    };
    vec![
        ("SPARSE", sparse.into()),
        ("BN", tokens),
        ("STAGES", stages),
        ("STORE", store),
        ("ACT", act),
        ("BIAS", e.bias.is_some().into()),
        ("PAIR", e.output_step.is_some().into()),
    ]
}

/// What a kernel is compiled from, and its dynamic shared memory.
fn variant(kernel: Kernel, sparse: bool, shared: usize, e: &Epilogue) -> (Variant, usize) {
    match kernel.0 {
        Form::Mma { tokens } => {
            let bytes = (MMA_STAGES * tokens * (COLS + 16)).max(64 * tokens.min(64));
            (MMA.with(DType::F32, &options(sparse, tokens, MMA_STAGES, e)), bytes)
        }
        Form::Wgmma(k) => {
            let stages = k.stages(shared, sparse);
            let mut constants = options(sparse, k.tokens, stages, e);
            constants.extend([
                ("WGS", k.groups),
                ("CLUSTER", k.cluster),
                ("RESIDENT", usize::from(k.resident > 0)),
                ("COLS", k.resident.max(COLS)),
                ("ORDERED", 1),
                ("DIRECT", 0),
            ]);
            (WGMMA.with(DType::F32, &constants), RESERVED + stages * k.stage(sparse) + k.staging())
        }
    }
}

pub(super) fn prepare(all: &[(Kernel, &Weight, &Epilogue)]) {
    let Some(Device::Cuda(gpu)) = all.first().map(|(_, w, _)| w.packed.device()) else { return };
    let shared = gpu.shared_memory();
    let variants: Vec<Variant> = all.iter().map(|(k, w, e)| variant(*k, w.sparse, shared, e).0).collect();
    gpu.prepare(&variants);
}

pub(super) fn version() -> u64 {
    fnv([MMA.text, WGMMA.text].concat().as_bytes())
}

pub(super) fn launch(kernel: &Kernel, x: &Tensor, w: &Weight, e: &Epilogue, out: &mut Tensor) {
    let Device::Cuda(gpu) = w.packed.device() else { unreachable!("weights are on a GPU") };
    assert!(kernel.takes(gpu, w), "{kernel} for {w:?}");
    let tokens = x.rows();
    if tokens == 0 {
        return;
    }
    let (variant, shared) = variant(*kernel, w.sparse, gpu.shared_memory(), e);
    let optional = |t: Option<&Tensor>| t.map_or(Arg::Pointer(0), |t| t.memory().into());
    let step = match &e.store {
        Store::Codes { step, .. } => Some(step),
        _ => None,
    };
    let rest = [
        w.packed.memory().into(),
        e.scale.memory().into(),
        optional(e.bias.as_ref()),
        optional(e.output_step.as_ref()),
        optional(step),
        out.memory_mut().into(),
        (tokens as i32).into(),
        (w.rows as i32).into(),
        (w.cols as i32).into(),
    ];
    let (name, first, blocks, threads) = match kernel.0 {
        Form::Mma { tokens: tile } => {
            let blocks = w.rows.div_ceil(64) * tokens.div_ceil(tile);
            ("multiply_tiles", x.memory().into(), blocks, 128)
        }
        Form::Wgmma(k) => {
            let tiles = w.rows.div_ceil(k.cluster * k.groups * 64) * tokens.div_ceil(k.tokens);
            let clusters = tiles.min(gpu.multiprocessors() / k.cluster);
            let map = TensorMap::rows(x.memory(), tokens, w.cols, k.tokens / k.cluster);
            // Memory that was not had: the GPU has failed, and nothing is started.
            let Some(map) = map else { return };
            ("sparse_linear", map.into(), clusters * k.cluster, (k.groups + 1) * 128)
        }
    };
    let arguments: Vec<Arg> = std::iter::once(first).chain(rest).collect();
    let grid = Grid { blocks: [blocks as u32, 1, 1], threads: threads as u32, shared: shared as u32 };
    gpu.launch_early(variant, name, grid, &arguments);
}

/// Every kernel with epilogues that between them have every branch, for the test that compiles all sources: those for
/// any GPU, and those for Hopper.
#[cfg(test)]
pub(crate) fn variants() -> (Vec<Variant>, Vec<Variant>) {
    let ones = Tensor::full(&[1], 1.0);
    let epilogue = |store, full: bool| Epilogue {
        scale: ones.clone(),
        bias: full.then(|| ones.clone()),
        output_step: full.then(|| ones.clone()),
        store,
    };
    let codes = |activation| Store::Codes { activation, step: ones.clone() };
    let epilogues = [
        epilogue(Store::Accumulators, false),
        epilogue(Store::Half, true),
        epilogue(codes(None), true),
        epilogue(codes(Some(Activation::Gelu)), true),
        epilogue(codes(Some(Activation::Silu)), false),
    ];
    let with = |kernel: Form, sparse: bool, e: &Epilogue| variant(Kernel(kernel), sparse, 227 << 10, e).0;
    let (mut any, mut hopper) = (Vec::new(), Vec::new());
    for sparse in [true, false] {
        // Every way to store with one tile, every tile with one way to store.
        let wide = Wgmma { groups: 3, tokens: 128, cluster: 2, resident: 0 };
        any.extend(epilogues.iter().map(|e| with(Form::Mma { tokens: 64 }, sparse, e)));
        hopper.extend(epilogues.iter().map(|e| with(Form::Wgmma(wide), sparse, e)));
        any.extend([16, 128].map(|tokens| with(Form::Mma { tokens }, sparse, &epilogues[1])));
        let tiles = GROUPS_BY_TOKENS.into_iter().flat_map(|(groups, tokens)| {
            [0, 768, 1024].map(|resident| Wgmma { groups, tokens, cluster: 1, resident })
        });
        let tiles = tiles.filter(|k| k.fits(sparse));
        hopper.extend(tiles.map(|k| with(Form::Wgmma(k), sparse, &epilogues[3])));
    }
    (any, hopper)
}
