//! Wanda (Sun et al. 2024, arXiv 2306.11695, equation 1): `|W_ij| * ||X_j||_2`, the weight's magnitude times
//! the norm of the input feature that it multiplies.

use gpusq_tensor::Tensor;

use super::{Criterion, CriterionEntry, InputStats};

pub(super) const ENTRY: CriterionEntry = CriterionEntry {
    name: "wanda",
    doc: "keeps the weights that are large for the size of their inputs",
    needs_inputs: true,
    build: || Box::new(Wanda),
};

struct Wanda;

impl Criterion for Wanda {
    fn score(&self, weight: &Tensor, inputs: Option<&InputStats>) -> Tensor {
        let norms = inputs.expect("wanda needs statistics of the inputs").norms();
        assert_eq!(norms.len(), weight.width(), "inputs of another width than the weight's");
        let rows = weight.f32().chunks(norms.len());
        let scores = rows.flat_map(|row| row.iter().zip(&norms).map(|(w, norm)| w.abs() * norm));
        Tensor::from_f32(scores.collect(), weight.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparsity::{Pattern, weight_mask};

    #[test]
    fn a_small_weight_on_a_large_input_survives() {
        let weight = Tensor::from_f32(vec![4.0, -3.0, 2.0, 1.0, 1.0, 1.0, -1.0, 1.0], &[2, 4]);
        let mut inputs = InputStats::new(4);
        // Norms over the two tokens: 0, 5, 1, 10.
        inputs.add(&Tensor::from_f32(vec![0.0, 3.0, 1.0, 6.0, 0.0, -4.0, 0.0, -8.0], &[2, 4]));
        assert_eq!(Wanda.score(&weight, Some(&inputs)).f32(), [0.0, 15.0, 2.0, 10.0, 0.0, 5.0, 1.0, 10.0]);
        let mask = weight_mask(&Wanda, &weight, Some(&inputs), Pattern::TWO_FOUR);
        assert_eq!(mask.u8(), [0, 1, 0, 1, 0, 1, 0, 1]);
    }
}
