use super::{Lookup, Norm, Out, Summand};
use crate::cuda::{Arg, Gpu, Grid, Source, Variant};
use crate::{DType, Tensor};

pub(crate) static SOURCE: Source = Source {
    name: "norm_codes",
    text: concat!(include_str!("row.cuh"), "\n#line 1 \"kernel.cu\"\n", include_str!("kernel.cu")),
};

/// Rows of a block at a time: a warp each.
const ROWS: usize = 4;

/// Blocks of a multiprocessor, as registers allow.
fn blocks(width: usize) -> usize {
    if width <= 768 { 4 } else { 3 }
}

pub(crate) const ABSENT: Arg = Arg::Pointer(0);

fn variant(width: usize, norm: usize, coded: bool) -> Variant {
    SOURCE.with(
        DType::F32,
        &[("WIDTH", width), ("NORM", norm), ("CODED", coded.into()), ("BLOCKS", blocks(width))],
    )
}

/// For the test that compiles every kernel.
#[cfg(test)]
pub(crate) fn variants() -> Vec<Variant> {
    [(768, 1, true), (768, 1, false), (1024, 1, true), (384, 0, false), (101, 1, true), (4096, 2, false)]
        .map(|(width, norm, coded)| variant(width, norm, coded))
        .into()
}

/// Which norm, gain, bias, eps.
pub(crate) fn parts(norm: Option<Norm>) -> (usize, [Arg; 3]) {
    match norm {
        None => (0, [ABSENT, ABSENT, 0.0f32.into()]),
        Some(Norm::Layer { gain, bias, eps }) => {
            (1, [gain.memory().into(), bias.memory().into(), eps.into()])
        }
        Some(Norm::Rms { gain, eps }) => (2, [gain.memory().into(), ABSENT, eps.into()]),
    }
}

/// Hidden states, codes, and their step.
pub(crate) fn outputs(out: Out) -> ([Arg; 2], Arg) {
    let hidden = out.hidden.map_or(ABSENT, |h| h.memory().into());
    let codes = out.codes.map_or(ABSENT, |c| c.to.memory().into());
    ([hidden, codes], out.codes.map_or(1.0, |c| c.step).into())
}

/// As many blocks as run at a time: each keeps its gain and bias and goes on to other rows.
fn grid(gpu: Gpu, rows: usize, width: usize) -> Grid {
    let most = blocks(width) * gpu.multiprocessors();
    Grid { threads: 32 * ROWS as u32, ..Grid::blocks(rows.div_ceil(ROWS).min(most)) }
}

pub(super) fn add_norm(gpu: Gpu, x: Summand, residual: Option<&Tensor>, norm: Norm, out: Out) {
    let (which, norm) = parts(Some(norm));
    let (outputs, step) = outputs(out);
    let mut arguments = outputs.to_vec();
    let (x, x_step, coded) = match x {
        Summand::Half(x) => (x, 1.0, false),
        Summand::Codes(x, step) => (x, step, true),
    };
    arguments.extend([x.memory().into(), Arg::from(x_step), residual.map_or(ABSENT, |r| r.memory().into())]);
    arguments.extend(norm);
    arguments.extend([step, (x.rows() as i32).into()]);
    let variant = variant(x.width(), which, coded);
    gpu.launch_early(variant, "add_norm", grid(gpu, x.rows(), x.width()), &arguments);
}

pub(super) fn embed_norm(gpu: Gpu, lookups: [Option<Lookup>; 3], scale: f32, norm: Option<Norm>, out: Out) {
    let (which, norm) = parts(norm);
    let (outputs, step) = outputs(out);
    let words = lookups[0].expect("there is always a word");
    let (rows, width) = (words.ids.len(), words.table.width());
    let mut arguments = outputs.to_vec();
    arguments.extend(lookups.map(|l| l.map_or(ABSENT, |l| l.table.memory().into())));
    arguments.extend(lookups.map(|l| l.map_or(ABSENT, |l| l.ids.memory().into())));
    arguments.extend(lookups.map(|l| Arg::from(l.map_or(0, |l| l.table.rows() as i32))));
    arguments.push(scale.into());
    arguments.extend(norm);
    arguments.extend([step, (rows as i32).into()]);
    gpu.launch_early(variant(width, which, false), "embed_norm", grid(gpu, rows, width), &arguments);
}
