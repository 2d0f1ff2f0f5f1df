use super::{Attention, Out, Qkv};
use crate::cuda::{Arg, Gpu, Grid, Source, Variant};
use crate::ops::attention::{rounding, score_unit};
use crate::{DType, Segments};

static PLAIN: Source =
    Source { name: "varlen_attention_plain", text: concat!(rounding::text!(), include_str!("plain.cu")) };
static MMA: Source = Source {
    name: "varlen_attention_mma",
    text: concat!(rounding::text!(), include_str!("common.cuh"), include_str!("mma.cu")),
};

static WGMMA: Source = Source {
    name: "varlen_attention_wgmma",
    text: concat!(rounding::text!(), include_str!("common.cuh"), include_str!("wgmma.cu")),
};

/// Keys of a tile.
const KEYS: usize = rounding::TILE;

/// Widths of a head, and largest group of a pattern, that there are kernels on tensor cores for.
const WIDTHS: [usize; 3] = [32, 64, 128];
const LARGEST_GROUP: usize = 16;

/// Which kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kernel {
    /// Any width up to 1,024, and any pattern.
    Plain,
    /// `mma.sync`: 64 queries a block.
    Mma,
    /// `wgmma`, on Hopper.
    Wgmma(Warpgroups),
}

/// Warpgroups of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Warpgroups {
    /// Each has 64 queries.
    queries: usize,
    /// So many share out the keys of the same queries.
    split: usize,
}

/// Those there are kernels for, from many blocks to few.
const WARPGROUPS: [Warpgroups; 3] = [
    Warpgroups { queries: 2, split: 1 },
    Warpgroups { queries: 1, split: 1 },
    Warpgroups { queries: 1, split: 3 },
];

impl Warpgroups {
    /// Bytes of shared memory: four tiles of keys and of values for each share of the keys, swizzled from a multiple of
    /// 1,024 on, and sixteen rows of ones.
    fn shared(self, width: usize, of_codes: bool) -> usize {
        let bytes = if of_codes { width } else { 2 * width };
        1024 + self.split * 4 * KEYS * (bytes + 2 * width) + 16 * (2 * width).min(128)
    }
}

/// Those that take heads of this width under this pattern, the best for large batches first.
pub(super) fn kernels(gpu: Gpu, width: usize, pattern: Option<(usize, usize)>) -> Vec<Kernel> {
    let mut all = Vec::new();
    if WIDTHS.contains(&width) && pattern.is_none_or(|(_, of)| of <= LARGEST_GROUP) {
        if gpu.hopper() {
            let fit = WARPGROUPS.into_iter().filter(|w| w.shared(width, false) <= gpu.shared_memory());
            all.extend(fit.map(Kernel::Wgmma));
        }
        all.push(Kernel::Mma);
    }
    all.push(Kernel::Plain);
    all
}

fn variant(
    kernel: Kernel,
    width: usize,
    pattern: Option<(usize, usize)>,
    of_codes: bool,
    to_codes: bool,
) -> Variant {
    let (keep, of) = pattern.unwrap_or((0, 0));
    let codes = [("CODES_IN", of_codes as usize), ("CODES_OUT", to_codes as usize)];
    let fixed = [("D", width), ("KEEP", keep), ("OF", of), codes[0], codes[1]];
    match kernel {
        Kernel::Plain => PLAIN.with(DType::F32, &codes),
        Kernel::Mma => MMA.with(DType::F32, &fixed),
        Kernel::Wgmma(w) => {
            let groups = [("WARPGROUPS", w.queries), ("SPLIT", w.split)];
            WGMMA.with(DType::F32, &[&fixed[..], &groups].concat())
        }
    }
}

/// For the test that compiles every kernel, for any GPU and for Hopper: every width, each way to choose keys, each type
/// of input and output.
#[cfg(test)]
pub(crate) fn variants() -> (Vec<Variant>, Vec<Variant>) {
    let of = |kernel: Kernel| {
        let mut all: Vec<Variant> = Vec::new();
        for (of_codes, to_codes) in [(false, false), (true, true), (false, true), (true, false)] {
            all.push(variant(kernel, 64, None, of_codes, to_codes));
        }
        if kernel == Kernel::Plain {
            return all;
        }
        for pattern in [(2, 4), (3, 4), (1, 8), (2, 16)] {
            all.push(variant(kernel, 64, Some(pattern), pattern.0 == 1, false));
        }
        for width in [32, 128] {
            all.push(variant(kernel, width, None, false, true));
            all.push(variant(kernel, width, Some((2, 4)), true, false));
        }
        all
    };
    ([of(Kernel::Plain), of(Kernel::Mma)].concat(), WARPGROUPS.map(|n| of(Kernel::Wgmma(n))).concat())
}

pub(super) fn attention(gpu: Gpu, qkv: Qkv, segments: &Segments, how: Attention, out: Out) {
    let (Qkv::Half(x) | Qkv::Codes(x, _)) = qkv;
    let able = kernels(gpu, x.width() / 3 / how.heads, how.pattern);
    // Where the blocks would be fewer than the multiprocessors, smaller ones do better.
    let fills = |k: &&Kernel| match k {
        Kernel::Wgmma(w) => {
            w.split > 1 || segments.tiles(64 * w.queries).1 * how.heads >= gpu.multiprocessors()
        }
        Kernel::Mma | Kernel::Plain => true,
    };
    attention_by(gpu, *able.iter().find(fills).expect("the plain kernel takes all"), qkv, segments, how, out);
}

/// By a kernel of [`kernels`].
pub(super) fn attention_by(
    gpu: Gpu,
    kernel: Kernel,
    qkv: Qkv,
    segments: &Segments,
    how: Attention,
    out: Out,
) {
    let (x, steps) = match qkv {
        Qkv::Half(x) => (x, None),
        Qkv::Codes(x, steps) => (x, Some(steps)),
    };
    let (out, step) = match out {
        Out::Half(y) => (y, None),
        Out::Codes(c) => (c.to, Some(c.step)),
    };
    let width = x.width() / 3 / how.heads;
    let [q, k, v] = steps.unwrap_or([1.0; 3]);
    let unit = score_unit(how.scale, q, k);
    let queries = match kernel {
        Kernel::Plain | Kernel::Mma => 64,
        Kernel::Wgmma(w) => 64 * w.queries,
    };
    let (at, tiles) = segments.tiles(queries);
    let mut arguments: Vec<Arg> = vec![
        out.memory().into(),
        x.memory().into(),
        Arg::Pointer(segments.table().memory().address() + 4 * at as u64),
        (how.heads as i32).into(),
        unit.into(),
        v.into(),
        step.unwrap_or(1.0).into(),
    ];
    let bytes = if steps.is_some() { width } else { 2 * width };
    let (threads, shared) = match kernel {
        Kernel::Plain => {
            let (keep, of) = how.pattern.unwrap_or((0, 0));
            arguments.extend([width, keep, of].map(|n| Arg::from(n as i32)));
            (128, 0)
        }
        Kernel::Wgmma(w) => (128 * (w.queries * w.split) as u32, w.shared(width, steps.is_some())),
        Kernel::Mma => (128, 3 * KEYS * (bytes + 16) + 2 * KEYS * (2 * width + 16)),
    };
    let grid = Grid { blocks: [tiles as u32, how.heads as u32, 1], threads, shared: shared as u32 };
    gpu.launch_early(
        variant(kernel, width, how.pattern, steps.is_some(), step.is_some()),
        "forward",
        grid,
        &arguments,
    );
}
