//! Linear maps on a GPU: from packed weights to launches.

use std::fmt;
use std::sync::OnceLock;

use gpusq_tensor::cuda::Gpu;
use gpusq_tensor::ops::activation::Activation;
use gpusq_tensor::ops::codes::Codes;
use gpusq_tensor::ops::norm_codes::{Out, Summand, add_norm};
use gpusq_tensor::ops::sparse_linear::{
    self, AddNorm, Epilogue, Kernel, NormedKernel, Store, Weight, kernels, normed_kernels, sparse_linear,
    sparse_linear_norm,
};
use gpusq_tensor::ops::{dense_linear, half_linear, lsq};
use gpusq_tensor::{DType, Device, Tensor};

use super::network::Normal;
use crate::engine::Products;
use crate::engine::weights::Readers;
use crate::format::packed::{unpack_codes, unpack_f32};
use crate::params;
use crate::{Error, Result};

/// A linear map.
#[expect(clippy::large_enum_variant, reason = "there are few, and each lives as long as the model")]
pub(super) enum Map {
    /// Of INT8 codes.
    Codes(CodesMap),
    /// Of f16 numbers, with a bias and perhaps a function.
    Half { weight: Tensor, bias: Tensor, function: Option<Activation> },
    /// Of f16 numbers to f32 outputs, which may be few.
    Last { weight: Tensor, bias: Option<Tensor> },
}

/// An INT8 weight, and what becomes of the sums.
pub(super) struct CodesMap {
    pub(super) weight: Weight,
    /// What the weight was packed from.
    pub(super) stored: Vec<params::Packed>,
    /// The same codes without the sparsity, where a plan wants them.
    pub(super) dense: OnceLock<Weight>,
    pub(super) epilogue: Epilogue,
}

/// A map, the residual that is added, and the norm behind it.
pub(super) struct Normed {
    pub(super) map: Map,
    /// Step size of what the map gives, where that is codes.
    pub(super) pair: Option<f32>,
    pub(super) norm: Normal,
}

/// Kernels with a norm in them that are worth timing.
const NORMED: usize = 5;

/// Hidden states, which are a norm's residual and what it overwrites, and the codes that are made of them.
#[derive(Clone, Copy)]
pub(super) struct States<'a> {
    pub(super) hidden: &'a Tensor,
    pub(super) codes: Option<Codes<'a>>,
}

/// What a plan finds kernels for: an INT8 map, with the norm behind it where one kernel may do both.
#[derive(Clone, Copy)]
pub(super) struct Step<'a> {
    pub(super) map: &'a CodesMap,
    pub(super) normed: Option<&'a Normed>,
}

/// What computes a step.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// The map's kernel; a norm behind has one of its own.
    Map(Kernel),
    /// Both in one.
    Normed(NormedKernel),
}

/// The kernel of one step.
#[derive(Clone, Copy)]
pub(super) struct Choice {
    pub(super) way: Way,
    pub(super) sparse: bool,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Way::Map(kernel) => kernel.fmt(f),
            Way::Normed(kernel) => kernel.fmt(f),
        }
    }
}

impl Step<'_> {
    /// What can compute it for so many rows with this form of its weight, the likely fastest first; at most so many, and as
    /// many with the norm in them, which come first: they are for few rows alone.
    pub(super) fn ways(&self, w: &Weight, rows: usize, most: usize) -> Vec<Way> {
        let normed = self.normed.map(|_| normed_kernels(w, rows)).unwrap_or_default();
        let own = kernels(w, rows).into_iter().take(most).map(Way::Map);
        normed.into_iter().take(most.min(NORMED)).map(Way::Normed).chain(own).collect()
    }

    /// Asks for the map of `x`, in this form of its weight, to `out`; where there is a norm behind, for the `states` after it,
    /// and what `out` holds then depends on the way.
    pub(super) fn launch(&self, way: Way, w: &Weight, x: &Tensor, out: &mut Tensor, states: States) {
        let e = &self.map.epilogue;
        match (way, self.normed) {
            (Way::Map(kernel), normed) => {
                sparse_linear(&kernel, x, w, e, out);
                if let Some(normed) = normed {
                    normed.add(out, states);
                }
            }
            (Way::Normed(kernel), Some(Normed { pair, norm, .. })) => {
                // No kernel asks for the step of what are no codes.
                let (pair, norm) = (pair.unwrap_or(1.0), norm.of());
                let then = AddNorm { pair, residual: states.hidden, norm, out: states.out() };
                sparse_linear_norm(&kernel, x, w, e, then);
            }
            (Way::Normed(kernel), None) => unreachable!("{kernel} where there is no norm"),
        }
    }
}

