use super::{Attention, Out, Qkv};
use crate::cuda::{Arg, Gpu, Grid, Source, Variant};
use crate::{DType, Segments};

static PLAIN: Source = Source { name: "varlen_attention_plain", text: include_str!("plain.cu") };
static MMA: Source = Source {
    name: "varlen_attention_mma",
    text: concat!(include_str!("common.cuh"), include_str!("mma.cu")),
};

/// Keys of a tile.
const KEYS: usize = 64;

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
}

/// Those that take heads of this width under this pattern, the best first.
pub(super) fn kernels(_gpu: Gpu, width: usize, pattern: Option<(usize, usize)>) -> Vec<Kernel> {
    if WIDTHS.contains(&width) && pattern.is_none_or(|(_, of)| of <= LARGEST_GROUP) {
        vec![Kernel::Mma, Kernel::Plain]
    } else {
        vec![Kernel::Plain]
    }
}

fn variant(
    source: &'static Source,
    width: usize,
    pattern: Option<(usize, usize)>,
    of_codes: bool,
    to_codes: bool,
) -> Variant {
    let codes = [("CODES_IN", of_codes as usize), ("CODES_OUT", to_codes as usize)];
    if source == &PLAIN {
        return source.with(DType::F32, &codes);
    }
    let (keep, of) = pattern.unwrap_or((0, 0));
    source.with(DType::F32, &[("D", width), ("KEEP", keep), ("OF", of), codes[0], codes[1]])
}

/// For the test that compiles every kernel: every width, each way to choose keys, each type of input and output.
#[cfg(test)]
pub(crate) fn variants() -> Vec<Variant> {
    let mut all: Vec<Variant> = Vec::new();
    for (of_codes, to_codes) in [(false, false), (true, true), (false, true), (true, false)] {
        all.push(variant(&PLAIN, 0, None, of_codes, to_codes));
        all.push(variant(&MMA, 64, None, of_codes, to_codes));
    }
    for pattern in [(2, 4), (3, 4), (1, 8), (2, 16)] {
        all.push(variant(&MMA, 64, Some(pattern), pattern.0 == 1, false));
    }
    for width in [32, 128] {
        all.push(variant(&MMA, width, None, false, true));
        all.push(variant(&MMA, width, Some((2, 4)), true, false));
    }
    all
}

pub(super) fn attention(gpu: Gpu, qkv: Qkv, segments: &Segments, how: Attention, out: Out) {
    let (Qkv::Half(x) | Qkv::Codes(x, _)) = qkv;
    let width = x.width() / 3 / how.heads;
    attention_by(gpu, kernels(gpu, width, how.pattern)[0], qkv, segments, how, out);
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
    // Weights are powers of 2.
    let unit = (how.scale as f64 * q as f64 * k as f64 * std::f64::consts::LOG2_E) as f32;
    let (source, queries) = match kernel {
        Kernel::Plain => (&PLAIN, 64),
        Kernel::Mma => (&MMA, 64),
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
        Kernel::Mma => (128, 3 * KEYS * (bytes + 16) + 2 * KEYS * (2 * width + 16)),
    };
    let grid = Grid { blocks: [tiles as u32, how.heads as u32, 1], threads, shared: shared as u32 };
    gpu.launch_early(
        variant(source, width, how.pattern, steps.is_some(), step.is_some()),
        "forward",
        grid,
        &arguments,
    );
}
