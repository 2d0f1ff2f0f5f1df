//! Bytes to named tensors and back.
//!
//! [`safetensors`] reads the checkpoints others write and writes our own, [`packed`] is the 2:4 model that
//! the engine loads (FORMAT.md), [`atomic`] makes every output appear whole or not at all, and [`unique`] is JSON's objects. Readers
//! trust nothing in a file: what they allocate is bounded by the file's real size, and whatever is wrong
//! becomes one [`Error`](crate::Error) that names the file and the tensor.

pub mod atomic;
pub mod packed;
pub mod safetensors;
pub mod unique;
