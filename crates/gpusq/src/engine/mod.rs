//! The engine: packed encoder models from tokens to outputs, without a tape, on a CPU or an NVIDIA GPU.
//!
//! On a CPU its answers are the fake-quantised forward's bit for bit, and on a GPU the CPU's where the outputs of maps are
//! quantised, but for what README.md names.

mod cpu;
mod gpu;
mod plan;
mod site;
mod weights;

use std::collections::BTreeMap;
use std::time::Instant;

use gpusq_tensor::ops::attention;
use gpusq_tensor::{Device, Tensor};

pub use plan::{Place, Row, Time};

use crate::inputs::{Inputs, Tokens};
use crate::model::Model;
use crate::spec::{Head, Stack, TransformerSpec};
use crate::{Error, Result};

/// INT8 codes by the name of the linear maps' input ([`crate::spec::Linear::input`]), i8 `[rows, width]`.
pub type Codes = BTreeMap<String, Tensor>;

/// A packed model, ready to run. It may serve any number of threads at once.
pub struct Engine {
    spec: TransformerSpec,
    encoder: Encoder,
}

/// Which matrix products a GPU may use; a CPU has one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// 2:4 or dense INT8, whatever was measured to be faster.
    #[default]
    Fastest,
    /// 2:4 INT8 by the kernels that are likely to be fast, without measuring: nothing is compiled that is not used.
    Likely,
    /// Dense INT8: the same codes with their zeros, to compare with.
    DenseInt8,
    /// Dense f16 by cuBLASLt: what the codes stand for, to compare with. Activations are not quantised.
    DenseF16,
}

/// Where and how it runs.
#[expect(clippy::large_enum_variant, reason = "there is one for each model")]
enum Encoder {
    Cpu(cpu::Encoder),
    Gpu(gpu::Encoder),
}

impl Engine {
    /// [`Engine::load_with`] of what is fastest.
    ///
    /// # Errors
    /// As [`Engine::load_with`].
    pub fn load(model: &Model, device: Device) -> Result<Engine> {
        Self::load_with(model, device, Products::default())
    }

    /// Prepares a packed encoder model for `device`: reorders INT8 weights for it, expands f16 ones to f32.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a model that is not packed or has a decoder, an attention pattern that
    /// cannot be run, and weights that are missing or do not fit the specification.
    pub fn load_with(model: &Model, device: Device, products: Products) -> Result<Engine> {
        if !model.stage.packed() {
            let message = format!(
                "the engine runs packed models, and this one is {}; pack it with Model::packed",
                model.stage.title()
            );
            return Err(Error::Mismatch(message));
        }
        let spec = model.spec.clone();
        let (Some(stack), None) = (&spec.encoder, &spec.decoder) else {
            let message = "the engine runs encoders; this model has a decoder, and generation comes later";
            return Err(Error::Mismatch(message.into()));
        };
        if let Head::LanguageModel { .. } = spec.head {
            let message = "the engine runs classifiers and span heads; this model has a language model's";
            return Err(Error::Mismatch(message.into()));
        }
        if let Some(p) = model.attention.filter(|p| !attention::allowed(p.keep, p.of)) {
            let message = format!("attention pattern {p}: keep must be below of, a power of two up to 256");
            return Err(Error::Mismatch(message));
        }
        let encoder = match device {
            Device::Cpu => Encoder::Cpu(cpu::Encoder::load(model, stack)?),
            Device::Cuda(gpu) => Encoder::Gpu(gpu::Encoder::load(gpu, model, stack, products)?),
        };
        Ok(Engine { spec, encoder })
    }

