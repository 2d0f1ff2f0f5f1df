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

pub use cpu::{code, square_error};
pub(crate) use cuda::SOURCE;

use std::cell::RefCell;
use std::rc::Rc;

use crate::cuda::Gpu;
use crate::cuda::reduce::Sums;
use crate::{DType, Device, Tape, Tensor, Var};

/// Largest code. The grid is symmetric, so -128 is no code.
pub const QMAX: f32 = 127.0;

/// Codes with the step size that makes values of them.
#[derive(Clone)]
pub struct Quantized {
    /// Integers -127..=127 held as f32 or bf16; of weights, as i8 where there are `values`. **Its gradient is that of the
    /// dequantised value** `code * scale`.
    pub codes: Var,
    /// f32 `[1]` (one step for the tensor) or `[rows]` (one for each row).
    pub scale: Tensor,
    /// An activation's codes as i8 too, where tensor cores multiply these.
    bytes: Option<Tensor>,
    /// A weight's values `code * scale` in bf16, where its codes are i8.
    values: Option<Tensor>,
}

impl Quantized {
    /// These codes with this step size.
    pub fn new(codes: Var, scale: Tensor) -> Self {
        Quantized { codes, scale, bytes: None, values: None }
    }

    /// An activation's codes with their bytes where [`takes_bytes`] says so.
    pub(crate) fn with_bytes(codes: Var, scale: Tensor, bytes: Option<Tensor>) -> Self {
        Quantized { bytes, ..Quantized::new(codes, scale) }
    }

    /// The codes as i8 and, of a weight, its values, for [`super::linear::quantized_linear`].
    pub(crate) fn small(&self) -> Option<(&Tensor, Option<&Tensor>)> {
        match self.codes.value().dtype() {
            DType::I8 => Some((self.codes.value(), self.values.as_ref())),
            _ => self.bytes.as_ref().map(|bytes| (bytes, None)),
        }
    }
}

/// Whether codes of rows of `width`, with activations of type `element`, are multiplied as i8 by the tensor cores of
/// `device`.
pub fn takes_bytes(device: Device, element: DType, width: usize) -> bool {
    matches!(device, Device::Cuda(gpu) if gpu.is_hopper())
        && element == DType::Bf16
        && width.is_multiple_of(16)
}

/// Quantises a tensor with one positive step size `scale` `[1]`.
pub fn quantize_activation(tape: &Tape, x: &Var, scale: &Var) -> Quantized {
    let value = x.value();
    let (codes, bytes) = match value.device() {
        Device::Cpu => (cpu::codes(value, scale.value().item()), None),
        device @ Device::Cuda(gpu) => {
            cuda::codes(gpu, value, scale.value(), takes_bytes(device, value.dtype(), value.width()))
        }
    };
    Quantized::with_bytes(with_gradient(tape, codes, x, scale), scale.value().clone(), bytes)
}

/// Quantises and dequantises a tensor with one step size: the pair after a layer (paper, figure 2).
pub fn fake_quantize(tape: &Tape, x: &Var, scale: &Var) -> Var {
    with_gradient(tape, dequantised(x.value(), scale.value()), x, scale)
}

/// What the gradient of a step size is divided by that `n` elements of `tape`'s part of a batch share.
pub(crate) fn divisor(tape: &Tape, n: usize) -> f32 {
    (tape.part().all(n) as f32 * QMAX).sqrt()
}

/// Records `y`, made of `x` with one step size, with the gradients of the module's documentation.
fn with_gradient(tape: &Tape, y: Tensor, x: &Var, scale: &Var) -> Var {
    let (x2, s2) = (x.clone(), scale.clone());
    let divisor = divisor(tape, x.value().len());
    tape.push(y, &[x, scale], move |grad, grads| match grad.device() {
        Device::Cpu => {
            let (dx, ds) = cpu::backward(grad, x2.value(), s2.value().item(), divisor);
            grads.add(&x2, dx);
            grads.add(&s2, ds);
        }
        Device::Cuda(gpu) => {
            let mut unwanted = None;
            let sum = grads.slot(&x2).unwrap_or(&mut unwanted);
            let ds = cuda::backward(gpu, grad, x2.value(), s2.value(), divisor, sum);
            grads.add_sums(&s2, ds);
        }
    })
}

/// What a linear map's fused output pair hands back: of `x` `[.., width]`, dequantised with one of `scales` for each
/// `width / scales.len()` columns, and the gradient of the result: the gradient of `x`, its column sums, and the
/// gradients of the step sizes. On a GPU.
pub(crate) fn ranges_backward(
    gpu: Gpu,
    grad: &Tensor,
    x: &Tensor,
    scales: &[&Tensor],
    divisor: f32,
) -> (Tensor, Sums, Vec<Sums>) {
    cuda::ranges_backward(gpu, grad, x, scales, divisor)
}

