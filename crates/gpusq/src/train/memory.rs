//! How much memory a training step needs, and which batch fits.

use gpusq_tensor::cuda::CudaError;
use gpusq_tensor::{DType, Device};

use crate::forward::Compute;
use crate::spec::{Stack, TransformerSpec};
use crate::{Error, Result};

/// What decides, beside the model and the batch size, how much memory a training step needs.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Tokens of the longest input.
    pub length: usize,
    /// Whether there is a teacher.
    pub teacher: bool,
    /// Whether weights and activations are fake-quantised.
    pub quantises: bool,
    /// Whether blocks keep their input only, and are computed again.
    pub recomputes: bool,
    /// Whether a batch is computed in parts, so that a sum of gradients is kept beside them.
    pub accumulates: bool,
    /// Where and in what it computes.
    pub compute: Compute,
}

impl Step {
    /// Bytes of memory that a step needs which computes `batch` inputs at a time, estimated.
    pub fn bytes(&self, spec: &TransformerSpec, batch: usize) -> u64 {
        let Step { length, teacher, quantises, recomputes, accumulates, compute } = *self;
        let parameters = spec.weights().iter().map(|(_, s)| s.iter().product::<usize>()).sum::<usize>();
        let tokens = batch * length;
        let bytes = if compute.element == DType::Bf16 {
            // Attention keeps no scores, and gradients take the room of the activations that they are made of.
            let multiplied: usize = spec.linears().iter().map(|l| l.rows * l.cols).sum();
            // Of a quantised weight its mask, codes and values.
            let weights = 12 * parameters + if quantises { 4 } else { 2 } * multiplied;
            let of_teacher = if teacher { 4 * parameters + 2 * multiplied } else { 0 };
            let kept = |s: &Stack| {
                let (inner, qkv) =
                    (if s.gated { 3 } else { 2 } * s.ffn, s.head_dim * (s.heads + 2 * s.kv_heads));
                let taught = if teacher { s.hidden } else { 0 };
                let block = match quantises {
                    false => 8 * s.hidden + qkv + inner,
                    // Codes of inputs, as bytes too, and quantised outputs beside those that were quantised; but
                    // an activation goes from what it is made of to codes at once.
                    true => {
                        let inner = if s.gated { 2 * inner } else { s.ffn };
                        9 * s.hidden + 2 * qkv + inner + (3 * s.hidden + s.ffn) * 3 / 2
                    }
                };
                match recomputes {
                    // A block that was computed again is there with its gradients.
                    true => s.layers * (s.hidden + taught) + 2 * block,
                    false => s.layers * (block + taught),
                }
            };
            let activations = 2 * tokens * spec.stacks().map(|(_, s)| kept(s)).sum::<usize>();
            weights + of_teacher + activations.max(4 * parameters)
        } else {
            let activations: usize = spec
                .stacks()
                .map(|(_, s)| {
                    let block = activation_elements(s, batch, length);
                    if recomputes { s.layers * tokens * s.hidden + block } else { s.layers * block }
                })
                .sum();
            // Weights, gradients and two moments in f32; the teacher's weights; activations of one step.
            let copies = 4 + usize::from(teacher);
            let logits = 4 * tokens * spec.embed_width;
            4 * (parameters * copies + activations + logits)
        };
        (bytes + if accumulates { 4 * parameters } else { 0 }) as u64
    }

    /// The largest batch whose step needs at most `have` bytes; 0 if none does.
    pub fn largest_batch(&self, spec: &TransformerSpec, have: u64) -> usize {
        let fits = |batch: usize| self.bytes(spec, batch) <= have;
        if !fits(1) {
            return 0;
        }
        let (mut most, mut too_many) = (1, 2);
        while fits(too_many) && too_many < 1 << 24 {
            (most, too_many) = (too_many, 2 * too_many);
        }
        while too_many - most > 1 {
            let middle = most + (too_many - most) / 2;
            if fits(middle) { most = middle } else { too_many = middle }
        }
        most
    }

    /// What to do where `have` bytes are too few.
    pub fn advice(&self, spec: &TransformerSpec, have: u64) -> String {
        let recomputing = Step { recomputes: true, ..*self }.largest_batch(spec, have);
        match self.largest_batch(spec, have) {
            0 if recomputing > 0 => format!(
                "not even one input of {} tokens fits, but {recomputing} do with gradient_checkpointing",
                self.length
            ),
            0 => format!(
                "not even one input of {} tokens fits: lower max_length, or take a smaller model",
                self.length
            ),
            n if recomputing > n => format!(
                "about {n} inputs of {} tokens fit at a time, {recomputing} with gradient_checkpointing: set \
                 micro_batch_size to that, and the batch is computed in parts; or lower max_length",
                self.length
            ),
            n => format!(
                "about {n} inputs of {} tokens fit at a time: set micro_batch_size to that, and the batch is computed \
                 in parts; or lower max_length",
                self.length
            ),
        }
    }

