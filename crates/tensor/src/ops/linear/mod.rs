//! `y = x W^T + b`, for f32 operands and for quantised ones.

mod cpu;
mod cuda;

use super::lsq::{self, Quantized};
use super::{add, cast};
use crate::cuda::Gpu;
use crate::cuda::reduce::{Sums, column_sums};
use crate::{DType, Device, Grads, Tape, Tensor, Var};

pub(crate) use cuda::{BYTES, SOURCE};

/// `x` `[.., in]` times `weight` `[out, in]` transposed, plus `bias` `[out]`: `[.., out]`. On a GPU, `x` and `weight`
/// may be bf16; the gradients of weight and bias are f32.
pub fn linear(tape: &Tape, x: &Var, weight: &Var, bias: Option<&Var>) -> Var {
    linear_as(tape, x, weight, bias, x.value().dtype())
}

/// [`linear`] with an output of type `element`: f32, or the operands' type.
pub fn linear_as(tape: &Tape, x: &Var, weight: &Var, bias: Option<&Var>, element: DType) -> Var {
    let out = weight.shape()[0];
    let y = compute(x.value(), weight.value(), bias.map(Var::value), element);
    let inputs: Vec<&Var> = [x, weight].into_iter().chain(bias).collect();
    let (x2, w2, b2) = (x.clone(), weight.clone(), bias.cloned());
    tape.push(y, &inputs, move |grad, grads| {
        let sums = grads.known_sums();
        let grad = cast::apply(&grad.reshape(&[grad.len() / out, out]), x2.value().dtype());
        if let Some(sum) = grads.slot(&x2) {
            input_gradient(&grad, w2.value(), x2.shape(), sum);
        }
        if let Some(sum) = grads.slot(&w2) {
            weight_gradient(&grad, x2.value(), None, sum);
        }
        if let Some(b) = b2.filter(|b| grads.wants(b)) {
            add_bias_gradient(grads, &b, &grad, sums);
        }
    })
}

/// [`linear`] without a tape.
pub fn apply(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    compute(x, weight, bias, x.dtype())
}

fn compute(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, element: DType) -> Tensor {
    assert_eq!(x.width(), weight.shape()[1], "linear: input {:?}, weight {:?}", x.shape(), weight.shape());
    match x.device() {
        Device::Cpu => cpu::forward(x, weight, bias),
        Device::Cuda(gpu) => cuda::forward(gpu, x, weight, bias, element),
    }
}

/// The integer product of quantised `x` (one scale) and `weight` (one scale per row), scaled to f32:
/// `y[t, o] = (sum_i cx[t, i] cw[o, i]) * (sx * sw[o]) + b[o]`; without a bias nothing is added.
///
/// The sum is exact, as INT8 hardware computes it in 32-bit accumulators, and the scaling is two
/// separately rounded f32 operations; [`super::int8_linear`] computes the same bits from the same codes.
/// The gradients of `x` and `weight` are those of the dequantised operands (code times scale).
/// The output is of type `element`, f32 or that of the codes. With `outputs`, step sizes of as many equal ranges of
/// columns, it is fake-quantised, as [`lsq::fake_quantize`] does.
pub fn quantized_linear(
    tape: &Tape,
    x: &Quantized,
    weight: &Quantized,
    bias: Option<&Var>,
    outputs: &[Var],
    element: DType,
) -> Var {
    let (cx, cw) = (&x.codes, &weight.codes);
    let out = cw.shape()[0];
    assert_eq!(cx.value().width(), cw.shape()[1], "quantized_linear: {:?}, {:?}", cx.shape(), cw.shape());
    if let (Some((bx, _)), Some((bw, Some(values))), Device::Cuda(gpu)) =
        (x.small(), weight.small(), cx.value().device())
    {
        return bytes_linear(tape, gpu, x, weight, [bx, bw, values], bias, outputs, element);
    }
    let (sx, sw) = (x.scale.clone(), weight.scale.clone());
    let b = bias.map(Var::value);
    let y = match cx.value().device() {
        Device::Cpu => cpu::forward_codes(cx.value(), cw.value(), sx.item(), &sw, b),
        Device::Cuda(gpu) => cuda::forward_codes(gpu, cx.value(), cw.value(), &sx, &sw, b, element),
    };
    let inputs: Vec<&Var> = [cx, cw].into_iter().chain(bias).collect();
    let (cx2, cw2, b2) = (cx.clone(), cw.clone(), bias.cloned());
    let y = tape.push(y, &inputs, move |grad, grads| {
        let grad = cast::apply(&grad.reshape(&[grad.len() / out, out]), cx2.value().dtype());
        if let Some(sum) = grads.slot(&cx2) {
            match grad.device() {
                Device::Cpu => input_gradient(&cpu::scale_columns(&grad, &sw), cw2.value(), cx2.shape(), sum),
                // Of weights and activations, weights are fewer.
                Device::Cuda(gpu) => {
                    let w = cuda::dequantised(gpu, cw2.value(), &sw);
                    cuda::input_gradient(gpu, &grad, &w, cx2.shape(), sum)
                }
            }
        }
        if let Some(sum) = grads.slot(&cw2) {
            weight_gradient(&grad, cx2.value(), Some(&sx), sum);
        }
        if let Some(b) = b2.filter(|b| grads.wants(b)) {
            add_bias_gradient(grads, &b, &grad, None);
        }
    });
    match outputs {
        [] => y,
        [scale] => lsq::fake_quantize(tape, &y, scale),
        _ => panic!("{} output step sizes where codes are not multiplied as bytes", outputs.len()),
    }
}

