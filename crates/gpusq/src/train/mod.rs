//! Training: one loop for dense fine-tuning, pruning and quantisation-aware training.

pub mod batch;
mod fit;
mod state;

pub use fit::{Event, Point, Recipe, Report, Stepper, fit, total_steps};
pub use state::State;