/// [`fake_quantize`] without a tape: the grid point of step size `scale` `[1]` nearest to each element.
pub fn dequantised(x: &Tensor, scale: &Tensor) -> Tensor {
    match x.device() {
        Device::Cpu => cpu::dequantised(x, scale.item()),
        Device::Cuda(gpu) => cuda::dequantised(gpu, x, scale),
    }
}

/// A pruned weight `[rows, cols]` and its quantisation.
#[derive(Clone)]
pub struct FakeWeight {
    /// f32.
    pub weight: Var,
    /// u8, 1 for kept elements.
    pub mask: Tensor,
    /// One positive step size per row, f32 `[rows]`.
    pub scale: Var,
}

/// Quantises each weight times its mask, and puts the rows of each of `groups` one below the other: on a GPU in one
/// launch. On a CPU a group is one weight. The codes are of type `element`, f32 or, on a GPU, bf16, which holds them
/// exactly, or i8 (see [`Quantized`]); gradients are f32.
pub fn quantize_weights(tape: &Tape, groups: &[Vec<FakeWeight>], element: DType) -> Vec<Quantized> {
    for w in groups.iter().flatten() {
        assert_eq!(w.weight.shape(), w.mask.shape(), "quantize_weights: mask");
        assert_eq!(w.scale.value().len(), w.weight.shape()[0], "quantize_weights: one scale per row");
    }
    let Some(first) = groups.iter().flatten().next() else { return Vec::new() };
    match first.weight.value().device() {
        Device::Cpu => {
            assert_eq!(element, DType::F32, "a CPU computes in f32");
            groups.iter().map(|group| quantize_on_cpu(tape, group)).collect()
        }
        Device::Cuda(gpu) => {
            let (weights, made) = cuda::weight_codes(gpu, groups, element);
            let groups: Rc<[Vec<FakeWeight>]> = groups.into();
            // The gradients of all codes are collected and turned into the weights' at once, by a node that comes after
            // those of the groups: it has no elements, and so has its gradient.
            let collected = Rc::new(RefCell::new(vec![None; groups.len()]));
            let inputs: Vec<&Var> = groups.iter().flatten().flat_map(|w| [&w.weight, &w.scale]).collect();
            let (all, of_codes) = (groups.clone(), collected.clone());
            let together = tape.push(Tensor::zeros(&[0]), &inputs, move |_, grads| {
                let mut of_codes = of_codes.take();
                let of_steps = cuda::weight_backward(gpu, &mut of_codes, &weights, element);
                for ((group, dw), ds) in all.iter().zip(of_codes).zip(of_steps) {
                    let (Some(dw), Some(ds)) = (dw, ds) else { continue };
                    let shapes = |of: fn(&FakeWeight) -> &Var| -> Vec<Vec<usize>> {
                        group.iter().map(|w| of(w).shape().to_vec()).collect()
                    };
                    let (dw, ds) = (dw.split(&shapes(|w| &w.weight)), ds.split(&shapes(|w| &w.scale)));
                    for ((w, dw), ds) in group.iter().zip(dw).zip(ds) {
                        grads.add(&w.weight, dw);
                        grads.add(&w.scale, ds);
                    }
                }
            });
            let pushed = made.into_iter().enumerate().map(|(which, (codes, values, scale))| {
                let (together, collected) = (together.clone(), collected.clone());
                let codes = tape.push_owned(codes, &[&together.clone()], move |grad, grads| {
                    collected.borrow_mut()[which] = Some(grad);
                    grads.add(&together, Tensor::zeros(&[0]));
                });
                Quantized { values, ..Quantized::new(codes, scale) }
            });
            pushed.collect()
        }
    }
}

fn quantize_on_cpu(tape: &Tape, group: &[FakeWeight]) -> Quantized {
    let [w] = group else { panic!("a CPU quantises weights one by one") };
    let w = w.clone();
    let codes = cpu::weight_codes(w.weight.value(), &w.mask, w.scale.value());
    let scale = w.scale.value().clone();
    let codes = tape.push(codes, &[&w.weight.clone(), &w.scale.clone()], move |grad, grads| {
        let (dw, ds) = cpu::weight_backward(grad, w.weight.value(), &w.mask, w.scale.value());
        grads.add(&w.weight, dw);
        grads.add(&w.scale, ds);
    });
    Quantized::new(codes, scale)
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
            let fake = FakeWeight { weight: wv.clone(), mask: mask.to(device), scale: sv.clone() };
            let q = quantize_weights(&tape, &[vec![fake]], DType::F32).remove(0);
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
