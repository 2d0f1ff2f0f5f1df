//! Training: one loop for dense fine-tuning, pruning and quantisation-aware training.

pub mod batch;
mod fit;
mod memory;
mod pipeline;
mod state;
pub mod teacher_cache;

pub use fit::{Event, Point, Recipe, Report, Stepper, fit, sections, total_steps};
pub use memory::Step;
pub use state::State;
