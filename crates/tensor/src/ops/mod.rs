//! The fused operations, one folder each: `mod.rs` has the contract, the backward pass and the tests,
//! `cpu.rs` the CPU implementation (the reference).
//!
//! Shapes: a *row* is the last dimension; all leading dimensions are flattened. Operations whose
//! arguments disagree in shape panic: [`crate::Tensor`] explains why.

pub mod activation;
pub mod add;
pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod gated;
pub mod int8_linear;
pub mod kl_divergence;
pub mod layer_norm;
pub mod linear;
pub mod lsq;
pub mod masked;
pub mod mse;
pub mod rms_norm;
pub mod rotary;
pub mod select;
pub mod weighted_sum;

#[cfg(test)]
pub(crate) mod check;
