use super::cpu::{EXACT, output_shape};
use crate::cuda::{Arg, Gpu, Grid, Operand, Product, Source, source};
use crate::ops::cast;
use crate::ops::lsq::QMAX;
use crate::{DType, Device, Tensor};

pub(crate) static SOURCE: Source = source!("linear");

/// `x` and `w` of one type, the output of type `element`.
pub(super) fn forward(gpu: Gpu, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, element: DType) -> Tensor {
    let (out, width) = (w.shape()[0], w.shape()[1]);
    let y = Tensor::stale_of(gpu, element, &output_shape(x, out));
    // cuBLASLt adds a bias of the output's type to rows of aligned length; others are written first and added to.
    let fused = bias.filter(|_| out % 8 == 0).map(|b| cast::apply(b, element));
    let before = bias.filter(|_| fused.is_none());
    if let Some(b) = before {
        let n = y.len();
        let arguments = [y.memory().into(), b.memory().into(), n.into(), out.into()];
        gpu.launch(SOURCE.of(element), "fill_rows", Grid::elements(n), &arguments);
    }
    gpu.gemm(&Product {
        m: x.rows(),
        n: out,
        k: width,
        alpha: 1.0,
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
    let n = y.len();
    for &from in &starts {
        gpu.gemm(&Product {
            m: tokens,
            n: out,
            k: step.min(width - from),
            alpha: 1.0,
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
            Grid::elements(n),
            &[
                y.memory().into(),
                sum.as_ref().map_or(Arg::Pointer(0), |s| s.memory().into()),
                part.memory().into(),
                sx.memory().into(),
                sw.memory().into(),
                bias.map_or(Arg::Pointer(0), |b| b.memory().into()),
                n.into(),
                out.into(),
                i32::from(first).into(),
                i32::from(last).into(),
            ],
        );
    }
    y
}

/// `w` with each row times its scale.
pub(super) fn dequantised(gpu: Gpu, w: &Tensor, scale: &Tensor) -> Tensor {
    let out = Tensor::stale_of(gpu, w.dtype(), w.shape());
    let n = w.len();
    let arguments =
        [out.memory().into(), w.memory().into(), scale.memory().into(), n.into(), w.width().into()];
    gpu.launch(SOURCE.of(w.dtype()), "scale_rows", Grid::elements(n), &arguments);
    out
}

pub(super) fn input_gradient(gpu: Gpu, grad: &Tensor, w: &Tensor, shape: &[usize]) -> Tensor {
    let (out, width) = (w.shape()[0], w.shape()[1]);
    let dx = Tensor::stale_of(gpu, w.dtype(), shape);
    gpu.gemm(&Product {
        m: grad.rows(),
        n: width,
        k: out,
        alpha: 1.0,
        a: Operand::rows(grad, out),
        b: Operand::rows(w, width),
        beta: 0.0,
        c: Operand::rows(&dx, width),
        bias: None,
    });
    dx
}

/// In f32, whatever the operands are.
pub(super) fn weight_gradient(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    factor: Option<&Tensor>,
    sum: &mut Option<Tensor>,
) {
    let (out, width) = (grad.width(), x.width());
    let multiply = |beta: f32, into: &Tensor| {
        gpu.gemm(&Product {
            m: out,
            n: width,
            k: grad.rows(),
            alpha: 1.0,
            a: Operand::rows(grad, out).t(),
            b: Operand::rows(x, width),
            beta,
            c: Operand::rows(into, width),
            bias: None,
        });
    };
    let product = Tensor::stale_on(Device::Cuda(gpu), &[out, width]);
    match (factor, &mut *sum) {
        (None, None) => multiply(0.0, &product),
        (None, Some(sum)) => {
            sum.memory_mut();
            return multiply(1.0, sum);
        }
        // The factor is known on the GPU alone, so the product is scaled after it.
        (Some(factor), before) => {
            multiply(0.0, &product);
            let n = product.len();
            let before = before.as_ref().map_or(Arg::Pointer(0), |s| s.memory().into());
            let arguments = [product.memory().into(), before, factor.memory().into(), n.into()];
            gpu.launch(&SOURCE, "scale_and_add", Grid::elements(n), &arguments);
        }
    }
    *sum = Some(product);
}
