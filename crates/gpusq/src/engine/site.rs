//! Linear maps as a CPU runs them, grouped by the input they share, so that it is quantised once.

use gpusq_tensor::Tensor;
use gpusq_tensor::ops::int8_linear::{self, Int8Weight};
use gpusq_tensor::ops::{linear, lsq};

use crate::format::packed::{unpack_codes, unpack_f32};
use crate::params::Weight;

use super::weights::{Readers, Stored};

/// An input and the maps that read it.
pub(super) struct Site {
    input: String,
    /// Step size of the input, if a map needs codes.
    scale: Option<f32>,
    maps: Vec<Map>,
}

struct Map {
    product: Product,
    bias: Option<Tensor>,
    /// f32 `[1]`
    output_scale: Option<Tensor>,
}

enum Product {
    /// `scale` is the input's times the weight row's.
    Int8 {
        weight: Int8Weight,
        scale: Vec<f32>,
    },
    F32(Tensor),
}

impl Site {
    /// The maps in the layout of this CPU.
    pub(super) fn new(readers: Readers) -> Site {
        let maps = readers.maps.into_iter().map(|m| Map::new(m, readers.step)).collect();
        Site { input: readers.input, scale: readers.step, maps }
    }

    /// Name of the input.
    pub(super) fn input(&self) -> &str {
        &self.input
    }

    /// Step size of the codes the maps read; `None` if none reads codes.
    pub(super) fn scale(&self) -> Option<f32> {
        self.scale
    }

    /// Whether all maps are integer products.
    pub(super) fn integer(&self) -> bool {
        self.maps.iter().all(|m| matches!(m.product, Product::Int8 { .. }))
    }

    /// Step sizes of the outputs of the three maps that an attention begins with, if all are quantised.
    pub(super) fn output_steps(&self) -> Option<[Tensor; 3]> {
        let steps: Vec<Tensor> = self.maps.iter().filter_map(|m| m.output_scale.clone()).collect();
        steps.try_into().ok()
    }

    /// The maps' outputs for the input `x` `[rows, width]`, each f32 `[rows, out]`. `codes` are those of `x`
    /// if the site has a scale.
    pub(super) fn apply(&self, x: &Tensor, codes: &[i8]) -> Vec<Tensor> {
        self.maps.iter().map(|m| m.apply(x, codes)).collect()
    }
}

impl Map {
    fn new(stored: Stored, input_step: Option<f32>) -> Map {
        let product = match stored.weight {
            Weight::Packed(p) => match (&p.scale, input_step) {
                (Some(steps), Some(input)) => Product::Int8 {
                    weight: Int8Weight::new(&unpack_codes(p), p.values.rows(), p.cols),
                    scale: steps.f32().iter().map(|s| input * s).collect(),
                },
                _ => Product::F32(unpack_f32(p)),
            },
            Weight::Dense(t) => Product::F32(t.clone()),
            Weight::Masked { .. } | Weight::Fake { .. } => unreachable!("refused when the weights were read"),
        };
        Map { product, bias: stored.bias, output_scale: stored.output_step.map(Tensor::scalar) }
    }

    fn apply(&self, x: &Tensor, codes: &[i8]) -> Tensor {
        let bias = self.bias.as_ref();
        let y = match &self.product {
            Product::Int8 { weight, scale } => {
                int8_linear::apply(codes, x.rows(), weight, scale, bias.map(Tensor::f32))
            }
            Product::F32(weight) => linear::apply(x, weight, bias),
        };
        match &self.output_scale {
            Some(s) => lsq::dequantised(&y, s),
            None => y,
        }
    }
}
