//! The fused operations, one folder each: `mod.rs` has the contract, the backward pass and the tests,
//! `cpu.rs` the CPU implementation (the reference), `kernel.cu` the CUDA kernels and `cuda.rs` their launches.
//!
//! Shapes: a *row* is the last dimension; all leading dimensions are flattened. Operations whose
//! arguments disagree in shape panic: [`crate::Tensor`] explains why.

use crate::cuda::Source;
use crate::{DType, Device};
use activation::Activation;

pub mod activation;
pub mod add;
pub mod attention;
pub mod cast;
pub mod codes;
pub mod cross_entropy;
pub mod dense_linear;
pub mod dropout;
pub mod embedding;
pub mod gated;
pub mod half_linear;
pub mod int8_linear;
pub mod kl_divergence;
pub mod layer_norm;
pub mod linear;
pub mod lsq;
pub mod masked;
pub mod mse;
pub mod norm_codes;
pub mod rms_norm;
pub mod rotary;
pub mod select;
pub mod sparse_linear;
pub mod varlen_attention;
pub mod weighted_sum;

/// The kernels of every operation that has some for each element type.
pub(crate) const SOURCES: &[&Source] = &[
    &add::SOURCE,
    &attention::SOURCE,
    &cast::SOURCE,
    &crate::cuda::reduce::SOURCE,
    &crate::optim::SOURCE,
    &cross_entropy::SOURCE,
    &dropout::SOURCE,
    &embedding::SOURCE,
    &gated::SOURCE,
    &kl_divergence::SOURCE,
    &layer_norm::SOURCE,
    &linear::SOURCE,
    &linear::BYTES,
    &lsq::SOURCE,
    &masked::SOURCE,
    &mse::SOURCE,
    &rms_norm::SOURCE,
    &rotary::SOURCE,
    &select::SOURCE,
    &weighted_sum::SOURCE,
];

/// What decides which kernels a model is trained with.
#[derive(Clone, Debug, Default)]
pub struct Trained {
    /// Activation functions.
    pub functions: Vec<Activation>,
    /// Widths of heads, with their attention's pattern.
    pub heads: Vec<(usize, Option<(usize, usize)>)>,
}

/// Compiles what a training step with activations of type `element` needs and the cache on disk lacks, on all threads: one
/// kernel after the other, when each is first launched, takes three times as long. Nothing to do on a CPU.
pub fn prepare(device: Device, element: DType, model: &Trained) {
    let Device::Cuda(gpu) = device else { return };
    let flash =
        model.heads.iter().filter_map(|&(width, pattern)| attention::kernels(element, width, pattern));
    let functions = model.functions.iter().map(|&f| activation::kernels(f, element));
    let mut types = vec![element, DType::F32];
    types.dedup();
    let plain = SOURCES.iter().flat_map(|s| types.iter().map(|t| s.of(*t)));
    // Those that take longest first.
    gpu.prepare(&flash.chain(functions).chain(plain).collect::<Vec<_>>());
}

/// Kernels that are compiled for more than an element type: for any GPU, and for Hopper alone.
#[cfg(test)]
pub(crate) fn variants() -> (Vec<crate::cuda::Variant>, Vec<crate::cuda::Variant>) {
    let (sparse, sparse_hopper) = sparse_linear::variants();
    let (varlen, varlen_hopper) = varlen_attention::variants();
    let any = [
        crate::cuda::copy_variants(),
        activation::variants(),
        attention::flash_variants(),
        codes::variants(),
        dense_linear::variants(),
        half_linear::variants(),
        norm_codes::variants(),
        sparse,
        varlen,
    ];
    (any.into_iter().flatten().collect(), [sparse_hopper, varlen_hopper].concat())
}

#[cfg(test)]
pub(crate) mod check;
