//! Linear maps as the engine holds them, grouped by the input they share, so that it is quantised once.

use std::collections::BTreeMap;

use gpusq_tensor::Tensor;
use gpusq_tensor::ops::int8_linear::{self, Int8Weight};
use gpusq_tensor::ops::{linear, lsq};

use crate::format::packed::{unpack_codes, unpack_f32};
use crate::params::{Params, Weight};
use crate::spec::{Linear, TransformerSpec};
use crate::{Error, Result};

/// Columns below which an i32 holds every sum of products of codes.
const COLS_LIMIT: usize = 131_072;

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

    /// The maps' outputs for the input `x` `[rows, width]`, each f32 `[rows, out]`. `codes` are those of `x`
    /// if the site has a scale.
    pub(super) fn apply(&self, x: &Tensor, codes: &[i8]) -> Vec<Tensor> {
        self.maps.iter().map(|m| m.apply(x, codes)).collect()
    }
}

impl Map {
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

/// A packed model's weights, checked against its specification as they are taken.
pub(super) struct Weights<'a> {
    params: &'a Params,
    shapes: BTreeMap<String, Vec<usize>>,
    linears: Vec<Linear>,
}

impl<'a> Weights<'a> {
    pub(super) fn new(spec: &TransformerSpec, params: &'a Params) -> Self {
        Weights { params, shapes: spec.weights().into_iter().collect(), linears: spec.linears() }
    }

    fn get(&self, name: &str) -> Result<&'a Weight> {
        self.params.get(name).ok_or_else(|| fail(name, "is missing"))
    }

    pub(super) fn dense(&self, name: &str) -> Result<Tensor> {
        let Weight::Dense(t) = self.get(name)? else {
            return Err(fail(name, "is packed where only a dense weight can be"));
        };
        self.fits(name, t.shape())?;
        Ok(t.clone())
    }

    fn fits(&self, name: &str, found: &[usize]) -> Result<()> {
        match self.shapes.get(name) {
            Some(want) if want != found => {
                Err(fail(name, &format!("has shape {found:?}; the specification asks for {want:?}")))
            }
            _ => Ok(()),
        }
    }

    /// A step size, if the model has it.
    fn step(&self, name: &str) -> Result<Option<f32>> {
        match self.params.get(name) {
            None => Ok(None),
            Some(Weight::Dense(t)) if t.len() == 1 && t.item() > 0.0 && t.item().is_finite() => {
                Ok(Some(t.item()))
            }
            Some(_) => Err(fail(name, "is not one positive step size")),
        }
    }

    /// The maps that read `input`.
    pub(super) fn site(&self, input: &str) -> Result<Site> {
        let readers: Vec<&Linear> = self.linears.iter().filter(|l| l.input == input).collect();
        let Some(first) = readers.first() else {
            return Err(fail(input, "is read by no linear map of the specification"));
        };
        let scale = self.step(&first.input_scale())?;
        let maps = readers.iter().map(|l| self.map(l, scale)).collect::<Result<Vec<_>>>()?;
        let codes = maps.iter().any(|m| matches!(m.product, Product::Int8 { .. }));
        Ok(Site { input: input.into(), scale: scale.filter(|_| codes), maps })
    }

    fn map(&self, l: &Linear, input_scale: Option<f32>) -> Result<Map> {
        let name = format!("{}.weight", l.name);
        let product = match self.get(&name)? {
            Weight::Packed(p) => {
                self.fits(&name, &[p.values.rows(), p.cols])?;
                match &p.scale {
                    None => Product::F32(unpack_f32(p)),
                    Some(steps) => {
                        let input = input_scale
                            .ok_or_else(|| fail(&l.input_scale(), "is missing though a weight is INT8"))?;
                        if l.cols >= COLS_LIMIT {
                            return Err(fail(&name, "is too wide for 32-bit sums of INT8 products"));
                        }
                        Product::Int8 {
                            weight: Int8Weight::new(&unpack_codes(p), l.rows, l.cols),
                            scale: steps.f32().iter().map(|s| input * s).collect(),
                        }
                    }
                }
            }
            Weight::Dense(_) => Product::F32(self.dense(&name)?),
            Weight::Masked { .. } | Weight::Fake { .. } => {
                return Err(fail(&name, "is not packed; pack the model"));
            }
        };
        let bias = l.bias.then(|| self.dense(&format!("{}.bias", l.name))).transpose()?;
        Ok(Map { product, bias, output_scale: self.step(&l.output_scale())?.map(Tensor::scalar) })
    }
}

fn fail(name: &str, what: &str) -> Error {
    Error::Mismatch(format!("weight `{name}` {what}"))
}