/// [`quantized_linear`] of codes as i8, `[bx, bw]`, with the weight's `values`, by one kernel.
#[allow(clippy::too_many_arguments)]
fn bytes_linear(
    tape: &Tape,
    gpu: Gpu,
    x: &Quantized,
    weight: &Quantized,
    [bx, bw, values]: [&Tensor; 3],
    bias: Option<&Var>,
    outputs: &[Var],
    element: DType,
) -> Var {
    let out = bw.shape()[0];
    let inputs: Vec<&Var> = [&x.codes, &weight.codes].into_iter().chain(bias).chain(outputs).collect();
    let steps: Vec<Tensor> = outputs.iter().map(|s| s.value().clone()).collect();
    // The output before quantisation is for the backward pass.
    let keep = outputs.is_empty() || tape.tracks(&inputs);
    let (y, z) = cuda::forward_bytes(
        gpu,
        [bx, bw],
        [&x.scale, &weight.scale],
        bias.map(Var::value),
        &steps,
        keep,
        element,
    );
    let (cx, cw, sx, values) = (x.codes.clone(), weight.codes.clone(), x.scale.clone(), values.clone());
    let (b2, outputs) = (bias.cloned(), outputs.to_vec());
    let divisor = lsq::divisor(tape, cx.value().rows() * out / outputs.len().max(1));
    let (result, before) = match z {
        Some(z) => (z, y),
        None => (y.expect("kept where it is the result"), None),
    };
    tape.push(result, &inputs, move |grad, grads| {
        let mut sums = grads.known_sums();
        let mut grad = grad.reshape(&[grad.len() / out, out]);
        if let Some(y) = before {
            let steps: Vec<&Tensor> = outputs.iter().map(Var::value).collect();
            let (dy, of_columns, of_steps) =
                lsq::ranges_backward(gpu, &grad, &y.reshape(grad.shape()), &steps, divisor);
            for (s, ds) in outputs.iter().zip(of_steps) {
                grads.add_sums(s, ds);
            }
            (grad, sums) = (dy, Some(of_columns));
        }
        let grad = cast::apply(&grad, cx.value().dtype());
        if let Some(sum) = grads.slot(&cx) {
            cuda::input_gradient(gpu, &grad, &values, cx.shape(), sum);
        }
        if let Some(sum) = grads.slot(&cw) {
            weight_gradient(&grad, cx.value(), Some(&sx), sum);
        }
        if let Some(b) = b2.filter(|b| grads.wants(b)) {
            add_bias_gradient(grads, &b, &grad, sums);
        }
    })
}

/// `sum += grad w`, in the shape of the input; a sum that is not there is 0.
fn input_gradient(grad: &Tensor, w: &Tensor, shape: &[usize], sum: &mut Option<Tensor>) {
    match grad.device() {
        Device::Cpu => {
            let dx = cpu::input_gradient(grad, w, shape);
            match sum {
                Some(sum) => add::accumulate(sum, &dx),
                None => *sum = Some(dx),
            }
        }
        Device::Cuda(gpu) => cuda::input_gradient(gpu, grad, w, shape, sum),
    }
}