    /// `e`, and which batch fits if the GPU was out of memory during a step of `batch` inputs.
    pub(super) fn explain<T>(&self, spec: &TransformerSpec, batch: usize, result: Result<T>) -> Result<T> {
        let Err(Error::Device(CudaError::OutOfMemory { ordinal, asked, free, total, .. })) = &result else {
            return result;
        };
        let Device::Cuda(gpu) = self.compute.device else { return result };
        // What is ours and what nobody has; others keep the rest.
        let have = (gpu.peak_memory() + *free as u64).min(*total as u64);
        Err(Error::Mismatch(format!(
            "GPU {ordinal} is out of memory in a step of {batch} inputs: {asked} more bytes were asked for, {free} of \
             {total} are free; {}",
            // The estimate is right within a tenth.
            self.advice(spec, have / 10 * 9)
        )))
    }
}

/// f32 elements that one training step in f32 keeps for a block's backward pass.
fn activation_elements(s: &Stack, batch: usize, length: usize) -> usize {
    let tokens = batch * length;
    let inner = if s.gated { 3 * s.ffn } else { 2 * s.ffn };
    // Per token: norms and their normalised inputs, q, k, v, attention output, two sub-layer outputs, and
    // as much again for gradients in flight.
    let per_token = 10 * s.hidden + s.head_dim * (s.heads + 2 * s.kv_heads) + inner;
    tokens * per_token + batch * s.heads * length * length
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::arch::{self, Config};

    fn bert_base() -> TransformerSpec {
        let text = r#"{"model_type":"bert","architectures":["BertForQuestionAnswering"],"vocab_size":30522,
            "hidden_size":768,"num_hidden_layers":12,"num_attention_heads":12,"intermediate_size":3072,
            "max_position_embeddings":512,"type_vocab_size":2}"#;
        let config = Config::parse(Path::new("config.json"), text).unwrap();
        (arch::find(&config).unwrap().spec)(&config).unwrap()
    }

    fn step(element: DType, quantises: bool, recomputes: bool) -> Step {
        let compute = Compute { device: Device::Cpu, element };
        Step { length: 384, teacher: true, quantises, recomputes, accumulates: false, compute }
    }

    /// Peaks of a distillation step of BERT-base, sequence 384, on an H100
    /// (results/2026-11-25-h100-train-step.txt, results/2026-11-25-h100-gradient-checkpointing.txt).
    #[test]
    fn memory_of_a_bf16_step_is_predicted_within_a_tenth() {
        for (batch, quantises, recomputes, hundredths) in [
            (32, false, false, 633),
            (8, false, false, 307),
            (32, true, false, 808),
            (8, true, false, 362),
            (32, false, true, 314),
            (8, false, true, 250),
            (32, true, true, 349),
            (8, true, true, 263),
        ] {
            let bytes = step(DType::Bf16, quantises, recomputes).bytes(&bert_base(), batch);
            let (got, gib) = (bytes as f64 / (1u64 << 30) as f64, f64::from(hundredths) / 100.0);
            let what = format!("batch {batch}, quantises {quantises}, recomputes {recomputes}");
            assert!((got / gib - 1.0).abs() < 0.1, "{what}: {got:.2} GiB, measured {gib}");
            println!("{what}: {got:.2} GiB predicted, {gib} measured");
        }
    }

    #[test]
    fn the_largest_batch_fits_and_one_more_does_not() {
        let spec = bert_base();
        for element in [DType::F32, DType::Bf16] {
            let step = step(element, true, false);
            for gib in [4u64, 16, 80] {
                let most = step.largest_batch(&spec, gib << 30);
                assert!(most > 0 && step.bytes(&spec, most) <= gib << 30, "{most} in {gib} GiB");
                assert!(step.bytes(&spec, most + 1) > gib << 30, "{most} in {gib} GiB is not the most");
            }
            assert_eq!(step.largest_batch(&spec, 1 << 20), 0);
            assert!(step.advice(&spec, 1 << 20).contains("not even one input of 384 tokens"));
        }
    }
}
