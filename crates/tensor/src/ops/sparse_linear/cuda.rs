//! Which kernels there are and how they are started.

use std::fmt;

use super::normed::NORMED;
use super::pack::{COLS, block_bytes};
use super::{Epilogue, Shape, Store, Weight};
use crate::cuda::{Arg, Gpu, Grid, Source, TensorMap, Variant, fnv};
use crate::ops::{activation, norm_codes};
use crate::{DType, Tensor};

static MMA: Source = Source {
    name: "sparse_linear_mma",
    text: concat!(include_str!("epilogue.cuh"), "\n#line 1 \"mma.cu\"\n", include_str!("mma.cu")),
};

static WGMMA: Source = Source {
    name: "sparse_linear_wgmma",
    text: concat!(
        include_str!("epilogue.cuh"),
        include_str!("../tma.cuh"),
        include_str!("hopper.cuh"),
        "\n#line 1 \"wgmma.cu\"\n",
        include_str!("wgmma.cu")
    ),
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
    /// Blocks that share a tile's inputs.
    split: usize,
    /// Whether the weight stays in registers: the inputs that a block multiplies, or 0.
    resident: usize,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let k = match self.0 {
            Form::Mma { tokens } => return f.pad(&format!("mma 64x{tokens}")),
            Form::Wgmma(k) => k,
        };
        let mut name = format!("wgmma {}x{}", k.groups * 64, k.tokens);
        if k.cluster > 1 {
            name += &format!(" cluster {}", k.cluster);
        }
        if k.split > 1 {
            name += &format!(" split {}", k.split);
        }
        name += if k.resident > 0 { " resident" } else { " streamed" };
        f.pad(&name)
    }
}

/// Where a wide tile's weight is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Registers,
    /// Read for each tile, by blocks of which so many share their tokens.
    Streamed(usize),
}

/// Tiles for many tokens: warpgroups, tokens, and where the weight is. Those that were fastest somewhere come first
/// (README), because who times kernels may stop after a few.
const WIDE: [(usize, usize, Held); 8] = [
    (3, 128, Held::Registers),
    (3, 96, Held::Registers),
    (3, 192, Held::Streamed(1)),
    (2, 192, Held::Registers),
    (2, 256, Held::Streamed(2)),
    (2, 128, Held::Registers),
    (3, 128, Held::Streamed(1)),
    (2, 192, Held::Streamed(2)),
];

/// Tokens of a tile of one warpgroup, for few tokens.
const NARROW: [usize; 4] = [128, 64, 32, 16];

/// Stages of mma's activations.
const MMA_STAGES: usize = 3;

/// Bytes of shared memory that the alignment of stages may cost.
pub(super) const ALIGNMENT: usize = 1 << 10;

/// Bytes of shared memory that a block's barriers and the driver take.
pub(super) const RESERVED: usize = 2 << 10;

/// Bytes of an output that passes through shared memory, the most of any way to store.
const MOST_STORED: usize = 2;

/// What decides which kernels a GPU can run and how many blocks fill it.
#[derive(Clone, Copy)]
pub(super) struct Chip {
    pub(super) hopper: bool,
    /// Bytes of shared memory that a block may have.
    pub(super) shared: usize,
    pub(super) multiprocessors: usize,
}

impl Chip {
    pub(super) fn of(gpu: Gpu) -> Chip {
        Chip { hopper: gpu.hopper(), shared: gpu.shared_memory(), multiprocessors: gpu.multiprocessors() }
    }
}