/// `sum += factor * grad^T x`; a `factor` `[1]` that is not given is 1, and a sum that is not there 0.
fn weight_gradient(grad: &Tensor, x: &Tensor, factor: Option<&Tensor>, sum: &mut Option<Tensor>) {
    match grad.device() {
        Device::Cpu => {
            let sum = sum.get_or_insert_with(|| Tensor::zeros(&[grad.width(), x.width()]));
            cpu::weight_gradient(grad, x, factor.map_or(1.0, Tensor::item), sum)
        }
        Device::Cuda(gpu) => cuda::weight_gradient(gpu, grad, x, factor, sum),
    }
}

/// The column sums of `grad`, which may be known.
fn add_bias_gradient(grads: &mut Grads, bias: &Var, grad: &Tensor, known: Option<Sums>) {
    match (known, grad.device()) {
        (Some(sums), _) => grads.add_sums(bias, sums),
        (None, Device::Cpu) => grads.add(bias, cpu::bias_gradient(grad)),
        (None, Device::Cuda(gpu)) => grads.add_sums(bias, column_sums(gpu, grad, None).remove(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, check_bf16, close, devices, noise};
    use super::super::int8_linear::{self, Int8Weight};
    use super::super::layer_norm;
    use super::super::lsq::FakeWeight;
    use super::super::select;
    use super::*;
    use proptest::prelude::*;

    fn reference(x: &[Vec<f64>], width: usize) -> Vec<f64> {
        let out = x[1].len() / width;
        let mut y = Vec::new();
        for row in x[0].chunks(width) {
            for o in 0..out {
                let dot: f64 = row.iter().zip(&x[1][o * width..]).map(|(a, b)| a * b).sum();
                y.push(dot + x.get(2).map_or(0.0, |b| b[o]));
            }
        }
        y
    }

    #[test]
    fn matches_reference() {
        for (tokens, width, out) in [(1, 1, 1), (7, 5, 3), (3, 16, 33)] {
            let inputs = [noise(&[tokens, width], 1), noise(&[out, width], 2), noise(&[out], 3)];
            check(&inputs, |t, v| linear(t, &v[0], &v[1], Some(&v[2])), |x| reference(x, width));
            check(&inputs[..2], |t, v| linear(t, &v[0], &v[1], None), |x| reference(x, width));
        }
        for (tokens, width, out) in [(7, 5, 3), (3, 16, 33), (40, 24, 16), (9, 64, 2)] {
            let inputs = [noise(&[tokens, width], 1), noise(&[out, width], 2), noise(&[out], 3)];
            let wide = |t: &Tape, v: &[Var]| linear_as(t, &v[0], &v[1], Some(&v[2]), DType::F32);
            check_bf16(
                &inputs,
                &[0, 1, 2],
                |t, v| linear(t, &v[0], &v[1], Some(&v[2])),
                |x| reference(x, width),
            );
            check_bf16(&inputs, &[0, 1, 2], wide, |x| reference(x, width));
        }
    }

    /// Rounded operands leave errors that f32 does not, and no more than TF32's: 2^-11 of each operand. Codes are exact.
    #[test]
    fn tf32_rounds_operands_and_no_codes() {
        for device in devices().into_iter().filter(|d| *d != Device::Cpu) {
            let (x, w) = (noise(&[64, 256], 1), noise(&[32, 256], 2));
            let run = || {
                let tape = Tape::recording();
                let [x, w] = [&x, &w].map(|t| tape.leaf(t.to(device)));
                let y = linear(&tape, &x, &w, None);
                let loss = super::super::weighted_sum::dot(&tape, &y, &noise(&[64, 32], 3));
                let y = y.value().to(Device::Cpu).f32().to_vec();
                let mut grads = tape.backward(&loss);
                let rest = [&x, &w].map(|v| grads.take(v).unwrap().to(Device::Cpu).f32().to_vec());
                [vec![y], rest.to_vec()].concat().concat()
            };
            let (exact, rounded) = (run(), crate::cuda::with_tf32(run));
            let error = |x: &[f32]| {
                let squares = x.iter().zip(&exact).map(|(a, b)| ((a - b) as f64).powi(2)).sum::<f64>();
                (squares / exact.iter().map(|x| (*x as f64).powi(2)).sum::<f64>()).sqrt()
            };
            let relative = error(&rounded);
            assert!(relative > 1e-5 && relative < 2f64.powi(-10), "{device:?}: {relative}");
            assert!(error(&run()) == 0.0, "it ends with what it was asked for");
            crate::cuda::with_tf32(|| agree(65, 49, 1040, true, 3));
            device.check().unwrap();
        }
    }

    /// Of several parts of rows, and one has its sums from the norm behind it: on a GPU all are sums that were put off.
    #[test]
    fn a_bias_of_two_maps_gets_the_gradients_of_both() {
        for device in devices() {
            let run = |shared: bool| {
                let tape = Tape::recording();
                let leaf = |shape: &[usize], seed| tape.leaf(noise(shape, seed).to(device));
                let (x, w, gain, first) =
                    (leaf(&[300, 8], 1), leaf(&[8, 8], 2), leaf(&[8], 4), leaf(&[8], 3));
                let second = if shared { first.clone() } else { leaf(&[8], 3) };
                let y = linear(&tape, &x, &w, Some(&first));
                let y = layer_norm::layer_norm(&tape, &y, None, &gain, &second, 1e-5, false);
                let y = linear(&tape, &y, &w, Some(&second));
                let loss = super::super::weighted_sum::dot(&tape, &y, &noise(&[300, 8], 5));
                let mut grads = tape.backward(&loss);
                let mut of = |bias: &Var| grads.take(bias).unwrap().to(Device::Cpu).f32().to_vec();
                let sum = of(&first);
                if shared { sum } else { sum.iter().zip(of(&second)).map(|(a, b)| a + b).collect() }
            };
            let (shared, apart) = (run(true), run(false));
            close("bias", &shared, &apart.iter().map(|&x| x as f64).collect::<Vec<_>>(), 1e-6);
        }
    }

    /// Codes at the extreme of the range over more columns than f32 adds exactly.
    #[test]
    fn quantized_sums_are_exact_where_f32_sums_are_not() {
        let width = 4096;
        let x = Tensor::from_f32(
            (0..width).map(|i| if i % 97 == 0 { -126.0 } else { 127.0 }).collect(),
            &[1, width],
        );
        let w = Tensor::full(&[2, width], 127.0);
        let exact: i64 = x.f32().iter().map(|&v| v as i64 * 127).sum();
        assert!(exact > 1 << 24);
        for device in devices() {
            let tape = Tape::inference();
            let one = |n| Tensor::full(&[n], 1.0).to(device);
            let y = quantized_linear(
                &tape,
                &Quantized::new(tape.constant(x.to(device)), one(1)),
                &Quantized::new(tape.constant(w.to(device)), one(2)),
                None,
                &[],
                DType::F32,
            );
            assert_eq!(y.value().to(Device::Cpu).f32(), [exact as i32 as f32; 2]);
        }
    }

    #[test]
    fn quantized_gradients_are_those_of_the_dequantised_operands() {
        for device in devices() {
            let (x, w) = (noise(&[5, 8], 1), noise(&[3, 8], 2));
            let (sx, sw) = (Tensor::scalar(0.02), Tensor::from_f32(vec![0.02, 0.03, 0.05], &[3]));
            let mask = Tensor::from_u8(vec![1; 24], &[3, 8]).to(device);
            let tape = Tape::recording();
            let (xv, wv) = (tape.leaf(x.to(device)), tape.leaf(w.to(device)));
            let (sxv, swv) = (tape.leaf(sx.to(device)), tape.leaf(sw.to(device)));
            let qx = lsq::quantize_activation(&tape, &xv, &sxv);
            let w = FakeWeight { weight: wv.clone(), mask, scale: swv.clone() };
            let qw = lsq::quantize_weights(&tape, &[vec![w]], DType::F32).remove(0);
            let y = quantized_linear(&tape, &qx, &qw, None, &[], DType::F32);
            let dequantised = |c: &Tensor, s: &dyn Fn(usize) -> f32| -> Vec<f64> {
                c.to(Device::Cpu).f32().iter().enumerate().map(|(i, &c)| (c * s(i)) as f64).collect()
            };
            let dx = dequantised(qx.codes.value(), &|_| 0.02);
            let dw = dequantised(qw.codes.value(), &|i| [0.02, 0.03, 0.05][i / 8]);
            close("output", y.value().to(Device::Cpu).f32(), &reference(&[dx.clone(), dw.clone()], 8), 1e-5);
            let weights = noise(&[5, 3], 4);
            let loss = super::super::weighted_sum::dot(&tape, &y, &weights);
            let mut grads = tape.backward(&loss);
            // Nothing is clipped here, so the straight-through gradient is the linear map's own.
            let mut gx = vec![0.0; 40];
            let mut gw = vec![0.0; 24];
            for t in 0..5 {
                for o in 0..3 {
                    for i in 0..8 {
                        gx[t * 8 + i] += weights.f32()[t * 3 + o] as f64 * dw[o * 8 + i];
                        gw[o * 8 + i] += weights.f32()[t * 3 + o] as f64 * dx[t * 8 + i];
                    }
                }
            }
            close("dx", grads.take(&xv).unwrap().to(Device::Cpu).f32(), &gx, 1e-5);
            close("dw", grads.take(&wv).unwrap().to(Device::Cpu).f32(), &gw, 1e-5);
            assert!(grads.take(&sxv).is_some() && grads.take(&swv).is_some());
        }
    }

    /// Codes -127..=127, mostly of full size where `extreme`.
    fn codes(n: usize, extreme: bool, seed: u64) -> Vec<i8> {
        let code = |i: usize| match crate::cpu::random(seed, i as u32) {
            r if extreme && r % 16 > 0 => [127, -127][(seed >> 1 & 1) as usize],
            r => (r / 16 % 255) as i32 - 127,
        };
        (0..n).map(|i| code(i) as i8).collect()
    }

    /// The training product and the engine's of the same codes, bit for bit.
    fn agree(tokens: usize, out: usize, width: usize, extreme: bool, seed: u64) {
        let (cx, cw) = (codes(tokens * width, extreme, seed), codes(out * width, extreme, seed / 2));
        let wide = |c: &[i8], rows| Tensor::from_f32(c.iter().map(|&c| c as f32).collect(), &[rows, width]);
        let sx = 0.013f32;
        // Among them steps so small that products underflow, where the sign of zero shows.
        let sw: Vec<f32> = (0..out).map(|o| [0.02, 3e-5, 1e-42, 1e-30][o % 4] * (o + 1) as f32).collect();
        let bias = noise(&[out], seed);
        let weight = Int8Weight::new(&cw, out, width);
        let scale: Vec<f32> = sw.iter().map(|s| sx * s).collect();
        for (device, bf16) in devices().into_iter().flat_map(|d| [(d, false), (d, d != Device::Cpu)]) {
            let tape = Tape::inference();
            let on = |t: Tensor| t.to(device);
            let wide = |c: &[i8], rows| if bf16 { wide(c, rows).to_bf16() } else { wide(c, rows) };
            let x = Quantized::new(tape.constant(on(wide(&cx, tokens))), on(Tensor::scalar(sx)));
            let w =
                Quantized::new(tape.constant(on(wide(&cw, out))), on(Tensor::from_f32(sw.clone(), &[out])));
            for bias in [None, Some(&bias)] {
                let b = bias.map(|b| tape.constant(on(b.clone())));
                let element = if bf16 { DType::Bf16 } else { DType::F32 };
                let trained = quantized_linear(&tape, &x, &w, b.as_ref(), &[], element)
                    .value()
                    .to(Device::Cpu)
                    .to_f32();
                let mut ran = int8_linear::apply(&cx, tokens, &weight, &scale, bias.map(Tensor::f32));
                if bf16 {
                    ran = ran.to_bf16().to_f32();
                }
                for (i, (t, r)) in trained.f32().iter().zip(ran.f32()).enumerate() {
                    assert_eq!(
                        t.to_bits(),
                        r.to_bits(),
                        "{device:?} {tokens} x {out} x {width}, [{i}]: {t}, {r}"
                    );
                }
            }
        }
    }

    #[test]
    fn long_rows_of_extreme_codes_agree_with_the_engine() {
        for (tokens, out, width) in [(3, 5, 3072), (2, 7, 4096), (65, 49, 1040), (4, 4, 1041)] {
            for seed in 0..4 {
                agree(tokens, out, width, true, seed);
            }
        }
    }

    /// Where codes are multiplied as bytes: the engine's bits, with every combination of bias and output pairs, at
    /// shapes that no tile divides; and the gradients that the same operations one by one have.
    #[test]
    fn bytes_agree_with_the_engine_and_with_the_parts() {
        for device in devices().into_iter().filter(|d| lsq::takes_bytes(*d, DType::Bf16, 16)) {
            let shapes = [
                (1, 8, 16),
                (130, 24, 48),
                (257, 264, 400),
                (128, 384, 128),
                (300, 3072, 768),
                (64, 768, 3072),
            ];
            for (case, (tokens, out, width)) in shapes.into_iter().enumerate() {
                for ranges in [0, 1, 3] {
                    let seed = case as u64;
                    let (x, w) = (noise(&[tokens, width], seed).to_bf16(), noise(&[out, width], seed + 9));
                    let keep = (0..out * width).map(|i| (i / 2 % 2 == case % 2) as u8).collect();
                    let mask = Tensor::from_u8(keep, &[out, width]);
                    let (sx, bias) = (Tensor::scalar(0.01), noise(&[out], seed + 5));
                    let sw = Tensor::from_f32((0..out).map(|o| 0.01 + 1e-5 * o as f32).collect(), &[out]);
                    let steps: Vec<Tensor> =
                        (0..ranges).map(|r| Tensor::scalar(0.02 * (r + 1) as f32)).collect();
                    let grad = noise(&[tokens, out], 7).to_bf16().to_f32();
                    // By one kernel, or one operation after the other.
                    let run = |together: bool| {
                        let tape = Tape::recording();
                        let on = |t: &Tensor| tape.leaf(t.to(device));
                        let fake = FakeWeight { weight: on(&w), mask: mask.to(device), scale: on(&sw) };
                        let mut leaves =
                            vec![on(&x), on(&sx), fake.weight.clone(), fake.scale.clone(), on(&bias)];
                        let outputs: Vec<Var> = steps.iter().map(on).collect();
                        leaves.extend(outputs.iter().cloned());
                        let mut qx = lsq::quantize_activation(&tape, &leaves[0], &leaves[1]);
                        let mut qw = lsq::quantize_weights(&tape, &[vec![fake]], DType::Bf16).remove(0);
                        assert!(qx.small().is_some() && qw.small().is_some_and(|(_, v)| v.is_some()));
                        let y = if together {
                            quantized_linear(&tape, &qx, &qw, Some(&leaves[4]), &outputs, DType::Bf16)
                        } else {
                            // Codes as floats, of weights in a type that is not summed as bytes.
                            qx = Quantized::new(qx.codes, qx.scale);
                            let wide = |t: &Tensor| t.to(Device::Cpu).to_f32().to_bf16().to(device);
                            let codes = cast_codes(&tape, &qw.codes, wide(qw.codes.value()));
                            qw = Quantized::new(codes, qw.scale);
                            let y = quantized_linear(&tape, &qx, &qw, Some(&leaves[4]), &[], DType::Bf16);
                            let parts =
                                select::split_columns(&tape, &y, &vec![out / ranges.max(1); ranges.max(1)]);
                            let quantised = parts.iter().enumerate().map(|(i, p)| match outputs.get(i) {
                                Some(s) => lsq::fake_quantize(&tape, p, s),
                                None => p.clone(),
                            });
                            let quantised = quantised.collect();
                            return finish(tape, quantised, leaves, &grad);
                        };
                        let parts =
                            select::split_columns(&tape, &y, &vec![out / ranges.max(1); ranges.max(1)]);
                        finish(tape, parts, leaves, &grad)
                    };
                    if ranges > 0 && (out / ranges % 8 != 0 || out % ranges != 0) {
                        continue;
                    }
                    let (one, other) = (run(true), run(false));
                    assert_eq!(one.len(), other.len());
                    for (i, (a, b)) in one.iter().zip(&other).enumerate() {
                        let at = format!("{tokens} x {out} x {width}, {ranges} output pairs, {i}");
                        if i < ranges.max(1) {
                            assert!(a == b, "output differs: {at}");
                            continue;
                        }
                        let want: Vec<f64> = b.f32().iter().map(|&x| x as f64).collect();
                        close(&at, a.f32(), &want, 1e-2);
                    }
                    // Against the engine.
                    if ranges == 0 {
                        let code = |x: f32, s: f32| lsq::code(x, s) as i8;
                        let cx: Vec<i8> = x.to_f32().f32().iter().map(|&x| code(x, 0.01)).collect();
                        let kept = w.f32().iter().zip(mask.u8()).map(|(&w, &m)| w * m as f32);
                        let cw: Vec<i8> =
                            kept.enumerate().map(|(i, w)| code(w, sw.f32()[i / width])).collect();
                        let scale: Vec<f32> = sw.f32().iter().map(|s| 0.01 * s).collect();
                        let weight = Int8Weight::new(&cw, out, width);
                        let ran = int8_linear::apply(&cx, tokens, &weight, &scale, Some(bias.f32()));
                        assert!(one[0] == ran.to_bf16().to_f32(), "the engine's: {tokens} x {out} x {width}");
                    }
                }
                device.check().unwrap();
            }
        }
    }

    /// `codes` with another value of the same gradient.
    fn cast_codes(tape: &Tape, codes: &Var, value: Tensor) -> Var {
        let codes = codes.clone();
        tape.push(value, &[&codes.clone()], move |grad, grads| grads.add(&codes, grad.clone()))
    }

    /// The parts' values, then the gradients of `leaves` where the parts' gradients are the columns of `grad`; f32 on
    /// the host.
    fn finish(tape: Tape, parts: Vec<Var>, leaves: Vec<Var>, grad: &Tensor) -> Vec<Tensor> {
        let mut first = 0;
        let terms = parts.iter().map(|p| {
            let (width, from) = (p.value().width(), first);
            first += width;
            let rows = grad.f32().chunks(grad.width()).flat_map(|row| row[from..from + width].to_vec());
            (1.0, super::super::weighted_sum::dot(&tape, p, &Tensor::from_f32(rows.collect(), p.shape())))
        });
        let loss = super::super::weighted_sum::weighted_sum(&tape, &terms.collect::<Vec<_>>());
        let mut grads = tape.backward(&loss);
        let values = parts.iter().map(|p| p.value().clone());
        let all: Vec<Tensor> = values.chain(leaves.iter().map(|v| grads.take(v).unwrap())).collect();
        all.iter().map(|t| t.to(Device::Cpu).to_f32()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_shape_agrees_with_the_engine(
            tokens in 1usize..40,
            out in 1usize..80,
            width in prop_oneof![1usize..200, 1usize..3000],
            extreme: bool,
            seed: u64,
        ) {
            agree(tokens, out, width, extreme, seed);
        }

        /// Both ends of a product must read the same codes.
        #[test]
        fn any_value_gets_the_engines_code(
            any in prop::collection::vec(any::<f32>(), 0..100),
            near in prop::collection::vec(-300.0f32..300.0, 0..100),
            ties in prop::collection::vec(-260i32..260, 0..100),
            scale in prop_oneof![1e-6f32..10.0, Just(0.5), Just(1.0), Just(f32::MIN_POSITIVE), Just(1e-40)],
        ) {
            let mut x = any;
            x.extend(near.iter().map(|v| v * scale));
            x.extend(ties.iter().map(|&t| t as f32 / 2.0 * scale));
            let mut codes = vec![99; x.len()];
            int8_linear::quantize(&x, scale, &mut codes);
            for (&x, &c) in x.iter().zip(&codes) {
                prop_assert_eq!(lsq::code(x, scale).to_bits(), f32::from(c).to_bits(), "{:e} / {:e}", x, scale);
            }
            for device in devices() {
                let tape = Tape::inference();
                let x = tape.constant(Tensor::from_f32(x.clone(), &[x.len()]).to(device));
                let scale = tape.constant(Tensor::scalar(scale).to(device));
                let trained = lsq::quantize_activation(&tape, &x, &scale).codes.value().to(Device::Cpu);
                for (t, &c) in trained.f32().iter().zip(&codes) {
                    prop_assert_eq!(t.to_bits(), f32::from(c).to_bits(), "{:?}", device);
                }
            }
        }
    }
}