impl<'a> States<'a> {
    fn out(self) -> Out<'a> {
        Out { hidden: Some(self.hidden), codes: self.codes }
    }
}

/// Compiles, on all threads, what these launch.
pub(super) fn prepare(all: &[(Way, &Weight, Step)]) {
    let (mut own, mut normed) = (Vec::new(), Vec::new());
    for &(way, w, Step { map, normed: behind }) in all {
        match way {
            Way::Map(kernel) => own.push((kernel, w, &map.epilogue)),
            Way::Normed(kernel) => {
                let behind = behind.expect("this kernel is offered where there is a norm");
                normed.push((kernel, w, &map.epilogue, behind.norm.of()));
            }
        }
    }
    sparse_linear::prepare(&own);
    sparse_linear::prepare_normed(&normed);
}

/// The last map. 32-bit sums are scaled on the host, as the CPU engine does it.
pub(super) struct Final {
    pub(super) map: Map,
    pub(super) outputs: usize,
    /// Of sums; f32 outputs are what they are.
    pub(super) scale: Option<Vec<f32>>,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) pair: Option<f32>,
}

pub(super) fn unsupported(what: &str) -> Error {
    Error::Mismatch(format!("the engine does not run models with {what} on a GPU; --device cpu does"))
}

/// Several packed INT8 weights that read one input as one, on the GPU.
pub(super) struct Joined {
    pub(super) weight: Weight,
    pub(super) stored: Vec<params::Packed>,
    pub(super) scale: Vec<f32>,
    pub(super) bias: Option<Vec<f32>>,
    /// Step size of each map's output pair, and how many outputs it has.
    pub(super) pairs: Option<Vec<(f32, usize)>>,
    /// Step size of the input.
    pub(super) step: f32,
}

