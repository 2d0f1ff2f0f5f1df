//! Attention on tensor cores (`flash.cu`), for bf16 and the shapes that models have.

use super::Attention;
use crate::cuda::{Arg, Gpu, Grid, Source, Variant};
use crate::ops::dropout::Drop;
use crate::{DType, Device, Tensor};

static SOURCE: Source = Source { name: "attention_flash", text: include_str!("flash.cu") };

/// Rows of a tile, and of queries or keys that a block owns.
const TILE: usize = 64;

/// Widths of a head, and groups of a pattern (0 for none), that there are kernels for.
const WIDTHS: [usize; 3] = [32, 64, 128];
const GROUPS: [usize; 4] = [0, 4, 8, 16];

/// Whether there are kernels for this attention of `q` with heads of `width`.
pub(super) fn takes(q: &Tensor, width: usize, s: &Attention) -> bool {
    let most = i32::MAX as usize / 2;
    // What the keys' gradient takes, with the 1 KiB that it declares, the most of all.
    let shared = grid(0, 0, 6, width).shared as usize + 1024;
    q.dtype() == DType::Bf16
        && WIDTHS.contains(&width)
        && matches!(q.device(), Device::Cuda(gpu) if shared <= gpu.shared_memory())
        && GROUPS.contains(&s.pattern.map_or(0, |(_, of)| of))
        && s.queries < most
        && s.keys < most
        && s.batch * s.heads <= u16::MAX as usize
}

/// Queries, keys and values, or their gradients: where the first element of each is, and the elements from row to row
/// of queries, and of keys and values.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    q: Arg,
    k: Arg,
    v: Arg,
    strides: [usize; 2],
    /// Of a head.
    width: usize,
}

impl Operands {
    pub(super) fn apart(q: &Tensor, k: &Tensor, v: &Tensor, s: &Attention) -> Self {
        let [q_at, k_at, v_at] = [q, k, v].map(|t| t.memory().into());
        Operands { q: q_at, k: k_at, v: v_at, strides: [q.width(), k.width()], width: q.width() / s.heads }
    }

    /// Side by side in the rows of one tensor.
    pub(super) fn joint(qkv: &Tensor, s: &Attention) -> Self {
        let width = qkv.width() / (s.heads + 2 * s.kv_heads);
        let bytes = |heads: usize| (heads * width * qkv.dtype().size()) as u64;
        let at = |heads| match qkv.memory().address() {
            // Nothing was allocated, because the GPU has failed, and nothing will be launched.
            0 => Arg::Pointer(0),
            first => Arg::Pointer(first + bytes(heads)),
        };
        let (q, k, v) = (at(0), at(s.heads), at(s.heads + s.kv_heads));
        Operands { q, k, v, strides: [qkv.width(); 2], width }
    }
}

/// Every variant that [`takes`] lets through.
#[cfg(test)]
pub(crate) fn variants() -> Vec<Variant> {
    let of = |width| GROUPS.map(|group| variant(width, group));
    WIDTHS.into_iter().flat_map(of).collect()
}

/// Those for heads of `width` and this pattern, if there are some.
pub(crate) fn kernels(element: DType, width: usize, pattern: Option<(usize, usize)>) -> Option<Variant> {
    let group = pattern.map_or(0, |(_, of)| of);
    let fits = element == DType::Bf16 && WIDTHS.contains(&width) && GROUPS.contains(&group);
    fits.then(|| variant(width, group))
}

fn variant(width: usize, group: usize) -> Variant {
    SOURCE.with(DType::Bf16, &[("D", width), ("OF", group)])
}

/// What kernels take last, and the variant to take them from.
fn options(s: &Attention, operands: &Operands, drop: Option<Drop>) -> (Variant, [Arg; 12]) {
    let (keep, of) = s.pattern.unwrap_or((0, 0));
    let d = drop.unwrap_or(Drop { key: 0, below: 0, factor: 1.0 });
    let arguments = [
        (s.queries as i32).into(),
        (s.keys as i32).into(),
        (s.heads as i32).into(),
        (s.kv_heads as i32).into(),
        (operands.strides[0] as i32).into(),
        (operands.strides[1] as i32).into(),
        s.scale.into(),
        i32::from(s.causal).into(),
        (keep as i32).into(),
        d.key.into(),
        d.below.into(),
        d.factor.into(),
    ];
    (variant(operands.width, of), arguments)
}

