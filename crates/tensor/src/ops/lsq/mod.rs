//! Learned step size quantisation to INT8 (Esser et al. 2020, arXiv 1902.08153): symmetric codes
//! -127..=127, round half to even, no zero point.
//!
//! `code = clamp(round(x / s), -127, 127)`. Backward, with `g` the gradient of the dequantised value
//! `code * s`: `dx = g` inside the range and 0 outside (straight-through); `ds = g * (code - x / s)`
//! inside and `g * code` outside, summed over the `n` elements that share `s` and scaled by
//! `1 / sqrt(n * 127)` (section 2.2 there). Of an activation, `n` counts the elements of the whole batch, also on a tape
//! that computes a part of it.

mod cpu;
mod cuda;

pub use cpu::code;
#[cfg(test)]
pub(crate) use cuda::SOURCE;

use crate::{DType, Device, Tape, Tensor, Var};

/// Largest code. The grid is symmetric, so -128 is no code.
pub const QMAX: f32 = 127.0;

/// Codes with the step size that makes values of them.
#[derive(Clone)]
pub struct Quantized {
    /// Integers -127..=127 held as f32 or bf16. **Its gradient is that of the dequantised value** `code * scale`.
    pub codes: Var,
    /// f32 `[1]` (one step for the tensor) or `[rows]` (one for each row).
    pub scale: Tensor,
}

/// Quantises a tensor with one positive step size `scale` `[1]`.
pub fn quantize_activation(tape: &Tape, x: &Var, scale: &Var) -> Quantized {
    let codes = match x.value().device() {
        Device::Cpu => cpu::codes(x.value(), scale.value().item()),
        Device::Cuda(gpu) => cuda::codes(gpu, x.value(), scale.value()),
    };
    Quantized { codes: with_gradient(tape, codes, x, scale), scale: scale.value().clone() }
}

/// Quantises and dequantises a tensor with one step size: the pair after a layer (paper, figure 2).
pub fn fake_quantize(tape: &Tape, x: &Var, scale: &Var) -> Var {
    with_gradient(tape, dequantised(x.value(), scale.value()), x, scale)
}

/// Records `y`, made of `x` with one step size, with the gradients of the module's documentation.
fn with_gradient(tape: &Tape, y: Tensor, x: &Var, scale: &Var) -> Var {
    let (x2, s2) = (x.clone(), scale.clone());
    let divisor = (tape.part().all(x.value().len()) as f32 * QMAX).sqrt();
    tape.push(y, &[x, scale], move |grad, grads| {
        let (dx, ds) = match grad.device() {
            Device::Cpu => cpu::backward(grad, x2.value(), s2.value().item(), divisor),
            Device::Cuda(gpu) => cuda::backward(gpu, grad, x2.value(), s2.value(), divisor),
        };
        grads.add(&x2, dx);
        grads.add(&s2, ds);
    })
}

/// [`fake_quantize`] without a tape: the grid point of step size `scale` `[1]` nearest to each element.
pub fn dequantised(x: &Tensor, scale: &Tensor) -> Tensor {
    match x.device() {
        Device::Cpu => cpu::dequantised(x, scale.item()),
        Device::Cuda(gpu) => cuda::dequantised(gpu, x, scale),
    }
}