impl Joined {
    pub(super) fn new(gpu: Gpu, readers: &Readers) -> Result<Joined> {
        let Some(step) = readers.step.filter(|_| readers.maps.iter().all(|m| m.integer())) else {
            let message = format!("`{}`, whose weights are not INT8,", readers.input);
            return Err(unsupported(&message));
        };
        let (mut values, mut meta, mut scale, mut bias) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut rows, mut cols, mut stored) = (0, 0, Vec::new());
        for map in &readers.maps {
            let params::Weight::Packed(p) = map.weight else { unreachable!("checked above") };
            let steps = p.scale.as_ref().expect("checked above");
            values.extend_from_slice(p.values.i8());
            meta.extend_from_slice(p.meta.u8());
            scale.extend(steps.f32().iter().map(|s| step * s));
            bias.extend(map.bias.iter().flat_map(|b| b.f32().iter().copied()));
            (rows, cols) = (rows + p.values.rows(), p.cols);
            stored.push(p.clone());
        }
        if !bias.is_empty() && bias.len() != rows {
            return Err(unsupported(&format!("biases in some maps of `{}` only", readers.input)));
        }
        let steps: Vec<(f32, usize)> =
            readers.maps.iter().filter_map(|m| Some((m.output_step?, m.rows()))).collect();
        if !steps.is_empty() && steps.len() != readers.maps.len() {
            let message = format!("quantised outputs of some maps of `{}` only", readers.input);
            return Err(unsupported(&message));
        }
        let values = Tensor::from_i8(values, &[rows, cols / 2]);
        let meta = Tensor::from_u8(meta, &[rows, cols.div_ceil(8)]);
        Ok(Joined {
            weight: Weight::sparse(gpu, &values, &meta),
            stored,
            scale,
            bias: Some(bias).filter(|b| !b.is_empty()),
            pairs: Some(steps).filter(|s| !s.is_empty()),
            step,
        })
    }

    /// Step sizes of the output pairs, one for each output.
    pub(super) fn columns(&self) -> Option<Vec<f32>> {
        let repeat = |&(step, rows): &(f32, usize)| std::iter::repeat_n(step, rows);
        self.pairs.as_ref().map(|p| p.iter().flat_map(repeat).collect())
    }

    pub(super) fn on(gpu: Gpu, values: Vec<f32>) -> Tensor {
        let n = values.len();
        Tensor::from_f32(values, &[n]).to(Device::Cuda(gpu))
    }

    pub(super) fn map(self, gpu: Gpu, store: Store) -> Map {
        let output_step = self.columns().map(|s| Self::on(gpu, s));
        let epilogue = Epilogue {
            scale: Self::on(gpu, self.scale),
            bias: self.bias.map(|b| Self::on(gpu, b)),
            output_step,
            store,
        };
        Map::Codes(CodesMap { weight: self.weight, stored: self.stored, dense: OnceLock::new(), epilogue })
    }

    /// A map whose outputs are stored as the codes of their pairs, if they have such, and as f16 otherwise; and the
    /// pairs' step sizes.
    pub(super) fn stored_by_pairs(mut self, gpu: Gpu) -> (Map, Option<Vec<f32>>) {
        let Some(columns) = self.columns() else { return (self.map(gpu, Store::Half), None) };
        let steps = self.pairs.take().map(|p| p.into_iter().map(|(step, _)| step).collect());
        let store = Store::Codes { activation: None, step: Self::on(gpu, columns) };
        (self.map(gpu, store), steps)
    }

    /// A map whose activated outputs are codes of `step`.
    pub(super) fn activated(self, gpu: Gpu, activation: Activation, step: f32) -> Map {
        let rows = self.weight.rows();
        let store = match self.pairs.as_deref() {
            Some(&[(pair, _)]) => Store::table(gpu, activation, pair, step, self.most()),
            _ => Store::Codes { activation: Some(activation), step: Self::on(gpu, vec![step; rows]) },
        };
        self.map(gpu, store)
    }

    /// What no output is larger than, whatever the codes.
    fn most(&self) -> f32 {
        let sum = self.weight.cols() as f32 * 127.0 * 127.0;
        let bias = |row: usize| self.bias.as_ref().map_or(0.0, |b| b[row].abs());
        self.scale.iter().enumerate().map(|(row, scale)| sum * scale + bias(row)).fold(0.0, f32::max)
    }

    pub(super) fn last(mut self, gpu: Gpu) -> Final {
        let (scale, bias) = (self.scale.clone(), self.bias.take());
        let pair = self.pairs.take().map(|p| p[0].0);
        let map = self.map(gpu, Store::Accumulators);
        Final { map, outputs: scale.len(), scale: Some(scale), bias, pair }
    }
}

/// Several weights that read one input as one f16 weight, and their bias.
pub(super) fn joined_half(readers: &Readers, products: Products) -> Result<(Tensor, Option<Vec<f32>>)> {
    let (mut values, mut bias, mut cols) = (Vec::new(), Vec::new(), 0);
    for map in &readers.maps {
        let weight = match map.weight {
            params::Weight::Packed(p) => unpack_f32(p),
            params::Weight::Dense(t) => t.clone(),
            _ => unreachable!("refused when the weights were read"),
        };
        // Only to compare with are codes taken for the numbers they stand for.
        if map.integer() && products != Products::DenseF16 {
            let message = format!("`{}`, whose weights are INT8 and others are not,", readers.input);
            return Err(unsupported(&message));
        }
        cols = weight.width();
        values.extend_from_slice(weight.to_f16().f16());
        bias.extend(map.bias.iter().flat_map(|b| b.f32().iter().copied()));
    }
    let rows = values.len() / cols;
    if !bias.is_empty() && bias.len() != rows {
        return Err(unsupported(&format!("biases in some maps of `{}` only", readers.input)));
    }
    Ok((Tensor::from_f16(values, &[rows, cols]), Some(bias).filter(|b| !b.is_empty())))
}

