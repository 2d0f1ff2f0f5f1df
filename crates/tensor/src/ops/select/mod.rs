//! Picking rows (the first token of each sequence) or one column (start or end logits) of a matrix.

use crate::{Tape, Tensor, Var};

/// Rows `rows` of `x` `[.., width]` (leading dimensions flattened): `[rows.len(), width]`.
pub fn select_rows(tape: &Tape, x: &Var, rows: &[u32]) -> Var {
    let width = x.value().width();
    let out = apply(x.value(), rows);
    let (x2, rows) = (x.clone(), rows.to_vec());
    tape.push(out, &[x], move |grad, grads| {
        grads.add_with(&x2, |sum| {
            let sum = sum.f32_mut();
            for (g, &r) in grad.f32().chunks_exact(width).zip(&rows) {
                for (s, g) in sum[r as usize * width..][..width].iter_mut().zip(g) {
                    *s += g;
                }
            }
        })
    })
}

/// [`select_rows`] without a tape.
pub fn apply(x: &Tensor, rows: &[u32]) -> Tensor {
    let (width, src) = (x.width(), x.f32());
    let mut out = Vec::with_capacity(rows.len() * width);
    for &r in rows {
        out.extend_from_slice(&src[r as usize * width..][..width]);
    }
    Tensor::from_f32(out, &[rows.len(), width])
}

/// Column `column` of `x` `[batch, length, width]`: `[batch, length]`.
pub fn select_column(tape: &Tape, x: &Var, column: usize) -> Var {
    let (width, lead) = (x.value().width(), x.shape()[..x.shape().len() - 1].to_vec());
    assert!(column < width, "column {column} of {width}");
    let out = x.value().f32().iter().skip(column).step_by(width).copied().collect();
    let x2 = x.clone();
    tape.push(Tensor::from_f32(out, &lead), &[x], move |grad, grads| {
        grads.add_with(&x2, |sum| {
            for (s, g) in sum.f32_mut().iter_mut().skip(column).step_by(width).zip(grad.f32()) {
                *s += g;
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, noise};
    use super::*;

    #[test]
    fn rows_match_reference() {
        let rows = [2u32, 0, 2];
        check(
            &[noise(&[4, 3], 1)],
            |t, v| select_rows(t, &v[0], &rows),
            |x| rows.iter().flat_map(|&r| x[0][r as usize * 3..][..3].to_vec()).collect(),
        );
    }

    #[test]
    fn columns_match_reference() {
        check(
            &[noise(&[2, 3, 2], 1)],
            |t, v| select_column(t, &v[0], 1),
            |x| x[0].iter().skip(1).step_by(2).copied().collect(),
        );
    }
}
