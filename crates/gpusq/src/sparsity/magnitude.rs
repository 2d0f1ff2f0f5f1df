//! The magnitude criterion (Mishra et al. 2021, arXiv 2104.08378, section 3): `|W_ij|`.

use gpusq_tensor::Tensor;
use rayon::prelude::*;

use super::{Criterion, CriterionEntry, InputStats};

pub(super) const ENTRY: CriterionEntry = CriterionEntry {
    name: "magnitude",
    doc: "keeps the largest weights",
    needs_inputs: false,
    build: || Box::new(Magnitude),
};

struct Magnitude;

impl Criterion for Magnitude {
    fn score(&self, weight: &Tensor, _inputs: Option<&InputStats>) -> Tensor {
        Tensor::from_f32(weight.f32().par_iter().map(|w| w.abs()).collect(), weight.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparsity::{Pattern, weight_mask};

    #[test]
    fn large_weights_of_either_sign_survive() {
        let weight = Tensor::from_f32(vec![0.1, -3.0, 2.0, 0.5, 1.0, 0.0, -1.5, 1.2], &[1, 8]);
        assert_eq!(Magnitude.score(&weight, None).f32(), [0.1, 3.0, 2.0, 0.5, 1.0, 0.0, 1.5, 1.2]);
        let mask = weight_mask(&Magnitude, &weight, None, Pattern::TWO_FOUR);
        assert_eq!(mask.u8(), [0, 1, 1, 0, 0, 0, 1, 1]);
    }
}
