//! The plain kernels, for any shape. `flash.rs` has those for tensor cores.

use super::flash;
use super::{Attention, Saved, rounding};
use crate::cuda::{Arg, Gpu, Grid, Source};
use crate::ops::dropout::Drop;
use crate::{DType, Device, Tensor};

pub(crate) static SOURCE: Source =
    Source { name: "attention", text: concat!(rounding::text!(), include_str!("kernel.cu")) };

/// Threads of a block, which owns one query row (or, for the keys' gradients, one key row).
const THREADS: u32 = 128;

/// The sizes and options every kernel takes last.
fn options(s: &Attention, width: usize, drop: Option<Drop>) -> [Arg; 12] {
    let (keep, of) = s.pattern.unwrap_or((0, 0));
    let off = Drop { key: 0, below: 0, factor: 1.0 };
    let d = drop.unwrap_or(off);
    [
        s.queries.into(),
        s.keys.into(),
        s.heads.into(),
        s.kv_heads.into(),
        (width / s.heads).into(),
        s.scale.into(),
        i32::from(s.causal).into(),
        (keep as i32).into(),
        (of as i32).into(),
        d.key.into(),
        d.below.into(),
        d.factor.into(),
    ]
}

/// A block for each of `rows`, with `width` floats of shared memory, rounded up because the compiler reads a row's
/// last elements four at a time before it looks how many there are.
fn grid(rows: usize, width: usize) -> Grid {
    let shared = width.next_multiple_of(4) * size_of::<f32>();
    Grid { threads: THREADS, shared: shared as u32, ..Grid::blocks(rows) }
}

/// The output and, if `keep`, what backward needs.
pub(super) fn forward(
    gpu: Gpu,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    s: &Attention,
    drop: Option<Drop>,
    keep: bool,
) -> (Tensor, Option<Saved>) {
    if flash::takes(q, q.width() / s.heads, s) {
        let (out, kept) = flash::forward(gpu, flash::Operands::apart(q, k, v, s), s, drop, keep);
        let saved = kept.map(|kept| Saved::Flash(kept, out.clone()));
        return (out, saved);
    }
    let device = Device::Cuda(gpu);
    let out = Tensor::stale_of(gpu, q.dtype(), q.shape());
    let shape = [s.batch, s.heads, s.queries, s.keys];
    let softmax = Tensor::stale_on(device, &shape);
    let thinned = thinned(device, s, drop);
    let mask = s.key_mask.as_ref().map(|m| m.on(gpu));
    let mut arguments = vec![
        out.memory().into(),
        softmax.memory().into(),
        thinned.as_ref().map_or(Arg::Pointer(0), |t| t.memory().into()),
        q.memory().into(),
        k.memory().into(),
        v.memory().into(),
        mask.as_deref().map_or(Arg::Pointer(0), Arg::from),
        // bf16 rounds by more than that.
        i32::from(s.half.is_some() && q.dtype() == DType::F32).into(),
    ];
    let steps = s.half.as_ref().filter(|_| q.dtype() == DType::F32).and_then(|h| h.steps.as_ref());
    arguments.extend([0, 1, 2].map(|i| steps.map_or(Arg::Pointer(0), |s| s[i].memory().into())));
    arguments.extend(options(s, q.width(), drop));
    let rows = s.batch * s.heads * s.queries;
    gpu.launch(SOURCE.of(q.dtype()), "forward", grid(rows, q.width() / s.heads), &arguments);
    (out, keep.then_some(Saved::Softmax(softmax)))
}

/// Room for the probabilities after pattern and dropout, where they differ from the softmax.
fn thinned(device: Device, s: &Attention, drop: Option<Drop>) -> Option<Tensor> {
    let shape = [s.batch, s.heads, s.queries, s.keys];
    (s.pattern.is_some() || drop.is_some()).then(|| Tensor::stale_on(device, &shape))
}

pub(super) fn backward(
    gpu: Gpu,
    grad: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    saved: &Saved,
    s: &Attention,
    drop: Option<Drop>,
) -> (Tensor, Tensor, Tensor) {
    let softmax = match saved {
        Saved::Softmax(softmax) => softmax,
        Saved::Flash(kept, out) => {
            let gradients = [q, k, v].map(|x| Tensor::stale_of(gpu, x.dtype(), x.shape()));
            let [dq, dk, dv] = &gradients;
            let of = [(q, k, v), (dq, dk, dv)].map(|(q, k, v)| flash::Operands::apart(q, k, v, s));
            flash::backward(gpu, grad, of, kept, out, s, drop);
            return gradients.into();
        }
    };
    let device = Device::Cuda(gpu);
    let [dq, dk, dv] = [q, k, v].map(|x| Tensor::stale_of(gpu, x.dtype(), x.shape()));
    let dscores = Tensor::stale_on(device, softmax.shape());
    let thinned = thinned(device, s, drop);
    let weights = thinned.as_ref().unwrap_or(softmax);
    let width = q.width() / s.heads;
    let mut arguments = vec![
        dq.memory().into(),
        dscores.memory().into(),
        thinned.as_ref().map_or(Arg::Pointer(0), |t| t.memory().into()),
        softmax.memory().into(),
        grad.memory().into(),
        k.memory().into(),
        v.memory().into(),
    ];
    arguments.extend(options(s, q.width(), drop));
    gpu.launch(
        SOURCE.of(q.dtype()),
        "backward_queries",
        grid(s.batch * s.heads * s.queries, width),
        &arguments,
    );
    let mut arguments = vec![
        dk.memory().into(),
        dv.memory().into(),
        dscores.memory().into(),
        weights.memory().into(),
        grad.memory().into(),
        q.memory().into(),
    ];
    arguments.extend(options(s, q.width(), drop));
    gpu.launch(SOURCE.of(q.dtype()), "backward_keys", grid(s.batch * s.kv_heads * s.keys, 0), &arguments);
    (dq, dk, dv)
}