impl Kernel {
    fn takes(self, chip: Chip, w: Shape) -> bool {
        match self.0 {
            Form::Mma { .. } => true,
            Form::Wgmma(k) => {
                let parts = w.cols.div_ceil(COLS);
                let resident = k.resident * k.split == w.cols && k.resident.is_multiple_of(COLS)
                    || k.resident == w.cols && k.split == 1
                    || k.resident == 0 && k.split <= parts;
                let stages = k.stages(chip.shared, w.sparse, MOST_STORED);
                // In turn, the last group begins a tile when the first has been through it.
                let needed = if k.turns() { parts } else { 2 };
                chip.hopper && w.cols.is_multiple_of(16) && resident && k.fits(w.sparse) && stages >= needed
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

    /// Whether warpgroups multiply in turn, so that one stores while the others multiply.
    fn turns(self) -> bool {
        self.groups > 1 && self.resident > 0
    }

    /// Stages whose products may run at a time.
    fn depth(self) -> usize {
        if self.resident > 0 { 3 } else { 1 }
    }

    /// Registers of a thread: accumulators (twice where they are gathered), the weight, and what else there is.
    fn registers(self, sparse: bool) -> usize {
        let step = if sparse { 64 } else { 32 };
        let inputs = if self.resident > 0 { self.resident } else { (self.depth() + 1) * COLS };
        let weight = inputs.div_ceil(step) * (4 + usize::from(sparse));
        self.tokens / 2 + weight + 32
    }

    /// Whether a thread has so many.
    fn fits(self, sparse: bool) -> bool {
        let step = if sparse { 64 } else { 32 };
        let most = [240, 240, 160][self.groups - 1];
        self.resident.is_multiple_of(step) && self.registers(sparse) <= most
    }

    /// Blocks that a multiprocessor holds.
    fn per_sm(self, sparse: bool) -> usize {
        if self.groups == 1 && self.registers(sparse) <= 128 { 2 } else { 1 }
    }

    /// Tokens that a group stores at a time.
    fn at_once(self) -> usize {
        match self.tokens / self.split {
            done if done.is_multiple_of(64) => 64,
            done if done.is_multiple_of(48) => 48,
            done => done.min(32),
        }
    }

    /// Bytes for finished tiles on their way out, two for each group, with so many bytes an output, and for sums from
    /// other blocks.
    fn staging(self, stored: usize) -> usize {
        let gathered = if self.split > 1 { self.groups * 64 * self.tokens * 4 } else { 0 };
        self.groups * 2 * 64 * self.at_once() * stored + gathered
    }

    /// Stages that fit beside it.
    fn stages(self, shared: usize, sparse: bool, stored: usize) -> usize {
        let shared = shared / self.per_sm(sparse);
        (shared.saturating_sub(RESERVED + ALIGNMENT + self.staging(stored)) / self.stage(sparse)).min(24)
    }

    fn tiles(self, rows: usize, tokens: usize) -> usize {
        rows.div_ceil(self.cluster * self.groups * 64) * tokens.div_ceil(self.tokens)
    }
}

pub(super) fn kernels(w: &Weight, tokens: usize) -> Vec<Kernel> {
    candidates(Chip::of(w.gpu()), w.shape, tokens)
}

fn candidates(chip: Chip, w: Shape, tokens: usize) -> Vec<Kernel> {
    let slots = chip.multiprocessors;
    // A tile of twice the tokens does nothing for half of them.
    let suits = |tile: usize| tile == 16 || tile < tokens * 2;
    let wide = WIDE.into_iter().filter(|t| suits(t.1)).map(|(groups, tokens, held)| {
        let (resident, cluster) = match held {
            Held::Registers => (w.cols, 1),
            Held::Streamed(cluster) => (0, if w.rows > groups * 64 { cluster } else { 1 }),
        };
        Wgmma { groups, tokens, cluster, split: 1, resident }
    });
    let wide: Vec<Wgmma> = wide.collect();
    let mut few = Vec::new();
    for tile in NARROW.into_iter().filter(|&t| suits(t)) {
        for split in [1, 2, 4, 8] {
            for resident in [0, w.cols / split] {
                let k = Wgmma { groups: 1, tokens: tile, cluster: 1, split, resident };
                let blocks = k.tiles(w.rows, tokens) * split;
                let enough = blocks > slots / 3 || tile == 16;
                let too_many = blocks > 2 * slots && !(split == 1 && tile >= tokens);
                if tile / split >= 16 && enough && !too_many {
                    few.push(k);
                }
            }
        }
    }
    // The fastest are those with about a block for each multiprocessor. Sharing out inputs costs an exchange of sums,
    // which many inputs make up for.
    let cost = |k: &Wgmma| {
        let blocks = (k.tiles(w.rows, tokens) * k.split) as f64;
        let exchange = if w.cols > 1024 { 0.25 } else { 1.0 };
        (blocks / (0.8 * slots as f64)).log2().abs() + exchange * (k.split as f64).log2()
    };
    few.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
    // Tiles that leave most of the GPU idle come last.
    let idle = wide.first().is_none_or(|k| k.tiles(w.rows, tokens) < slots / 2);
    let (first, then) = if idle { (few, wide) } else { (wide, few) };
    let all = first.into_iter().chain(then).map(|k| Kernel(Form::Wgmma(k)));
    let found: Vec<Kernel> = all.filter(|k| k.takes(chip, w)).collect();
    if found.is_empty() { mma(tokens) } else { found }
}

/// Kernels for any GPU and any shape.
pub(super) fn mma(tokens: usize) -> Vec<Kernel> {
    let suits = NARROW.into_iter().filter(|&n| n == 16 || n < tokens * 2);
    suits.map(|tokens| Kernel(Form::Mma { tokens })).collect()
}

/// Whether each row of the output begins at a multiple of 16 bytes, as copies of so many and the copy engine need.
fn aligned(e: &Epilogue) -> bool {
    (e.scale.len() * e.store.dtype().size()).is_multiple_of(16)
}

/// Bytes of an output that passes through shared memory: sums do not.
fn stored(e: &Epilogue) -> usize {
    match e.store {
        Store::Accumulators => 0,
        Store::Half | Store::Codes { .. } | Store::Table { .. } => e.store.dtype().size(),
    }
}

/// The constants that all sources are compiled with.
pub(super) fn options(
    sparse: bool,
    tokens: usize,
    stages: usize,
    split: usize,
    resident: bool,
    e: &Epilogue,
) -> Vec<(&'static str, usize)> {
    let (store, act) = match &e.store {
        Store::Accumulators => (0, 0),
        Store::Half => (1, 0),
        Store::Codes { activation, .. } => (2, activation::number(*activation)),
        // After the functions, in epilogue.cuh.
        Store::Table { .. } => (2, 6),
    };
    vec![
        ("ALIGNED", aligned(e).into()),
        ("SPARSE", sparse.into()),
        ("BN", tokens),
        ("STAGES", stages),
        ("SPLIT", split),
        ("RESIDENT", resident.into()),
        ("STORE", store),
        ("ACT", act),
        ("BIAS", e.bias.is_some().into()),
        ("PAIR", e.output_step.is_some().into()),
        ("BOUNDED", matches!(e.store, Store::Table { bounded: true, .. }).into()),
    ]
}

/// What a kernel is compiled from, and its dynamic shared memory.
fn variant(kernel: Kernel, sparse: bool, shared: usize, e: &Epilogue) -> (Variant, usize) {
    match kernel.0 {
        Form::Mma { tokens } => {
            // Finished tiles go out through the same bytes, which are more.
            let bytes = MMA_STAGES * tokens * (COLS + 16);
            (MMA.with(DType::F32, &options(sparse, tokens, MMA_STAGES, 1, false, e)), bytes)
        }
        Form::Wgmma(k) => {
            let stages = k.stages(shared, sparse, stored(e));
            let mut constants = options(sparse, k.tokens, stages, k.split, k.resident > 0, e);
            constants.extend([
                ("WGS", k.groups),
                ("CLUSTER", k.cluster),
                ("COLS", k.resident.max(COLS)),
                ("ORDERED", k.turns().into()),
                ("DEPTH", k.depth()),
                ("PER_SM", k.per_sm(sparse)),
            ]);
            (WGMMA.with(DType::F32, &constants), ALIGNMENT + stages * k.stage(sparse) + k.staging(stored(e)))
        }
    }
}

pub(super) fn prepare(all: &[(Kernel, &Weight, &Epilogue)]) {
    let Some((_, w, _)) = all.first() else { return };
    let gpu = w.gpu();
    let shared = gpu.shared_memory();
    let variants: Vec<Variant> =
        all.iter().map(|(k, w, e)| variant(*k, w.shape.sparse, shared, e).0).collect();
    gpu.prepare(&variants);
}

pub(super) fn version() -> u64 {
    fnv([MMA.text, WGMMA.text, NORMED.text, norm_codes::SOURCE.text].concat().as_bytes())
}

pub(super) fn launch(kernel: &Kernel, x: &Tensor, w: &Weight, e: &Epilogue, out: &mut Tensor) {
    let (gpu, shape) = (w.gpu(), w.shape);
    let chip = Chip::of(gpu);
    assert!(kernel.takes(chip, shape), "{kernel} for {w:?}");
    let tokens = x.rows();
    if tokens == 0 {
        return;
    }
    let (variant, shared) = variant(*kernel, shape.sparse, chip.shared, e);
    let optional = |t: Option<&Tensor>| t.map_or(Arg::Pointer(0), |t| t.memory().into());
    let (name, first, blocks, threads): (_, Vec<Arg>, _, _) = match kernel.0 {
        Form::Mma { tokens: tile } => {
            let blocks = shape.rows.div_ceil(64) * tokens.div_ceil(tile);
            ("multiply_tiles", vec![x.memory().into()], blocks, 128)
        }
        Form::Wgmma(k) => {
            // A block takes tile after tile, but each that shares inputs one: the sums of the next would meet those of
            // this. A resident weight needs a block for each of its rows.
            let tiles = k.tiles(shape.rows, tokens);
            let slots = chip.multiprocessors * k.per_sm(shape.sparse) / k.cluster;
            let clusters = if k.split > 1 { tiles } else { tiles.min(slots.max(k.tiles(shape.rows, 1))) };
            let from = TensorMap::boxes(x.memory(), tokens, shape.cols, (k.tokens / k.cluster, COLS));
            let to = match e.store {
                Store::Half | Store::Codes { .. } | Store::Table { .. } if aligned(e) => {
                    let size = e.store.dtype().size();
                    TensorMap::boxes(out.memory(), tokens, shape.rows * size, (k.at_once(), 64 * size))
                }
                // Not used.
                _ => from,
            };
            // The GPU has failed with them, and nothing is started.
            let (Some(from), Some(to)) = (from, to) else { return };
            let blocks = clusters * k.cluster * k.split;
            ("sparse_linear", vec![from.into(), to.into()], blocks, (k.groups + 1) * 128)
        }
    };
    let rest = [
        w.packed.memory().into(),
        e.scale.memory().into(),
        optional(e.bias.as_ref()),
        optional(e.output_step.as_ref()),
        optional(e.store.parameters()),
        out.memory_mut().into(),
        (tokens as i32).into(),
        (shape.rows as i32).into(),
        (shape.cols as i32).into(),
    ];
    let arguments: Vec<Arg> = first.into_iter().chain(rest).collect();
    let grid = Grid { blocks: [blocks as u32, 1, 1], threads: threads as u32, shared: shared as u32 };
    gpu.launch_early(variant, name, grid, &arguments);
}

/// Every kernel with epilogues that between them have every branch, for the test that compiles all sources: those for
/// any GPU, and those for Hopper.
#[cfg(test)]
pub(crate) fn variants() -> (Vec<Variant>, Vec<Variant>) {
    let ones = Tensor::full(&[1], 1.0);
    let epilogue = |store, full: bool| Epilogue {
        scale: if full { Tensor::full(&[16], 1.0) } else { ones.clone() },
        bias: full.then(|| ones.clone()),
        output_step: full.then(|| ones.clone()),
        store,
    };
    let codes = |activation| Store::Codes { activation, step: ones.clone() };
    let epilogues = [
        epilogue(Store::Accumulators, false),
        epilogue(Store::Half, true),
        epilogue(codes(None), true),
        epilogue(Store::Table { codes: ones.clone(), bounded: true }, true),
        epilogue(codes(Some(activation::Activation::Gelu)), true),
        epilogue(codes(Some(activation::Activation::Silu)), false),
    ];
    let with = |kernel: Form, sparse: bool, e: &Epilogue| variant(Kernel(kernel), sparse, 227 << 10, e).0;
    let (mut any, mut hopper) = (Vec::new(), Vec::new());
    for sparse in [true, false] {
        // Every way to store with one tile, every tile with one way to store.
        let wide = Wgmma { groups: 3, tokens: 128, cluster: 1, split: 1, resident: 0 };
        any.extend(epilogues.iter().map(|e| with(Form::Mma { tokens: 64 }, sparse, e)));
        hopper.extend(epilogues.iter().map(|e| with(Form::Wgmma(wide), sparse, e)));
        any.extend([16, 128].map(|tokens| with(Form::Mma { tokens }, sparse, &epilogues[1])));
        let wide = WIDE.into_iter().flat_map(|(groups, tokens, held)| {
            let (held, cluster) = match held {
                Held::Registers => ([768, 1024], 1),
                Held::Streamed(cluster) => ([0, 0], cluster),
            };
            held.map(|resident| Wgmma { groups, tokens, cluster, split: 1, resident })
        });
        let narrow = NARROW.into_iter().flat_map(|tokens| {
            [0, 768].map(|resident| Wgmma { groups: 1, tokens, cluster: 1, split: tokens / 16, resident })
        });
        let tiles = wide.chain(narrow).filter(|k| k.fits(sparse));
        hopper.extend(tiles.map(|k| with(Form::Wgmma(k), sparse, &epilogues[3])));
    }
    hopper.extend(super::normed::variants());
    (any, hopper)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOPPER: Chip = Chip { hopper: true, shared: 227 << 10, multiprocessors: 132 };
    const AMPERE: Chip = Chip { hopper: false, shared: 163 << 10, multiprocessors: 108 };

    /// Layers of models, and what no tile divides.
    const SHAPES: [(usize, usize); 10] = [
        (2304, 768),
        (768, 768),
        (3072, 768),
        (768, 3072),
        (4096, 1024),
        (1536, 384),
        (384, 1536),
        (30522, 768),
        (2, 768),
        (333, 1000),
    ];

    #[test]
    fn every_shape_has_kernels_that_differ_and_fit() {
        for (rows, cols) in SHAPES {
            for tokens in [1, 16, 128, 384, 12_288] {
                for sparse in [true, false] {
                    let w = Shape { rows, cols, sparse };
                    let found = candidates(HOPPER, w, tokens);
                    let names: std::collections::HashSet<String> =
                        found.iter().map(|k| k.to_string()).collect();
                    assert_eq!(names.len(), found.len(), "{rows}x{cols} of {tokens}: {found:?}");
                    for kernel in &found {
                        let Form::Wgmma(k) = kernel.0 else { continue };
                        for stored in 0..=MOST_STORED {
                            let stages = k.stages(HOPPER.shared, sparse, stored);
                            let bytes = ALIGNMENT + stages * k.stage(sparse) + k.staging(stored);
                            assert!(
                                (bytes + RESERVED) * k.per_sm(sparse) <= HOPPER.shared,
                                "{kernel}: {bytes}"
                            );
                        }
                        assert!(k.tokens / k.split >= 16, "{kernel}");
                    }
                    // Where rows can be read by the copy engine, its kernels are the first choice.
                    assert_eq!(matches!(found[0].0, Form::Wgmma(_)), cols.is_multiple_of(16));
                    let old = candidates(AMPERE, w, tokens);
                    assert!(!old.is_empty() && old.iter().all(|k| matches!(k.0, Form::Mma { .. })));
                }
            }
        }
    }

    /// What was fastest on an H100 (README) is among the first that are offered.
    #[test]
    fn kernels_that_were_fastest_are_offered_first() {
        for (rows, cols, tokens, name) in [
            (2304, 768, 12_288, "wgmma 192x128 resident"),
            (3072, 768, 12_288, "wgmma 192x128 resident"),
            (768, 768, 12_288, "wgmma 192x128 resident"),
            (768, 3072, 12_288, "wgmma 192x192 streamed"),
            (3072, 1024, 12_288, "wgmma 192x96 resident"),
            (4096, 1024, 12_288, "wgmma 192x96 resident"),
            (1024, 4096, 12_288, "wgmma 128x256 cluster 2 streamed"),
            (2304, 768, 384, "wgmma 64x128 streamed"),
            (768, 768, 384, "wgmma 64x64 streamed"),
            (3072, 768, 384, "wgmma 64x128 streamed"),
            (768, 3072, 384, "wgmma 64x64 streamed"),
            (2304, 768, 128, "wgmma 64x64 streamed"),
            (768, 768, 128, "wgmma 64x16 resident"),
            (3072, 768, 128, "wgmma 64x64 streamed"),
            (768, 3072, 128, "wgmma 64x32 split 2 resident"),
        ] {
            let found = candidates(HOPPER, Shape { rows, cols, sparse: true }, tokens);
            let names: Vec<String> = found.iter().map(|k| k.to_string()).collect();
            let at = names.iter().position(|n| n == name);
            assert!(at.is_some_and(|at| at < 6), "{rows}x{cols}, {tokens} tokens: {name} in {names:?}");
        }
    }

    #[test]
    fn few_tokens_get_enough_blocks() {
        for (rows, cols) in [(2304, 768), (768, 768), (3072, 768), (768, 3072)] {
            let first = candidates(HOPPER, Shape { rows, cols, sparse: true }, 384)[0];
            let Form::Wgmma(k) = first.0 else { panic!("{first}") };
            let blocks = k.tiles(rows, 384) * k.split * k.cluster;
            assert!((60..=264).contains(&blocks), "{rows}x{cols}: {first} has {blocks} blocks");
        }
    }
}