/// Quantises `weight * mask` (`[rows, cols]`, mask u8) with one positive step size per row, `scale` `[rows]`.
/// The codes are of type `element`: f32 or, on a GPU, bf16, which holds them exactly; gradients are f32.
pub fn quantize_weight(tape: &Tape, weight: &Var, mask: &Tensor, scale: &Var, element: DType) -> Quantized {
    assert_eq!(weight.shape(), mask.shape(), "quantize_weight: mask");
    assert_eq!(scale.value().len(), weight.shape()[0], "quantize_weight: one scale per row");
    let codes = match weight.value().device() {
        Device::Cpu => {
            assert_eq!(element, DType::F32, "a CPU computes in f32");
            cpu::weight_codes(weight.value(), mask, scale.value())
        }
        Device::Cuda(gpu) => cuda::weight_codes(gpu, weight.value(), mask, scale.value(), element),
    };
    let (w2, s2, mask) = (weight.clone(), scale.clone(), mask.clone());
    let codes = tape.push(codes, &[weight, scale], move |grad, grads| {
        let (dw, ds) = match grad.device() {
            Device::Cpu => cpu::weight_backward(grad, w2.value(), &mask, s2.value()),
            Device::Cuda(gpu) => cuda::weight_backward(gpu, grad, w2.value(), &mask, s2.value()),
        };
        grads.add(&w2, dw);
        grads.add(&s2, ds);
    });
    Quantized { codes, scale: scale.value().clone() }
}

#[cfg(test)]
mod tests {
    use super::super::check::{close, devices, noise};
    use super::super::weighted_sum::dot;
    use super::*;
    use crate::Part;

