use super::cpu::{EXACT, output_shape};
use crate::cuda::{Arg, Factor, Gpu, Grid, Operand, Product, Source, TensorMap, source};
use crate::ops::lsq::QMAX;
use crate::ops::{add, cast};
use crate::{DType, Device, Tensor};

pub(crate) static SOURCE: Source = source!("linear");

/// Rows and columns of the output that a block of [`BYTES`] makes.
const TILE: usize = 128;

/// Codes of depth that it fetches at a time.
const DEPTH: usize = 128;

/// Products of bytes, on Hopper alone.
pub(crate) static BYTES: Source = Source {
    name: "linear_int8",
    text: concat!(include_str!("../tma.cuh"), "\n#line 1 \"int8.cu\"\n", include_str!("int8.cu")),
};

/// `x` and `w` of one type, the output of type `element`.
pub(super) fn forward(gpu: Gpu, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, element: DType) -> Tensor {
    let (out, width) = (w.shape()[0], w.shape()[1]);
    let y = Tensor::stale_of(gpu, element, &output_shape(x, out));
    // cuBLASLt adds a bias of the output's type to rows of aligned length; others are written first and added to.
    let fused = bias.filter(|_| out % 8 == 0).map(|b| cast::apply(b, element));
    let before = bias.filter(|_| fused.is_none()).map(|b| cast::apply(b, DType::F32));
    if let Some(b) = &before {
        let arguments = [y.memory().into(), b.memory().into(), out.into()];
        gpu.launch(SOURCE.of(element), "fill_rows", Grid::blocks(y.rows()), &arguments);
    }
    gpu.gemm(&Product {
        m: x.rows(),
        n: out,
        k: width,
        alpha: Factor::Host(1.0),
        a: Operand::rows(x, width),
        b: Operand::rows(w, width).t(),
        beta: if before.is_some() { 1.0 } else { 0.0 },
        c: Operand::rows(&y, out),
        bias: fused.as_ref(),
    });
    y
}

/// The output is of type `element`.
pub(super) fn forward_codes(
    gpu: Gpu,
    x: &Tensor,
    w: &Tensor,
    sx: &Tensor,
    sw: &Tensor,
    bias: Option<&Tensor>,
    element: DType,
) -> Tensor {
    let (out, width, tokens, device) = (w.shape()[0], w.shape()[1], x.rows(), Device::Cuda(gpu));
    // So many products of two codes never sum to an integer that f32 rounds.
    let step = (EXACT / QMAX / QMAX) as usize / 16 * 16;
    let starts: Vec<usize> = (0..width).step_by(step).collect();
    // Between parts, the integers so far.
    let sum = (starts.len() > 1).then(|| Tensor::stale_on(device, &[tokens, out]));
    let part = Tensor::stale_on(device, &[tokens, out]);
    let y = Tensor::stale_of(gpu, element, &output_shape(x, out));
    for &from in &starts {
        gpu.gemm(&Product {
            m: tokens,
            n: out,
            k: step.min(width - from),
            alpha: Factor::Host(1.0),
            a: Operand::rows(x, width).from(from),
            b: Operand::rows(w, width).from(from).t(),
            beta: 0.0,
            c: Operand::rows(&part, out),
            bias: None,
        });
        // The first part starts the integer sum, the last one ends it with scale and bias.
        let (first, last) = (from == 0, from + step >= width);
        gpu.launch(
            SOURCE.of(element),
            "add_part",
            // A row has so many packs.
            Grid { threads: (out / 8).next_multiple_of(32).clamp(32, 256) as u32, ..Grid::blocks(tokens) },
            &[
                y.memory().into(),
                sum.as_ref().map_or(Arg::Pointer(0), |s| s.memory().into()),
                part.memory().into(),
                sx.memory().into(),
                sw.memory().into(),
                bias.map_or(Arg::Pointer(0), |b| b.memory().into()),
                out.into(),
                i32::from(first).into(),
                i32::from(last).into(),
            ],
        );
    }
    y
}

