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

/// Whether there are kernels for this attention of `q`.
pub(super) fn takes(q: &Tensor, s: &Attention) -> bool {
    let most = i32::MAX as usize / 2;
    let width = q.width() / s.heads;
    // What the keys' gradient takes, the most of the three, with the 1 KiB that it declares.
    let shared = grid(0, 0, 6, width).shared as usize + 1024;
    q.dtype() == DType::Bf16
        && WIDTHS.contains(&width)
        && matches!(q.device(), Device::Cuda(gpu) if shared <= gpu.shared_memory())
        && GROUPS.contains(&s.pattern.map_or(0, |(_, of)| of))
        && s.queries < most
        && s.keys < most
        && s.batch * s.heads <= u16::MAX as usize
}

/// Every variant that [`takes`] lets through.
#[cfg(test)]
pub(crate) fn variants() -> Vec<Variant> {
    let of = |width| GROUPS.map(|group| variant(width, group));
    WIDTHS.into_iter().flat_map(of).collect()
}

fn variant(width: usize, group: usize) -> Variant {
    SOURCE.with(DType::Bf16, &[("D", width), ("OF", group)])
}

/// What kernels take last, and the variant to take them from.
fn options(s: &Attention, width: usize, drop: Option<Drop>) -> (Variant, [Arg; 10]) {
    let (keep, of) = s.pattern.unwrap_or((0, 0));
    let d = drop.unwrap_or(Drop { key: 0, below: 0, factor: 1.0 });
    let arguments = [
        (s.queries as i32).into(),
        (s.keys as i32).into(),
        (s.heads as i32).into(),
        (s.kv_heads as i32).into(),
        s.scale.into(),
        i32::from(s.causal).into(),
        (keep as i32).into(),
        d.key.into(),
        d.below.into(),
        d.factor.into(),
    ];
    (variant(width, of), arguments)
}

/// A block of four warps for each 64 of `rows` and each of `heads`, with `tiles` tiles of shared memory.
fn grid(rows: usize, heads: usize, tiles: usize, width: usize) -> Grid {
    let shared = tiles * TILE * (width + 8) * DType::Bf16.size();
    Grid { blocks: [rows.div_ceil(TILE) as u32, heads as u32, 1], threads: 128, shared: shared as u32 }
}

/// The output and, if `keep`, the logarithm (base 2) of each softmax's sum, f32 `[batch, heads, queries]`.
pub(super) fn forward(
    gpu: Gpu,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    s: &Attention,
    drop: Option<Drop>,
    keep: bool,
) -> (Tensor, Option<Tensor>) {
    let width = q.width() / s.heads;
    let out = Tensor::stale_of(gpu, q.dtype(), q.shape());
    let shape = [s.batch, s.heads, s.queries];
    let log_sums = keep.then(|| Tensor::stale_on(Device::Cuda(gpu), &shape));
    let mask = s.key_mask.as_ref().map(|m| m.on(gpu));
    let (variant, options) = options(s, width, drop);
    let mut arguments = vec![
        out.memory().into(),
        log_sums.as_ref().map_or(Arg::Pointer(0), |t| t.memory().into()),
        q.memory().into(),
        k.memory().into(),
        v.memory().into(),
        mask.as_deref().map_or(Arg::Pointer(0), Arg::from),
    ];
    arguments.extend(options);
    gpu.launch(variant, "forward", grid(s.queries, s.batch * s.heads, 5, width), &arguments);
    (out, log_sums)
}

/// The gradients of queries, keys and values. The scores are computed again, twice: once for the queries' sums and
/// once for the keys', so that every sum has one order.
pub(super) fn backward(
    gpu: Gpu,
    grad: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_sums: &Tensor,
    out: &Tensor,
    s: &Attention,
    drop: Option<Drop>,
) -> (Tensor, Tensor, Tensor) {
    let width = q.width() / s.heads;
    let [dq, dk, dv] = [q, k, v].map(|x| Tensor::stale_of(gpu, x.dtype(), x.shape()));
    let along = Tensor::stale_on(Device::Cuda(gpu), log_sums.shape());
    let mask = s.key_mask.as_ref().map(|m| m.on(gpu));
    let (variant, options) = options(s, width, drop);
    let rows = log_sums.len();
    let arguments = [
        along.memory().into(),
        grad.memory().into(),
        out.memory().into(),
        rows.into(),
        (s.queries as i32).into(),
        (s.heads as i32).into(),
    ];
    gpu.launch(variant.clone(), "row_products", Grid::blocks((rows * width / 8).div_ceil(256)), &arguments);
    let mut shared: Vec<Arg> = vec![
        grad.memory().into(),
        log_sums.memory().into(),
        along.memory().into(),
        q.memory().into(),
        k.memory().into(),
        v.memory().into(),
        mask.as_deref().map_or(Arg::Pointer(0), Arg::from),
    ];
    shared.extend(options);
    let arguments: Vec<Arg> = [dq.memory().into()].into_iter().chain(shared.iter().copied()).collect();
    let of_queries = grid(s.queries, s.batch * s.heads, 4, width);
    gpu.launch(variant.clone(), "queries_backward", of_queries, &arguments);
    let arguments: Vec<Arg> = [dk.memory().into(), dv.memory().into()].into_iter().chain(shared).collect();
    let of_keys = grid(s.keys, s.batch * s.kv_heads, 6, width);
    gpu.launch(variant, "keys_backward", of_keys, &arguments);
    (dq, dk, dv)
}
