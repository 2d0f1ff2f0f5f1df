//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the half-split layout of Llama:
//! element `i` of the first half of a head is rotated with element `i` of its second half.

mod cpu;
mod cuda;

pub(crate) use cuda::SOURCE;

use crate::{Device, Tape, Tensor, Var};

/// Cosines and sines of every position and frequency.
#[derive(Clone)]
pub struct RotaryTable {
    cos: Tensor,
    sin: Tensor,
    half: usize,
}

impl RotaryTable {
    /// Angles `position * frequency[i]` for `positions` positions; a head has `2 * frequency.len()` elements.
    pub fn new(positions: usize, frequency: &[f64]) -> Self {
        let half = frequency.len();
        // Angles in f32, as the models were trained with.
        let angle = |i: usize| ((i / half) as f32 * frequency[i % half] as f32) as f64;
        let table = |f: fn(f64) -> f64| {
            Tensor::from_f32((0..positions * half).map(|i| f(angle(i)) as f32).collect(), &[positions, half])
        };
        RotaryTable { cos: table(f64::cos), sin: table(f64::sin), half }
    }
}

/// Rotates every head of `x` `[tokens, heads * head_dim]`; token `t` stands at `positions[t]`.
pub fn rotary(tape: &Tape, x: &Var, positions: &[u32], table: &RotaryTable) -> Var {
    let y = apply(x.value(), positions, table);
    let (x2, positions, table) = (x.clone(), positions.to_vec(), table.clone());
    // A rotation's transpose is the rotation back.
    tape.push(y, &[x], move |grad, grads| grads.add(&x2, turn(grad, &positions, &table, -1.0)))
}

/// [`rotary`] without a tape.
pub fn apply(x: &Tensor, positions: &[u32], table: &RotaryTable) -> Tensor {
    assert_eq!(x.rows(), positions.len(), "rotary: one position per token");
    turn(x, positions, table, 1.0)
}

/// Rotates by the table's angles times `sign`.
fn turn(x: &Tensor, positions: &[u32], table: &RotaryTable, sign: f32) -> Tensor {
    let head = 2 * table.half;
    assert_eq!(x.width() % head, 0, "rotary: heads of {head} in {:?}", x.shape());
    match x.device() {
        Device::Cpu => cpu::rotate(x, positions, table.cos.f32(), table.sin.f32(), table.half, sign),
        Device::Cuda(gpu) => cuda::rotate(gpu, x, positions, table, sign),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{check_both, noise};
    use super::*;

    #[test]
    fn matches_reference() {
        let frequency = [1.0, 0.1, 0.01];
        let table = RotaryTable::new(10, &frequency);
        let positions = [3u32, 0, 9, 1];
        check_both(
            &[noise(&[4, 12], 1)],
            &[0],
            |t, v| rotary(t, &v[0], &positions, &table),
            |x| {
                let mut y = x[0].clone();
                for t in 0..4 {
                    for head in 0..2 {
                        for i in 0..3 {
                            let (a, b) = (t * 12 + head * 6 + i, t * 12 + head * 6 + 3 + i);
                            let angle = positions[t] as f64 * frequency[i];
                            y[a] = x[0][a] * angle.cos() - x[0][b] * angle.sin();
                            y[b] = x[0][b] * angle.cos() + x[0][a] * angle.sin();
                        }
                    }
                }
                y
            },
        );
    }
}
