//! Compress transformer language models to 2:4 sparse INT8 (GPUSQ-TLM) and run the result.
#![forbid(unsafe_code)]

mod error;
pub mod format;
pub mod params;
pub mod quant;

pub use error::{Error, Result};
pub use gpusq_tensor as tensor;
