//! Structured sparsity: which elements of a weight survive, and by what criterion.
//!
//! A new criterion is one file with one implementation of [`Criterion`] and one line in [`CRITERIA`].

mod magnitude;
mod pattern;
mod wanda;

use gpusq_tensor::Tensor;

pub use pattern::{Pattern, mask_rows};

use crate::{Error, Result};

/// Decides how much each element of a weight matters.
pub trait Criterion {
    /// Scores of a `weight` f32 `[out, in]`, in the same shape, none negative; of each group the elements
    /// with the largest scores survive.
    ///
    /// `inputs` describes what the linear layer was fed with. Panics if it is absent although
    /// [`CriterionEntry::needs_inputs`] says that the criterion uses it, or if it is of another width.
    fn score(&self, weight: &Tensor, inputs: Option<&InputStats>) -> Tensor;
}

/// A line of [`CRITERIA`].
pub struct CriterionEntry {
    /// The name that a configuration gives it (`prune.criterion`).
    pub name: &'static str,
    /// What it keeps, for help texts.
    pub doc: &'static str,
    /// Whether it has to be given statistics of the layer's inputs.
    pub needs_inputs: bool,
    /// Makes one.
    pub build: fn() -> Box<dyn Criterion>,
}

/// All criteria.
pub const CRITERIA: &[CriterionEntry] = &[magnitude::ENTRY, wanda::ENTRY];

/// The criterion called `name`.
///
/// # Errors
/// [`Error::Config`] with the known names if there is none.
pub fn criterion(name: &str) -> Result<&'static CriterionEntry> {
    CRITERIA.iter().find(|entry| entry.name == name).ok_or_else(|| {
        let known: Vec<&str> = CRITERIA.iter().map(|entry| entry.name).collect();
        Error::Config(format!("unknown criterion `{name}`; known ones: {}", known.join(", ")))
    })
}

/// The mask u8 `[out, in]` of a `weight` f32 `[out, in]`: 1 for the elements that `criterion` keeps under
/// `pattern`, with groups along `in`. Panics as [`Criterion::score`] does.
pub fn weight_mask(
    criterion: &dyn Criterion,
    weight: &Tensor,
    inputs: Option<&InputStats>,
    pattern: Pattern,
) -> Tensor {
    let scores = criterion.score(weight, inputs);
    let mut mask = vec![0; weight.len()];
    mask_rows(scores.f32(), weight.width(), pattern, &mut mask);
    Tensor::from_u8(mask, weight.shape())
}

/// What a linear layer was fed with, summed over tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct InputStats {
    /// For each input feature the sum of squares, in f64 so that the order of batches hardly matters.
    square_sum: Vec<f64>,
    tokens: usize,
}

impl InputStats {
    /// Nothing seen yet by a layer of `width` input features.
    pub fn new(width: usize) -> Self {
        InputStats { square_sum: vec![0.0; width], tokens: 0 }
    }

    /// Adds inputs f32 `[.., width]`, one row for each token. Panics if they are of another width.
    pub fn add(&mut self, inputs: &Tensor) {
        assert_eq!(inputs.width(), self.width(), "inputs of another width");
        for row in inputs.f32().chunks(self.width()) {
            self.square_sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += x as f64 * x as f64);
        }
        self.tokens += inputs.rows();
    }

    /// Number of input features.
    pub fn width(&self) -> usize {
        self.square_sum.len()
    }

    /// Number of rows added.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The l2 norm of every input feature over all tokens, `[width]`.
    pub fn norms(&self) -> Vec<f32> {
        self.square_sum.iter().map(|sum| sum.sqrt() as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn criteria_are_documented_and_keep_the_pattern() {
        let names: BTreeSet<&str> = CRITERIA.iter().map(|entry| entry.name).collect();
        assert_eq!(names.len(), CRITERIA.len(), "a name stands twice");
        let weight = Tensor::from_f32((0..24).map(|i| ((i * 7) % 11) as f32 - 5.0).collect(), &[3, 8]);
        let mut inputs = InputStats::new(8);
        inputs.add(&Tensor::from_f32((0..32).map(|i| (i % 5) as f32).collect(), &[2, 2, 8]));
        for entry in CRITERIA {
            assert!(!entry.doc.is_empty());
            let criterion = (entry.build)();
            let given = entry.needs_inputs.then_some(&inputs);
            let scores = criterion.score(&weight, given);
            assert_eq!(scores.shape(), weight.shape());
            assert!(scores.f32().iter().all(|&s| s >= 0.0), "{}", entry.name);
            let mask = weight_mask(&*criterion, &weight, given, Pattern::TWO_FOUR);
            assert_eq!(mask.shape(), weight.shape());
            assert!(mask.u8().chunks(4).all(|group| group.iter().sum::<u8>() == 2), "{}", entry.name);
        }
    }

    #[test]
    fn an_unknown_criterion_is_answered_with_the_known_ones() {
        assert_eq!(criterion("wanda").unwrap().name, "wanda");
        let error = criterion("magic").map(|entry| entry.name).unwrap_err();
        assert_eq!(error.to_string(), "unknown criterion `magic`; known ones: magnitude, wanda");
    }

    #[test]
    fn input_norms_do_not_depend_on_the_batches() {
        let rows: Vec<f32> = vec![3.0, 1.0, 4.0, -1.0, 0.0, 2.0];
        let mut whole = InputStats::new(2);
        whole.add(&Tensor::from_f32(rows.clone(), &[3, 2]));
        let mut parts = InputStats::new(2);
        parts.add(&Tensor::from_f32(rows[..2].to_vec(), &[1, 2]));
        parts.add(&Tensor::from_f32(rows[2..].to_vec(), &[1, 2, 2]));
        assert_eq!(whole, parts);
        assert_eq!(whole.tokens(), 3);
        assert_eq!(whole.norms(), [5.0, 6f32.sqrt()]);
    }
}
