//! Tensors, a reverse-mode tape and the fused operations that gpusq trains and runs with.
//!
//! Training and deployment share this crate: every operation lives in one folder under [`ops`] that
//! holds its contract, its backward pass and one implementation for each [`Device`].

mod pool;
mod tensor;

pub mod ops;

pub use half::{bf16, f16};
pub use tensor::{DType, Device, Tensor};