    #[test]
    fn codes_round_half_to_even_and_clip() {
        let x = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9, -1e9, 0.0, f32::NAN];
        let want = [0.0, 2.0, 2.0, 0.0, -2.0, 126.0, 127.0, 127.0, -127.0, 0.0, 0.0];
        for (x, want) in x.iter().zip(want) {
            assert_eq!(code(*x, 1.0), want, "{x}");
            assert!(code(*x, 1.0).to_bits() != (-0.0f32).to_bits(), "no negative zero from {x}");
        }
        let t = Tensor::from_f32(x.to_vec(), &[11]);
        // Every one of these but 1e9 is a bf16 too.
        for (device, t) in devices().into_iter().flat_map(|d| [(d, t.clone()), (d, t.to_bf16())]) {
            if device == Device::Cpu && t.dtype() == DType::Bf16 {
                continue;
            }
            let tape = Tape::inference();
            let (x, s) = (tape.constant(t.to(device)), tape.constant(Tensor::scalar(1.0).to(device)));
            let codes = quantize_activation(&tape, &x, &s).codes.value().to(Device::Cpu).to_f32();
            assert_eq!(codes.f32().iter().map(|c| c.to_bits()).collect::<Vec<_>>(), want.map(f32::to_bits));
        }
    }

    /// Every tie, the floats beside it, and a sweep: the code is the library's round half to even.
    #[test]
    fn rounding_is_the_librarys() {
        let ties = (-260..=260).map(|i| i as f32 * 0.5);
        let beside = ties.flat_map(|t| [t.next_down(), t, t.next_up()]);
        let sweep = (0..200_000u32).map(|i| (i as f32 - 1e5) * 1.3e-3);
        for x in beside.chain(sweep) {
            let want = x.round_ties_even().clamp(-127.0, 127.0);
            assert_eq!(code(x, 1.0).to_bits(), (want + 0.0).to_bits(), "{x}");
        }
    }

    #[test]
    fn division_is_not_by_a_reciprocal() {
        // The two differ only near ties, so the inputs lie near ties.
        let mut differing = 0;
        for i in 1..2000u16 {
            let (x, s) = (f32::from(i) * 0.05, 0.1f32 + f32::from(i % 7) * 0.03);
            let exact = (x / s).round_ties_even().clamp(-127.0, 127.0);
            differing += usize::from(exact != (x * (1.0 / s)).round_ties_even().clamp(-127.0, 127.0));
            assert_eq!(code(x, s), exact);
        }
        assert!(differing > 0, "the inputs no longer tell the two apart");
    }

    #[test]
    fn gradients_of_parts_of_a_batch_sum_to_that_of_the_whole() {
        let (x, w) = (noise(&[5, 6], 1), noise(&[5, 6], 2));
        let of = |tape: Tape, first: usize, count: usize, device: Device| {
            let rows =
                |t: &Tensor| Tensor::from_f32(t.f32()[first * 6..(first + count) * 6].to_vec(), &[count, 6]);
            let (xv, sv) = (tape.leaf(rows(&x).to(device)), tape.leaf(Tensor::scalar(0.01).to(device)));
            let loss = dot(&tape, &fake_quantize(&tape, &xv, &sv), &rows(&w));
            tape.backward(&loss).take(&sv).unwrap().item() as f64
        };
        for device in devices() {
            let part = |first, count| {
                of(Tape::recording().of_part(Part { first, count, of: 5 }), first, count, device)
            };
            let whole = of(Tape::recording(), 0, 5, device);
            close("step size", &[(part(0, 2) + part(2, 1) + part(3, 2)) as f32], &[whole], 1e-5);
        }
    }

    /// The straight-through gradient and Esser's step-size gradient, element by element.
    #[test]
    fn gradients_follow_the_paper() {
        let x = [0.3f32, -0.74, 5.0, -5.0, 0.01];
        let s = 0.03f32;
        let w = noise(&[5], 3);
        for device in devices() {
            let tape = Tape::recording();
            let (xv, sv) = (
                tape.leaf(Tensor::from_f32(x.to_vec(), &[5]).to(device)),
                tape.leaf(Tensor::scalar(s).to(device)),
            );
            let q = fake_quantize(&tape, &xv, &sv);
            let loss = dot(&tape, &q, &w);
            let mut grads = tape.backward(&loss);
            let (mut dx, mut ds) = (Vec::new(), 0.0f64);
            for (&x, &g) in x.iter().zip(w.f32()) {
                let (v, g) = ((x / s) as f64, g as f64);
                let inside = v.abs() <= 127.0;
                dx.push(if inside { g } else { 0.0 });
                ds += g * if inside { v.round_ties_even() - v } else { 127.0 * v.signum() };
            }
            close("dx", grads.take(&xv).unwrap().to(Device::Cpu).f32(), &dx, 1e-6);
            close(
                "ds",
                grads.take(&sv).unwrap().to(Device::Cpu).f32(),
                &[ds / (5.0f64 * 127.0).sqrt()],
                1e-5,
            );
        }
    }

    #[test]
    fn weight_gradients_are_per_row_and_masked() {
        let w = noise(&[2, 4], 5);
        let mask = Tensor::from_u8(vec![1, 0, 1, 0, 0, 1, 1, 0], &[2, 4]);
        let scale = [0.004f32, 0.02];
        let weights = noise(&[2, 4], 6);
        for device in devices() {
            let tape = Tape::recording();
            let (wv, sv) =
                (tape.leaf(w.to(device)), tape.leaf(Tensor::from_f32(scale.to_vec(), &[2]).to(device)));
            let q = quantize_weight(&tape, &wv, &mask.to(device), &sv, DType::F32);
            let loss = dot(&tape, &q.codes, &weights);
            let mut grads = tape.backward(&loss);
            let (mut dw, mut ds) = (vec![0.0f64; 8], vec![0.0f64; 2]);
            for i in 0..8 {
                let (s, g) = (scale[i / 4], weights.f32()[i] as f64);
                let v = (w.f32()[i] * mask.u8()[i] as f32 / s) as f64;
                let c = v.round_ties_even().clamp(-127.0, 127.0);
                assert_eq!(q.codes.value().to(Device::Cpu).f32()[i] as f64, c);
                let inside = v.abs() <= 127.0;
                dw[i] = if inside && mask.u8()[i] == 1 { g } else { 0.0 };
                ds[i / 4] += g * if inside { c - v } else { c };
            }
            let n = (4.0f64 * 127.0).sqrt();
            close("dw", grads.take(&wv).unwrap().to(Device::Cpu).f32(), &dw, 1e-6);
            close("ds", grads.take(&sv).unwrap().to(Device::Cpu).f32(), &[ds[0] / n, ds[1] / n], 1e-5);
        }
    }
}