impl Map {
    pub(super) fn half(
        gpu: Gpu,
        readers: &Readers,
        products: Products,
        function: Option<Activation>,
    ) -> Result<Map> {
        let (weight, bias) = joined_half(readers, products)?;
        let rows = weight.rows();
        if rows % 8 != 0 || weight.width() % 8 != 0 {
            let message = format!("f16 weights of widths that are no multiples of 8 (`{}`)", readers.input);
            return Err(unsupported(&message));
        }
        let bias = Tensor::from_f32(bias.unwrap_or_else(|| vec![0.0; rows]), &[rows]).to_f16();
        let device = Device::Cuda(gpu);
        Ok(Map::Half { weight: weight.to(device), bias: bias.to(device), function })
    }

    pub(super) fn codes(&self) -> Option<&CodesMap> {
        match self {
            Map::Codes(map) => Some(map),
            Map::Half { .. } | Map::Last { .. } => None,
        }
    }

    /// Element type of the output.
    pub(super) fn dtype(&self) -> DType {
        match self {
            Map::Codes(map) => map.epilogue.store.dtype(),
            Map::Half { .. } => DType::F16,
            Map::Last { .. } => DType::F32,
        }
    }

    /// Asks for the map of `x`; of an INT8 one by the kernel that was chosen for it.
    pub(super) fn launch(&self, choice: Option<&Choice>, x: &Tensor, out: &mut Tensor) {
        match self {
            Map::Codes(map) => match choice {
                Some(choice @ Choice { way: Way::Map(kernel), .. }) => {
                    sparse_linear(kernel, x, map.multiplied(choice), &map.epilogue, out);
                }
                _ => unreachable!("every INT8 map has a kernel"),
            },
            Map::Half { weight, bias, function } => half_linear::apply(x, weight, bias, *function, out),
            Map::Last { weight, bias } => dense_linear::apply(x, weight, bias.as_ref(), None, out),
        }
    }
}

impl Normed {
    /// Asks for the `states` after the norm; `added` has room for what the map of `x` gives.
    pub(super) fn launch(&self, choice: Option<&Choice>, x: &Tensor, added: &mut Tensor, states: States) {
        match (&self.map, choice) {
            (Map::Codes(map), Some(choice)) => {
                let step = Step { map, normed: Some(self) };
                step.launch(choice.way, map.multiplied(choice), x, added, states);
            }
            (map, choice) => {
                map.launch(choice, x, added);
                self.add(added, states);
            }
        }
    }

    fn add(&self, added: &Tensor, states: States) {
        let summand = match self.pair {
            Some(step) => Summand::Codes(added, step),
            None => Summand::Half(added),
        };
        add_norm(summand, Some(states.hidden), self.norm.of(), states.out());
    }
}

impl CodesMap {
    /// The form of the weight that a kernel multiplies.
    pub(super) fn multiplied(&self, choice: &Choice) -> &Weight {
        match choice.sparse {
            true => &self.weight,
            false => self.dense.get().expect("a dense twin is made before a plan uses it"),
        }
    }

    /// The weight with its zeros.
    pub(super) fn twin(&self, gpu: Gpu) -> Weight {
        let codes: Vec<i8> = self.stored.iter().flat_map(unpack_codes).collect();
        Weight::dense(gpu, &Tensor::from_i8(codes, &[self.weight.rows(), self.weight.cols()]))
    }
}

impl Final {
    pub(super) fn half(gpu: Gpu, readers: &Readers, products: Products) -> Result<Final> {
        let (weight, bias) = joined_half(readers, products)?;
        let outputs = weight.rows();
        let bias = bias.map(|b| Joined::on(gpu, b));
        let map = Map::Last { weight: weight.to(Device::Cuda(gpu)), bias };
        Ok(Final { map, outputs, scale: None, bias: None, pair: None })
    }

    /// Outputs of what the map gave, rows after each other.
    pub(super) fn scaled(&self, sums: &[i32]) -> impl Iterator<Item = f32> {
        let n = self.outputs;
        sums.iter().enumerate().map(move |(i, &sum)| {
            let Some(scale) = &self.scale else { return f32::from_bits(sum as u32) };
            let mut y = sum as f32 * scale[i % n];
            if let Some(bias) = &self.bias {
                y += bias[i % n];
            }
            self.pair.map_or(y, |s| lsq::code(y, s) * s)
        })
    }
}
