//! Picking rows (the first token of each sequence) or columns (start or end logits; one of several maps that were
//! computed together) of a matrix.

mod cpu;
mod cuda;

pub(crate) use cuda::SOURCE;

use super::embedding::{self, Rows};
use crate::{Device, Segments, Tape, Tensor, Var};

/// Rows `rows` of `x` `[.., width]` (leading dimensions flattened): `[rows.len(), width]`.
pub fn select_rows(tape: &Tape, x: &Var, rows: &[u32]) -> Var {
    let out = apply(x.value(), rows);
    let (x2, rows) = (x.clone(), rows.to_vec());
    tape.push(out, &[x], move |grad, grads| {
        grads.add_with(&x2, |sum| embedding::scatter(grad, &rows, 1.0, sum));
    })
}

/// [`select_rows`] without a tape: a lookup with `x` as the table.
pub fn apply(x: &Tensor, rows: &[u32]) -> Tensor {
    embedding::apply(&[Rows { table: x, ids: rows, factor: 1.0 }], x.dtype())
}

/// The first row of each sequence, on a GPU: `x` `[tokens, width]` and `out` `[sequences, width]` of the same element type,
/// both as large as `segments` may need. Rows of `out` beyond the batch get some row of `x`.
pub fn first_rows(x: &Tensor, segments: &Segments, out: &Tensor) {
    assert_eq!(x.rows(), segments.tokens(), "first rows of {x:?}");
    assert_eq!(
        (out.dtype(), out.rows(), out.width()),
        (x.dtype(), segments.sequences(), x.width()),
        "first rows of {x:?}"
    );
    match x.device() {
        Device::Cpu => panic!("first rows: {x:?} is not on a GPU"),
        Device::Cuda(gpu) => cuda::first_rows(gpu, x, segments, out),
    }
}

/// Column `column` of `x` `[batch, length, width]`: `[batch, length]`.
pub fn select_column(tape: &Tape, x: &Var, column: usize) -> Var {
    let (width, lead) = (x.value().width(), &x.shape()[..x.shape().len() - 1]);
    assert!(column < width, "column {column} of {width}");
    let out = match x.value().device() {
        Device::Cpu => cpu::column(x.value(), column, lead),
        Device::Cuda(gpu) => cuda::column(gpu, x.value(), column, lead),
    };
    let x2 = x.clone();
    tape.push(out, &[x], move |grad, grads| {
        grads.add_with(&x2, |sum| match grad.device() {
            Device::Cpu => cpu::add_column(grad, column, sum),
            Device::Cuda(gpu) => cuda::add_column(gpu, grad, column, sum),
        });
    })
}

/// `x` `[.., width]` cut along its rows into tensors of `widths` columns.
pub fn split_columns(tape: &Tape, x: &Var, widths: &[usize]) -> Vec<Var> {
    assert_eq!(widths.iter().sum::<usize>(), x.value().width(), "split of {:?} into {widths:?}", x.shape());
    let lead = &x.shape()[..x.shape().len() - 1];
    let part = |first: usize, count: usize| {
        let shape = [lead, &[count]].concat();
        let out = match x.value().device() {
            Device::Cpu => {
                let mut out = Tensor::stale(&shape);
                cpu::columns(x.value(), first, &mut out);
                out
            }
            Device::Cuda(gpu) => {
                let out = Tensor::stale_of(gpu, x.value().dtype(), &shape);
                cuda::columns(gpu, x.value(), first, &out);
                out
            }
        };
        let x2 = x.clone();
        tape.push(out, &[x], move |grad, grads| {
            grads.add_with(&x2, |sum| match grad.device() {
                Device::Cpu => cpu::add_columns(grad, first, sum),
                Device::Cuda(gpu) => cuda::add_columns(gpu, grad, first, sum),
            });
        })
    };
    let starts = widths.iter().scan(0, |at, n| Some(std::mem::replace(at, *at + n)));
    widths.iter().zip(starts).map(|(&count, first)| part(first, count)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::check::{check_both, noise};
    use super::*;

    #[test]
    fn rows_match_reference() {
        let rows = [2u32, 0, 2];
        check_both(
            &[noise(&[4, 3], 1)],
            &[0],
            |t, v| select_rows(t, &v[0], &rows),
            |x| rows.iter().flat_map(|&r| x[0][r as usize * 3..][..3].to_vec()).collect(),
        );
    }

    #[test]
    fn first_rows_are_copied_for_every_width_and_batch() {
        for gpu in super::super::check::devices().into_iter().filter(|d| *d != Device::Cpu) {
            for width in [384, 5] {
                let x = noise(&[40, width], 1).to_f16();
                let size = Segments::size(6, 40);
                let mut table = vec![0; size];
                let segments = |table| Segments::new(Tensor::from_i32(table, &[size]).to(gpu), 6, 40);
                segments(table.clone()).describe(&[7, 1, 20], &mut table);
                let out = Tensor::zeros(&[6, width]).to_f16().to(gpu);
                first_rows(&x.to(gpu), &segments(table), &out);
                let out = out.to(Device::Cpu);
                for (sequence, row) in [0, 7, 8].into_iter().enumerate() {
                    assert_eq!(out.f16()[sequence * width..][..width], x.f16()[row * width..][..width]);
                }
            }
            gpu.check().unwrap();
        }
    }

    #[test]
    fn parts_match_reference() {
        let (widths, x) = ([2, 1, 4], [noise(&[3, 7], 1)]);
        for (which, first) in [0, 2, 3].into_iter().enumerate() {
            let columns = first..first + widths[which];
            check_both(
                &x,
                &[0],
                |t, v| split_columns(t, &v[0], &widths)[which].clone(),
                |x| x[0].chunks(7).flat_map(|row| row[columns.clone()].to_vec()).collect(),
            );
        }
    }

    #[test]
    fn columns_match_reference() {
        check_both(
            &[noise(&[2, 3, 2], 1)],
            &[0],
            |t, v| select_column(t, &v[0], 1),
            |x| x[0].iter().skip(1).step_by(2).copied().collect(),
        );
    }
}
