//! Safetensors: reading the checkpoints others write, and writing our own.
//!
//! Every sentence of the format's specification (README of the `safetensors` crate, "Format") is checked
//! when a file is opened, before any tensor is read. The crate itself supplies the element types; its
//! reader needs the whole file in memory or mapped (`unsafe`), keeps the last of duplicate names, and does
//! not say which tensor is wrong, so the header is read here. Elements are read when asked for.

mod checksum;
mod header;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

use std::fmt;
use std::path::Path;

use gpusq_tensor::{DType, Tensor, bf16, f16};

pub use ::safetensors::Dtype;
pub(crate) use checksum::checksum;
pub(super) use checksum::with_checksums;
pub use header::Info;
pub use reader::{Checkpoint, parse_index};
pub(super) use writer::{Stored, write_stored};
pub use writer::{write_checksummed, write_safetensors};

use crate::{Error, Result};

/// Longest header, in bytes, that the format's reference implementation reads.
const MAX_HEADER: u64 = 100_000_000;
/// The key of the free-form text in a header.
const METADATA: &str = "__metadata__";
/// Elements pass through a buffer of this many bytes (a multiple of every element size), so that no tensor
/// is in memory twice.
const CHUNK: usize = 1 << 18;

/// Checks that every element of a float tensor is finite (integers always are).
///
/// # Errors
/// [`Error::Tensor`] naming `path`, `name` and the index of the first element that is not.
pub fn check_finite(path: impl AsRef<Path>, name: &str, tensor: &Tensor) -> Result<()> {
    let first = match tensor.dtype() {
        DType::F32 => first_bad(tensor.f32(), |x| x),
        DType::F16 => first_bad(tensor.f16(), f16::to_f32),
        DType::Bf16 => first_bad(tensor.bf16(), bf16::to_f32),
        DType::I8 | DType::U8 | DType::I32 => None,
    };
    let Some((mut flat, value)) = first else { return Ok(()) };
    let mut index = vec![0; tensor.shape().len()];
    for (i, &extent) in index.iter_mut().zip(tensor.shape()).rev() {
        *i = flat % extent;
        flat /= extent;
    }
    let message = format!("the element at {index:?} is {value}; a weight must be finite");
    Err(bad(path.as_ref(), name, message))
}

fn first_bad<T: Copy>(elements: &[T], wide: impl Fn(T) -> f32) -> Option<(usize, f32)> {
    elements.iter().map(|&x| wide(x)).enumerate().find(|(_, x)| !x.is_finite())
}

/// An [`Error::Tensor`] whose name, which comes from the file, cannot break the line.
pub(super) fn bad(path: &Path, name: &str, message: impl Into<String>) -> Error {
    Error::tensor(path, shown(name), message)
}

/// Text from a file made fit for an error message: one line, not endless.
fn shown(text: &str) -> String {
    const MOST: usize = 200;
    let mut line = String::new();
    for c in text.chars().take(MOST) {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    if text.chars().nth(MOST).is_some() {
        line.push('…');
    }
    line
}

fn one_line(e: impl fmt::Display) -> String {
    shown(&e.to_string())
}
