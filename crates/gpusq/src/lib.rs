//! Compress transformer language models to 2:4 sparse INT8 (GPUSQ-TLM) and run the result.
#![forbid(unsafe_code)]

pub mod config;
mod error;
pub mod params;
pub mod sparsity;
/// What a model can be trained on and scored by.
pub mod task {
    pub mod synthetic;
}

pub use error::{Error, Result};
pub use gpusq_tensor as tensor;
