//! A packed model's weights, checked against its specification as they are taken.

use std::collections::BTreeMap;

use gpusq_tensor::Tensor;

use crate::params::{Params, Weight};
use crate::spec::{Linear, TransformerSpec};
use crate::{Error, Result};

/// Columns below which an i32 holds every sum of products of codes.
const COLS_LIMIT: usize = 131_072;

/// An input and the linear maps that read it, as the model holds them.
pub(super) struct Readers<'a> {
    /// Name of the input.
    pub(super) input: String,
    /// Step size of the input, if a map needs codes.
    pub(super) step: Option<f32>,
    /// In the order of the specification.
    pub(super) maps: Vec<Stored<'a>>,
}

/// One linear map.
pub(super) struct Stored<'a> {
    /// Packed or dense, of the specification's shape.
    pub(super) weight: &'a Weight,
    pub(super) bias: Option<Tensor>,
    /// Step size of the pair of quantisation after the map, if there is one.
    pub(super) output_step: Option<f32>,
}

impl Stored<'_> {
    /// How many outputs it has.
    pub(super) fn rows(&self) -> usize {
        match self.weight {
            Weight::Packed(p) => p.values.rows(),
            Weight::Dense(t) | Weight::Masked { value: t, .. } | Weight::Fake { value: t, .. } => t.rows(),
        }
    }

    /// Whether its product is one of INT8 codes.
    pub(super) fn integer(&self) -> bool {
        matches!(self.weight, Weight::Packed(p) if p.scale.is_some())
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
    pub(super) fn readers(&self, input: &str) -> Result<Readers<'a>> {
        let linears: Vec<&Linear> = self.linears.iter().filter(|l| l.input == input).collect();
        let Some(first) = linears.first() else {
            return Err(fail(input, "is read by no linear map of the specification"));
        };
        let step = self.step(&first.input_scale())?;
        let maps = linears.iter().map(|l| self.stored(l, step)).collect::<Result<Vec<_>>>()?;
        let codes = maps.iter().any(Stored::integer);
        Ok(Readers { input: input.into(), step: step.filter(|_| codes), maps })
    }

    fn stored(&self, l: &Linear, input_step: Option<f32>) -> Result<Stored<'a>> {
        let name = format!("{}.weight", l.name);
        let weight = self.get(&name)?;
        match weight {
            Weight::Packed(p) => {
                self.fits(&name, &[p.values.rows(), p.cols])?;
                if p.scale.is_some() && input_step.is_none() {
                    return Err(fail(&l.input_scale(), "is missing though a weight is INT8"));
                }
                if p.scale.is_some() && l.cols >= COLS_LIMIT {
                    return Err(fail(&name, "is too wide for 32-bit sums of INT8 products"));
                }
            }
            Weight::Dense(t) => self.fits(&name, t.shape())?,
            Weight::Masked { .. } | Weight::Fake { .. } => {
                return Err(fail(&name, "is not packed; pack the model"));
            }
        }
        let bias = l.bias.then(|| self.dense(&format!("{}.bias", l.name))).transpose()?;
        Ok(Stored { weight, bias, output_step: self.step(&l.output_scale())? })
    }
}

fn fail(name: &str, what: &str) -> Error {
    Error::Mismatch(format!("weight `{name}` {what}"))
}