    /// The head's output: f32 `[batch, outputs]` of a classifier, `[batch * length, 2]` (start and end) of a
    /// span head, and the last hidden states `[batch * length, hidden]` without a head.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for inputs that do not fit the model: none at all, lists of other lengths than
    /// `batch * length`, sequences that are too long, ids outside a table.
    ///
    /// [`Error::Device`] for what a GPU meets. After [`CudaError::OutOfMemory`] the engine answers other requests, and this
    /// one when there is memory again. After [`CudaError::Fault`], a kernel or GPU that failed, the driver takes no more
    /// work from the process: every later request gets this error, at once and without an answer, until the process is
    /// started again.
    ///
    /// [`CudaError::OutOfMemory`]: gpusq_tensor::cuda::CudaError::OutOfMemory
    /// [`CudaError::Fault`]: gpusq_tensor::cuda::CudaError::Fault
    pub fn run(&self, inputs: &Inputs) -> Result<Tensor> {
        self.check(inputs)?;
        match &self.encoder {
            Encoder::Cpu(encoder) => Ok(encoder.run(&inputs.tokens, None)),
            Encoder::Gpu(encoder) => encoder.run(&inputs.tokens),
        }
    }

    /// [`Engine::run`], and the INT8 codes that every quantised linear map read. Where the head reads the
    /// first token of each sequence only, the last block's codes after attention are of these rows.
    ///
    /// # Errors
    /// As [`Engine::run`]
    pub fn run_tapped(&self, inputs: &Inputs) -> Result<(Tensor, Codes)> {
        self.check(inputs)?;
        let mut codes = Codes::new();
        match &self.encoder {
            Encoder::Cpu(encoder) => Ok((encoder.run(&inputs.tokens, Some(&mut codes)), codes)),
            Encoder::Gpu(_) => Err(Error::Mismatch("codes are tapped on a CPU; use --device cpu".into())),
        }
    }

    /// Milliseconds of each of `repeats` runs of the same inputs: on a GPU from the copy of the tokens to that of the
    /// outputs, one run behind the other; on a CPU of [`Engine::run`].
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn times(&self, inputs: &Inputs, repeats: usize) -> Result<Vec<f64>> {
        self.check(inputs)?;
        match &self.encoder {
            Encoder::Cpu(encoder) => Ok((0..repeats)
                .map(|_| {
                    let start = Instant::now();
                    encoder.run(&inputs.tokens, None);
                    start.elapsed().as_secs_f64() * 1e3
                })
                .collect()),
            Encoder::Gpu(encoder) => encoder.times(&inputs.tokens, repeats),
        }
    }

    /// The kernels that run inputs of this size, measured if nobody has yet; `None` on a CPU, which chooses without.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn plan(&self, inputs: &Inputs) -> Result<Option<Vec<Row>>> {
        self.check(inputs)?;
        match &self.encoder {
            Encoder::Cpu(_) => Ok(None),
            Encoder::Gpu(encoder) => encoder.plan(&inputs.tokens).map(Some),
        }
    }

    fn stack(&self) -> &Stack {
        self.spec.last_stack()
    }

    fn check(&self, inputs: &Inputs) -> Result<()> {
        let fail = |message: String| Err(Error::Mismatch(message));
        if inputs.target.is_some() {
            return fail("an encoder has no target tokens".into());
        }
        let t: &Tokens = &inputs.tokens;
        if t.batch == 0 || t.length == 0 {
            return fail(format!("there are no tokens in a batch of {} x {}", t.batch, t.length));
        }
        if t.length > self.spec.max_length() {
            return fail(format!(
                "sequences of {} tokens for a model of at most {}; truncate them",
                t.length,
                self.spec.max_length()
            ));
        }
        let Some(count) = t.batch.checked_mul(t.length).filter(|&n| n == t.ids.len()) else {
            return fail(format!("{} token ids for a batch of {} x {}", t.ids.len(), t.batch, t.length));
        };
        if let Some(id) = t.ids.iter().find(|&&id| id as usize >= self.spec.vocab) {
            return fail(format!(
                "token id {id} for a vocabulary of {}; is this the model's tokenizer?",
                self.spec.vocab
            ));
        }
        let types = self.stack().embed.types;
        if types > 0 && !t.types.is_empty() {
            if t.types.len() != count {
                return fail(format!("{} token types for {count} tokens", t.types.len()));
            }
            if let Some(id) = t.types.iter().find(|&&id| id as usize >= types) {
                return fail(format!("token type {id} for a model of {types}"));
            }
        }
        match &t.mask {
            Some(m) if m.len() != count => fail(format!("a mask of {} for {count} tokens", m.len())),
            _ => Ok(()),
        }
    }
}
