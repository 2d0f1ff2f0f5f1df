//! INT8 codes of f16 activations, for maps whose input no other kernel quantises on its way. For GPUs; codes are
//! [`super::lsq`]'s.

mod cuda;

#[cfg(test)]
pub(crate) use cuda::variants;

use super::activation::Activation;
use crate::{DType, Device, Tensor};

/// Where a kernel writes INT8 codes beside or instead of f16.
#[derive(Clone, Copy, Debug)]
pub struct Codes<'a> {
    /// i8, one for each element.
    pub to: &'a Tensor,
    /// The step size they are multiples of.
    pub step: f32,
}

impl Codes<'_> {
    pub(crate) fn check(&self, what: &str, shape: &[usize]) {
        assert_eq!((self.to.dtype(), self.to.shape()), (DType::I8, shape), "{what}: codes");
        assert!(self.step > 0.0, "{what}: step size {}", self.step);
    }
}

/// Codes of `function(x)`, `x` f16. Panics where the shapes differ.
pub fn quantize(x: &Tensor, function: Option<Activation>, codes: Codes) {
    assert_eq!(x.dtype(), DType::F16, "quantize {x:?}");
    codes.check("quantize", x.shape());
    match x.device() {
        Device::Cpu => panic!("quantize: {x:?} is not on a GPU"),
        Device::Cuda(gpu) => cuda::quantize(gpu, x, function, codes),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{devices, noise};
    use super::*;
    use crate::ops::{activation, lsq};

    /// Codes on a GPU are those of the CPU engine: the same grid, ties and ends included.
    #[test]
    fn codes_are_the_grids() {
        let step = 0.037f32;
        let mut x = noise(&[3, 1111], 5).f32().iter().map(|v| v * 4.0).collect::<Vec<f32>>();
        x[..8].copy_from_slice(&[
            0.0,
            -0.0,
            60000.0,
            -60000.0,
            0.5 * step,
            -1.5 * step,
            127.5 * step,
            2.5 * step,
        ]);
        let x = Tensor::from_f32(x, &[3, 1111]).to_f16();
        for gpu in devices().into_iter().filter(|d| *d != Device::Cpu) {
            for function in [None, Some(Activation::Relu), Some(Activation::Gelu), Some(Activation::Tanh)] {
                let to = Tensor::from_i8(vec![99; x.len()], x.shape()).to(gpu);
                quantize(&x.to(gpu), function, Codes { to: &to, step });
                let y = function.map_or(x.to_f32(), |f| activation::apply(&x.to_f32(), f));
                let got = to.to(Device::Cpu);
                let mut near = 0;
                for (i, (&code, &y)) in got.i8().iter().zip(y.f32()).enumerate() {
                    let want = lsq::code(y, step) as i32;
                    // The function itself may differ in its last bits, and so near a tie the code by one.
                    near += (code as i32 != want) as usize;
                    assert!(
                        (code as i32 - want).abs() <= function.is_some() as i32,
                        "{function:?} [{i}] {y}: {code}"
                    );
                }
                assert!(near <= 2, "{near} codes differ under {function:?}");
                gpu.check().unwrap();
            }
        }
    }

    #[test]
    fn the_reciprocal_gives_what_a_division_gives() {
        // Every f16 and many steps, among them those whose reciprocal rounds badly.
        let x = Tensor::from_f16(
            (0..=u16::MAX).map(crate::f16::from_bits).filter(|x| !x.is_nan()).collect(),
            &[63490],
        );
        for gpu in devices().into_iter().filter(|d| *d != Device::Cpu) {
            for k in 0..40u32 {
                let step = f32::from_bits(0x3C00_0000 + k * 0x0006_1E47);
                let to = Tensor::from_i8(vec![99; x.len()], x.shape()).to(gpu);
                quantize(&x.to(gpu), None, Codes { to: &to, step });
                let want: Vec<i8> = x.to_f32().f32().iter().map(|&x| lsq::code(x, step) as i8).collect();
                assert_eq!(to.to(Device::Cpu).i8(), want, "step {step}");
            }
            gpu.check().unwrap();
        }
    }
}
