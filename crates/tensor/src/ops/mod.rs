//! The fused operations; one folder each.