/// A block of four warps for each 64 of `rows` and each of `heads`, with `tiles` tiles of shared memory.
fn grid(rows: usize, heads: usize, tiles: usize, width: usize) -> Grid {
    let shared = tiles * TILE * (width + 8) * DType::Bf16.size();
    Grid { blocks: [rows.div_ceil(TILE) as u32, heads as u32, 1], threads: 128, shared: shared as u32 }
}

/// What the backward pass needs beside operands and output.
pub(super) struct Kept {
    /// Logarithm (base 2) of each softmax's sum, f32 `[batch, heads, queries]`.
    log_sums: Tensor,
    /// A bit for each weight that the pattern keeps, as `flash.cu` says.
    survivors: Option<Tensor>,
}

/// The output and, if `keep`, what [`backward`] needs.
pub(super) fn forward(
    gpu: Gpu,
    of: Operands,
    s: &Attention,
    drop: Option<Drop>,
    keep: bool,
) -> (Tensor, Option<Kept>) {
    let out = Tensor::stale_of(gpu, DType::Bf16, &[s.batch * s.queries, s.heads * of.width]);
    let shape = [s.batch, s.heads, s.queries];
    let words = [s.batch * s.heads, s.queries.div_ceil(TILE), s.keys.div_ceil(TILE), 128];
    let kept = keep.then(|| Kept {
        log_sums: Tensor::stale_on(Device::Cuda(gpu), &shape),
        survivors: s.pattern.map(|_| Tensor::stale_of(gpu, DType::I32, &words)),
    });
    let at = |t: Option<&Tensor>| t.map_or(Arg::Pointer(0), |t| t.memory().into());
    let mask = s.key_mask.as_ref().map(|m| m.on(gpu));
    let (variant, options) = options(s, &of, drop);
    let mut arguments = vec![
        out.memory().into(),
        at(kept.as_ref().map(|k| &k.log_sums)),
        at(kept.as_ref().and_then(|k| k.survivors.as_ref())),
        of.q,
        of.k,
        of.v,
        mask.as_deref().map_or(Arg::Pointer(0), Arg::from),
    ];
    arguments.extend(options);
    gpu.launch(variant, "forward", grid(s.queries, s.batch * s.heads, 5, of.width), &arguments);
    (out, kept)
}

/// Writes the gradients of queries, keys and values to the second of `operands`, which lie as the first do. The scores
/// are computed again, twice: once for the queries' sums and once for the keys', so that every sum has one order.
pub(super) fn backward(
    gpu: Gpu,
    grad: &Tensor,
    [of, gradients]: [Operands; 2],
    Kept { log_sums, survivors }: &Kept,
    out: &Tensor,
    s: &Attention,
    drop: Option<Drop>,
) {
    let along = Tensor::stale_on(Device::Cuda(gpu), log_sums.shape());
    let mask = s.key_mask.as_ref().map(|m| m.on(gpu));
    let (variant, options) = options(s, &of, drop);
    let rows = log_sums.len();
    let arguments = [
        along.memory().into(),
        grad.memory().into(),
        out.memory().into(),
        rows.into(),
        (s.queries as i32).into(),
        (s.heads as i32).into(),
    ];
    gpu.launch(
        variant.clone(),
        "row_products",
        Grid::blocks((rows * of.width / 8).div_ceil(256)),
        &arguments,
    );
    let mut shared: Vec<Arg> = vec![
        grad.memory().into(),
        log_sums.memory().into(),
        along.memory().into(),
        survivors.as_ref().map_or(Arg::Pointer(0), |t| t.memory().into()),
        of.q,
        of.k,
        of.v,
        mask.as_deref().map_or(Arg::Pointer(0), Arg::from),
    ];
    shared.extend(options);
    let arguments: Vec<Arg> = [gradients.q].into_iter().chain(shared.iter().copied()).collect();
    let of_queries = grid(s.queries, s.batch * s.heads, 6, of.width);
    gpu.launch(variant.clone(), "queries_backward", of_queries, &arguments);
    let arguments: Vec<Arg> = [gradients.k, gradients.v].into_iter().chain(shared).collect();
    let of_keys = grid(s.keys, s.batch * s.kv_heads, 6, of.width);
    gpu.launch(variant, "keys_backward", of_keys, &arguments);
}
