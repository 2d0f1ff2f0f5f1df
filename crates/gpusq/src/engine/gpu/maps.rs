//! Linear maps on a GPU: from packed weights to launches.

use std::sync::OnceLock;

use gpusq_tensor::cuda::Gpu;
use gpusq_tensor::ops::activation::Activation;
use gpusq_tensor::ops::sparse_linear::{Epilogue, Kernel, Store, Weight, sparse_linear};
use gpusq_tensor::ops::{dense_linear, half_linear, lsq};
use gpusq_tensor::{DType, Device, Tensor};

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

/// The kernel of one map.
#[derive(Clone, Copy)]
pub(super) struct Choice {
    pub(super) kernel: Kernel,
    pub(super) sparse: bool,
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

    pub(super) fn launch(&self, choice: Option<&Choice>, x: &Tensor, out: &mut Tensor) {
        match self {
            Map::Codes(map) => {
                let choice = choice.expect("every INT8 map has a kernel");
                sparse_linear(&choice.kernel, x, map.multiplied(choice), &map.epilogue, out);
            }
            Map::Half { weight, bias, function } => half_linear::apply(x, weight, bias, *function, out),
            Map::Last { weight, bias } => dense_linear::apply(x, weight, bias.as_ref(), None, out),
        }
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
