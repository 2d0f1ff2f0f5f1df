//! Quantisation: the INT8 grid, and how its scales are found and learned.

pub mod grid;
