//! The fused operations; one folder each.

pub mod int8_linear;
