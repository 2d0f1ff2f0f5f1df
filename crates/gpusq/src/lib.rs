//! Compress transformer language models to 2:4 sparse INT8 (GPUSQ-TLM) and run the result.
#![forbid(unsafe_code)]

pub mod arch;
pub mod bench;
pub mod compress;
pub mod config;
pub mod distill;
pub mod engine;
mod error;
pub mod evaluate;
pub mod format;
pub mod forward;
pub mod hub;
pub mod infer;
pub mod inputs;
pub mod model;
pub mod outdir;
pub mod params;
pub mod preflight;
pub mod quant;
pub mod report;
pub mod reproduce;
pub mod sparsity;
pub mod spec;
pub mod task;
mod textfile;
pub mod train;

pub use error::{Error, Result};
pub use gpusq_tensor as tensor;
