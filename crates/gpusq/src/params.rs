//! A model's weights by name, and how each one is represented.
//!
//! Names are the project's own ("encoder.0.attn.q.weight"); [`crate::arch`] translates them to and from
//! the names a checkpoint uses.

use std::collections::BTreeMap;

use gpusq_tensor::{Device, Tensor};

/// How one weight is held. Each compression stage moves a GEMM weight one variant down.
#[derive(Clone, Debug, PartialEq)]
pub enum Weight {
    /// Every element, f32.
    Dense(Tensor),
    /// 2:4 pruned: `value` f32 `[out, in]`, `mask` u8 `[out, in]` with 1 for kept elements.
    Masked {
        /// The elements; those the mask drops may hold the value they would have if revived.
        value: Tensor,
        /// 1 keeps, 0 drops.
        mask: Tensor,
    },
    /// Pruned and fake-quantised: codes are `round(value * mask / scale[row])` in -127..=127.
    Fake {
        /// The elements, f32 `[out, in]`.
        value: Tensor,
        /// 1 keeps, 0 drops, u8 `[out, in]`.
        mask: Tensor,
        /// One positive step size per output row, f32 `[out]`.
        scale: Tensor,
    },
    /// 2:4 pruned and stored without the dropped elements.
    Packed(Packed),
}

/// A 2:4 weight `[rows, cols]` without its dropped elements (FORMAT.md, "Packed weights").
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    /// Kept elements, i8 codes or f16, `[rows, cols / 2]`.
    pub values: Tensor,
    /// Two 2-bit column indices per group of four, low nibble first, u8 `[rows, ceil(cols / 8)]`.
    pub meta: Tensor,
    /// One step size per row, f32 `[rows]`; `None` for f16 values.
    pub scale: Option<Tensor>,
    /// Columns of the unpacked weight (its rows are `values`' rows).
    pub cols: usize,
}

/// Weights by name, in name order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Params {
    map: BTreeMap<String, Weight>,
}

impl Params {
    /// No weights.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same weights on `device`. Packed ones stay in host memory, which the engine reads.
    pub fn to(&self, device: Device) -> Self {
        let moved = |w: &Weight| match w {
            Weight::Dense(t) => Weight::Dense(t.to(device)),
            Weight::Masked { value, mask } => {
                Weight::Masked { value: value.to(device), mask: mask.to(device) }
            }
            Weight::Fake { value, mask, scale } => {
                Weight::Fake { value: value.to(device), mask: mask.to(device), scale: scale.to(device) }
            }
            Weight::Packed(p) => Weight::Packed(p.clone()),
        };
        Params { map: self.map.iter().map(|(name, w)| (name.clone(), moved(w))).collect() }
    }

    /// Those weights whose names `keep` wants.
    pub fn part(&self, keep: impl Fn(&str) -> bool) -> Self {
        let map = self.map.iter().filter(|(name, _)| keep(name)).map(|(name, w)| (name.clone(), w.clone()));
        Params { map: map.collect() }
    }

    /// Adds or replaces a weight.
    pub fn insert(&mut self, name: impl Into<String>, weight: Weight) {
        self.map.insert(name.into(), weight);
    }

    /// The weight called `name`.
    pub fn get(&self, name: &str) -> Option<&Weight> {
        self.map.get(name)
    }

    /// The weight called `name`, to change.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Weight> {
        self.map.get_mut(name)
    }

    /// Takes the weight called `name` out.
    pub fn remove(&mut self, name: &str) -> Option<Weight> {
        self.map.remove(name)
    }

    /// The f32 elements of `name` before masking. Panics if it is absent or packed: loading has checked
    /// every name the specification asks for, so that is a mistake in the program.
    pub fn dense(&self, name: &str) -> &Tensor {
        match self.map.get(name) {
            Some(Weight::Dense(t) | Weight::Masked { value: t, .. } | Weight::Fake { value: t, .. }) => t,
            Some(Weight::Packed(_)) => panic!("`{name}` is packed"),
            None => panic!("no weight `{name}`"),
        }
    }

    /// All weights in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.map.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// All weights in name order, to change.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Weight)> {
        self.map.iter_mut().map(|(k, v)| (k.as_str(), v))
    }

    /// All tensors of weights that are not packed, in a fixed order, to change.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        self.named_tensors_mut().into_iter().map(|(_, t)| t).collect()
    }

    /// The same, each with the name of its weight.
    pub fn named_tensors_mut(&mut self) -> Vec<(&str, &mut Tensor)> {
        fn of(w: &mut Weight) -> Vec<&mut Tensor> {
            match w {
                Weight::Dense(t) => vec![t],
                Weight::Masked { value, mask } => vec![value, mask],
                Weight::Fake { value, mask, scale } => vec![value, mask, scale],
                Weight::Packed(_) => Vec::new(),
            }
        }
        self.map.iter_mut().flat_map(|(name, w)| of(w).into_iter().map(|t| (name.as_str(), t))).collect()
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }
}
