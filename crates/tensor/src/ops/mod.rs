//! The fused operations, one folder each: `mod.rs` has the contract, the backward pass and the tests,
//! `cpu.rs` the CPU implementation (the reference), `kernel.cu` the CUDA kernels and `cuda.rs` their launches.
//!
//! Shapes: a *row* is the last dimension; all leading dimensions are flattened. Operations whose
//! arguments disagree in shape panic: [`crate::Tensor`] explains why.

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

/// The kernels of every operation that has some.
#[cfg(test)]
pub(crate) const SOURCES: &[&crate::cuda::Source] = &[
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

/// Kernels that are compiled for more than an element type: for any GPU, and for Hopper alone.
#[cfg(test)]
pub(crate) fn variants() -> (Vec<crate::cuda::Variant>, Vec<crate::cuda::Variant>) {
    let (sparse, sparse_hopper) = sparse_linear::variants();
    let (varlen, varlen_hopper) = varlen_attention::variants();
    let any = [
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
