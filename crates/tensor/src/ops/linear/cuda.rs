use super::cpu::{EXACT, output_shape};
use crate::cuda::{Arg, Gpu, Grid, Operand, Product, Source, source};
use crate::ops::lsq::QMAX;
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = source!("linear");

pub(super) fn forward(gpu: Gpu, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let (out, width) = (w.shape()[0], w.shape()[1]);
    let y = Tensor::stale_on(Device::Cuda(gpu), &output_shape(x, out));
    if let Some(b) = bias {
        let n = y.len();
        let arguments = [y.memory().into(), b.memory().into(), n.into(), out.into()];
        gpu.launch(&SOURCE, "fill_rows", Grid::elements(n), &arguments);
    }
    gpu.gemm(&Product {
        m: x.rows(),
        n: out,
        k: width,
        alpha: 1.0,
        a: Operand::rows(x.memory(), width),
        b: Operand::rows(w.memory(), width).t(),
        beta: if bias.is_some() { 1.0 } else { 0.0 },
        c: Operand::rows(y.memory(), out),
    });
    y
}

pub(super) fn forward_codes(
    gpu: Gpu,
    x: &Tensor,
    w: &Tensor,
    sx: &Tensor,
    sw: &Tensor,
    bias: Option<&Tensor>,
) -> Tensor {
    let (out, width, tokens, device) = (w.shape()[0], w.shape()[1], x.rows(), Device::Cuda(gpu));
    // So many products of two codes never sum to an integer that f32 rounds.
    let step = (EXACT / QMAX / QMAX) as usize;
    let parts: Vec<Tensor> = (0..width)
        .step_by(step)
        .map(|from| {
            let sum = Tensor::stale_on(device, &[tokens, out]);
            gpu.gemm(&Product {
                m: tokens,
                n: out,
                k: step.min(width - from),
                alpha: 1.0,
                a: Operand::rows(x.memory(), width).from(from),
                b: Operand::rows(w.memory(), width).from(from).t(),
                beta: 0.0,
                c: Operand::rows(sum.memory(), out),
            });
            sum
        })
        .collect();
    let y = Tensor::stale_on(device, &output_shape(x, out));
    let n = y.len();
    // The first part starts the integer sum, the last one ends it with scale and bias.
    for (i, part) in parts.iter().enumerate() {
        let last = i + 1 == parts.len();
        gpu.launch(
            &SOURCE,
            "add_part",
            Grid::elements(n),
            &[
                y.memory().into(),
                part.memory().into(),
                sx.memory().into(),
                sw.memory().into(),
                bias.map_or(Arg::Pointer(0), |b| b.memory().into()),
                n.into(),
                out.into(),
                i32::from(i == 0).into(),
                i32::from(last).into(),
            ],
        );
    }
    y
}

pub(super) fn scale_columns(gpu: Gpu, grad: &Tensor, scale: &Tensor) -> Tensor {
    let out = Tensor::stale_on(Device::Cuda(gpu), grad.shape());
    let n = grad.len();
    let arguments =
        [out.memory().into(), grad.memory().into(), scale.memory().into(), n.into(), grad.width().into()];
    gpu.launch(&SOURCE, "scale_columns", Grid::elements(n), &arguments);
    out
}

pub(super) fn input_gradient(gpu: Gpu, grad: &Tensor, w: &Tensor, shape: &[usize]) -> Tensor {
    let (out, width) = (w.shape()[0], w.shape()[1]);
    let dx = Tensor::stale_on(Device::Cuda(gpu), shape);
    gpu.gemm(&Product {
        m: grad.rows(),
        n: width,
        k: out,
        alpha: 1.0,
        a: Operand::rows(grad.memory(), out),
        b: Operand::rows(w.memory(), width),
        beta: 0.0,
        c: Operand::rows(dx.memory(), width),
    });
    dx
}

pub(super) fn weight_gradient(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    factor: Option<&Tensor>,
    sum: &mut Tensor,
) {
    let (out, width) = (grad.width(), x.width());
    let multiply = |beta: f32, into: &Tensor| {
        gpu.gemm(&Product {
            m: out,
            n: width,
            k: grad.rows(),
            alpha: 1.0,
            a: Operand::rows(grad.memory(), out).t(),
            b: Operand::rows(x.memory(), width),
            beta,
            c: Operand::rows(into.memory(), width),
        });
    };
    let Some(factor) = factor else {
        sum.memory_mut();
        return multiply(1.0, sum);
    };
    // The factor is known on the GPU alone, so the product is scaled after it.
    let product = Tensor::stale_on(Device::Cuda(gpu), &[out, width]);
    multiply(0.0, &product);
    let n = product.len();
    let arguments = [sum.memory_mut().into(), product.memory().into(), factor.memory().into(), n.into()];
    gpu.launch(&SOURCE, "add_scaled", Grid::elements(n), &arguments);
}
