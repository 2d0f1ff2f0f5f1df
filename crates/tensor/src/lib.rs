//! Tensors, a reverse-mode tape and the fused operations that gpusq trains and runs with.
//!
//! Training and deployment share this crate: every operation lives in one folder under [`ops`] that
//! holds its contract, its backward pass and one implementation for each [`Device`].

mod cpu;
pub mod cuda;
mod flags;
mod group;
mod optim;
mod pool;
mod segments;
mod tape;
mod tensor;

pub mod ops;

pub use flags::Flags;
pub use group::{Group, GroupError, Patience, Seat};
pub use half::{bf16, f16};
pub use optim::{AdamW, Moments, Slot, Update, normal};
pub use segments::Segments;
pub use tape::{Grads, Part, Tape, Var};
pub use tensor::{DType, Device, Tensor};
