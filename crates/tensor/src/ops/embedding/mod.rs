//! Sums of table rows: word, position and token-type embeddings in one pass.

mod cpu;
mod cuda;

pub(crate) use cuda::SOURCE;

use crate::{DType, Device, Tape, Tensor, Var};

/// One table and the row each token takes from it.
#[derive(Clone)]
pub struct Lookup {
    /// f32 `[entries, width]`.
    pub table: Var,
    /// One entry per token. Panics in the lookup if an id has no entry: batches are checked where they are made.
    pub ids: Vec<u32>,
    /// The row is multiplied by this.
    pub factor: f32,
}

/// A [`Lookup`] without a tape.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// f32 `[entries, width]`.
    pub table: &'a Tensor,
    /// One entry per token, as in [`Lookup::ids`].
    pub ids: &'a [u32],
    /// The row is multiplied by this.
    pub factor: f32,
}

/// [`embedding`] without a tape.
pub fn apply(lookups: &[Rows], element: DType) -> Tensor {
    let (tokens, width) = (lookups[0].ids.len(), lookups[0].table.width());
    for l in lookups {
        assert_eq!((l.ids.len(), l.table.width()), (tokens, width), "embedding lookups differ");
    }
    match lookups[0].table.device() {
        Device::Cpu => {
            assert_eq!(element, DType::F32, "a CPU computes in f32");
            cpu::forward(lookups, tokens, width)
        }
        Device::Cuda(gpu) => cuda::forward(gpu, lookups, tokens, width, element),
    }
}

/// `out[t] = sum over lookups of factor * table[ids[t]]`: `[tokens, width]` of type `element`, f32 or, on a GPU,
/// bf16. The tables and their gradients are f32.
pub fn embedding(tape: &Tape, lookups: &[Lookup], element: DType) -> Var {
    let rows: Vec<Rows> =
        lookups.iter().map(|l| Rows { table: l.table.value(), ids: &l.ids, factor: l.factor }).collect();
    let out = apply(&rows, element);
    let inputs: Vec<&Var> = lookups.iter().map(|l| &l.table).collect();
    let kept = lookups.to_vec();
    tape.push(out, &inputs, move |grad, grads| {
        for l in &kept {
            if grads.wants(&l.table) {
                grads.add_with(&l.table, |sum: &mut Tensor| scatter(grad, &l.ids, l.factor, sum));
            }
        }
    })
}

/// `sum[ids[t]] += factor * grad[t]`, the same on every run.
pub(crate) fn scatter(grad: &Tensor, ids: &[u32], factor: f32, sum: &mut Tensor) {
    match grad.device() {
        Device::Cpu => cpu::scatter(grad, ids, factor, sum),
        Device::Cuda(gpu) => cuda::scatter(gpu, grad, ids, factor, sum),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, check_bf16, noise};
    use super::*;

    #[test]
    fn matches_reference() {
        let (a, b) = (vec![1u32, 0, 1, 3], vec![0u32, 0, 1, 2]);
        let inputs = [noise(&[4, 5], 1), noise(&[3, 5], 2)];
        let of = |t: &Tape, v: &[Var], element| {
            let lookups = [
                Lookup { table: v[0].clone(), ids: a.clone(), factor: 2.0 },
                Lookup { table: v[1].clone(), ids: b.clone(), factor: 1.0 },
            ];
            embedding(t, &lookups, element)
        };
        let reference = |x: &[Vec<f64>]| -> Vec<f64> {
            let row = |x: &[f64], id: u32, i: usize| x[id as usize * 5 + i % 5];
            (0..20).map(|i| 2.0 * row(&x[0], a[i / 5], i) + row(&x[1], b[i / 5], i)).collect()
        };
        check(&inputs, |t, v| of(t, v, DType::F32), reference);
        check_bf16(&inputs, &[], |t, v| of(t, v, DType::Bf16), reference);
    }

    #[test]
    fn a_row_that_most_tokens_take_gets_all_their_gradients() {
        let ids: Vec<u32> = (0..450).map(|t| if t % 9 == 4 { 2 } else { 0 }).collect();
        check(
            &[noise(&[3, 4], 1)],
            |t, v| embedding(t, &[Lookup { table: v[0].clone(), ids: ids.clone(), factor: 0.5 }], DType::F32),
            |x| ids.iter().flat_map(|&id| x[0][id as usize * 4..][..4].iter().map(|e| 0.5 * e)).collect(),
        );
    }
}