/// Products of codes as i8 (`[x, w]`): the output and, with `steps` for ranges of columns, its fake-quantised values.
/// The first is left out unless `keep`.
pub(super) fn forward_bytes(
    gpu: Gpu,
    [x, w]: [&Tensor; 2],
    [sx, sw]: [&Tensor; 2],
    bias: Option<&Tensor>,
    steps: &[Tensor],
    keep: bool,
    element: DType,
) -> (Option<Tensor>, Option<Tensor>) {
    let (out, width, tokens) = (w.shape()[0], w.shape()[1], x.rows());
    let range = out / steps.len().max(1);
    assert!(
        steps.len() <= 3 && range * steps.len().max(1) == out && range.is_multiple_of(8),
        "{steps:?} of {out}"
    );
    let shape = output_shape(x, out);
    let y = keep.then(|| Tensor::stale_of(gpu, element, &shape));
    let z = (!steps.is_empty()).then(|| Tensor::stale_of(gpu, element, &shape));
    let at = |t: Option<&Tensor>| t.map_or(Arg::Pointer(0), |t| t.memory().into());
    // None after a failure.
    let maps =
        [(x, tokens), (w, out)].map(|(t, rows)| TensorMap::boxes(t.memory(), rows, width, (TILE, DEPTH)));
    let [Some(x), Some(w)] = maps else { return (y, z) };
    // Three stages of two tiles, and what aligns them.
    let shared = (3 * 2 * TILE * DEPTH + 1024) as u32;
    let blocks = [out.div_ceil(TILE) as u32, tokens.div_ceil(TILE) as u32, 1];
    gpu.launch(
        BYTES.of(element),
        "product",
        Grid { blocks, threads: 256, shared },
        &[
            at(y.as_ref()),
            at(z.as_ref()),
            x.into(),
            w.into(),
            sx.memory().into(),
            sw.memory().into(),
            at(bias),
            at(steps.first()),
            at(steps.get(1)),
            at(steps.get(2)),
            (range as i32).into(),
            (tokens as i32).into(),
            (out as i32).into(),
            (width as i32).into(),
        ],
    );
    (y, z)
}

/// `w` with each row times its scale.
pub(super) fn dequantised(gpu: Gpu, w: &Tensor, scale: &Tensor) -> Tensor {
    let out = Tensor::stale_of(gpu, w.dtype(), w.shape());
    let arguments = [out.memory().into(), w.memory().into(), scale.memory().into(), w.width().into()];
    gpu.launch(SOURCE.of(w.dtype()), "scale_rows", Grid::blocks(w.rows()), &arguments);
    out
}

/// Adds `grad w` to `sum`, which may be empty; `shape` is that of the input.
pub(super) fn input_gradient(gpu: Gpu, grad: &Tensor, w: &Tensor, shape: &[usize], sum: &mut Option<Tensor>) {
    let (out, width) = (w.shape()[0], w.shape()[1]);
    let multiply = |beta: f32, into: &Tensor| {
        gpu.gemm(&Product {
            m: grad.rows(),
            n: width,
            k: out,
            alpha: Factor::Host(1.0),
            a: Operand::rows(grad, out),
            b: Operand::rows(w, width),
            beta,
            c: Operand::rows(into, width),
            bias: None,
        });
    };
    match sum {
        // Added in the product's own pass.
        Some(sum) if !sum.shared() && sum.dtype() == w.dtype() => multiply(1.0, sum),
        _ => {
            let dx = Tensor::stale_of(gpu, w.dtype(), shape);
            multiply(0.0, &dx);
            match sum {
                Some(sum) => add::accumulate(sum, &dx),
                None => *sum = Some(dx),
            }
        }
    }
}

/// Adds `factor * grad^T x` to `sum`, which may be empty, in f32 whatever the operands are.
pub(super) fn weight_gradient(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    factor: Option<&Tensor>,
    sum: &mut Option<Tensor>,
) {
    let (out, width) = (grad.width(), x.width());
    let beta = if sum.is_some() { 1.0 } else { 0.0 };
    let into = sum.get_or_insert_with(|| Tensor::stale_on(Device::Cuda(gpu), &[out, width]));
    // Shared storage is copied.
    into.memory_mut();
    gpu.gemm(&Product {
        m: out,
        n: width,
        k: grad.rows(),
        alpha: factor.map_or(Factor::Host(1.0), Factor::Gpu),
        a: Operand::rows(grad, out).t(),
        b: Operand::rows(x, width),
        beta,
        c: Operand::rows(into, width),
        bias: None,
    });
}
