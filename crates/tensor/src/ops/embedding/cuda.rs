use super::Rows;
use crate::cuda::{Arg, Gpu, Grid, Source, source};
use crate::{DType, Tensor};

pub(crate) static SOURCE: Source = source!("embedding");

/// Lookups that the kernel takes.
const MOST: usize = 4;

pub(super) fn forward(gpu: Gpu, lookups: &[Rows], tokens: usize, width: usize, element: DType) -> Tensor {
    assert!(lookups.len() <= MOST, "{} lookups", lookups.len());
    let out = Tensor::stale_of(gpu, element, &[tokens, width]);
    let mut uploaded = Vec::new();
    let mut arguments: Vec<Arg> = vec![out.memory().into()];
    for l in lookups {
        // The kernel does not look; a slice on the CPU would.
        let entries = l.table.rows();
        assert!(l.ids.iter().all(|&id| (id as usize) < entries), "id outside 0..{entries}");
        let ids = gpu.upload(l.ids);
        arguments.extend([Arg::from(l.table.memory()), (&ids).into(), l.factor.into()]);
        uploaded.push(ids);
    }
    for _ in lookups.len()..MOST {
        arguments.extend([Arg::Pointer(0), Arg::Pointer(0), 0.0f32.into()]);
    }
    arguments.push(width.into());
    let kernel = match lookups[0].table.dtype() {
        DType::F32 => "gather",
        _ => "gather_activations",
    };
    gpu.launch(SOURCE.of(element), kernel, Grid::blocks(tokens), &arguments);
    out
}

/// Rows that one block adds up; an id with more has them added in parts first.
const ROWS: usize = 128;

/// `sum[ids[t]] += factor * grad[t]`, in an order that depends on `ids` alone. The ids were checked in the lookup.
pub(super) fn scatter(gpu: Gpu, grad: &Tensor, ids: &[u32], factor: f32, sum: &mut Tensor) {
    scatter_of(gpu, grad, ids, ids.len(), factor, sum);
}

/// [`scatter`] where no id has more than `most` rows. What is launched depends on sizes alone, except for how many blocks:
/// a pass that is replayed has other ids ([`crate::cuda::Replay`]).
fn scatter_of(gpu: Gpu, grad: &Tensor, ids: &[u32], most: usize, factor: f32, sum: &mut Tensor) {
    // Parts are f32, so that what they go to must be too.
    let wide = sum.dtype() == DType::F32;
    let in_parts = wide && most > ROWS;
    // There may be fewer ids than rows: as many as these ids make.
    let room = grad.rows();
    let Buckets { ids: of_parts, starts, order } = buckets(ids, if in_parts { ROWS } else { usize::MAX });
    let add = |to: &Tensor, rows: &[u32], factor: f32| {
        let width = grad.width();
        // Columns of a block, as the kernel says.
        let pack = 16 / grad.dtype().size();
        let columns = if width.is_multiple_of(pack) { 32 * pack } else { 32 };
        let grid =
            Grid { blocks: [rows.len() as u32, width.div_ceil(columns) as u32, 1], threads: 256, shared: 0 };
        let rows = gpu.upload_of(rows, room);
        let (starts, order) = (gpu.upload_of(&starts, room + 1), gpu.upload_of(&order, room));
        let kernel = if wide { "scatter" } else { "scatter_activations" };
        gpu.launch(
            SOURCE.of(grad.dtype()),
            kernel,
            grid,
            &[
                to.memory().into(),
                grad.memory().into(),
                (&rows).into(),
                (&starts).into(),
                (&order).into(),
                factor.into(),
                width.into(),
            ],
        );
    };
    if !in_parts {
        sum.memory_mut();
        return add(sum, &of_parts, factor);
    }
    // As many as there can be.
    let parts = sum.rows().min(room) + room / ROWS;
    let parts = Tensor::zeros_of(gpu, DType::F32, &[parts, grad.width()]);
    add(&parts, &(0..of_parts.len() as u32).collect::<Vec<u32>>(), factor);
    scatter_of(gpu, &parts, &of_parts, most.div_ceil(ROWS), 1.0, sum);
}

struct Buckets {
    /// The id of each bucket, rising.
    ids: Vec<u32>,
    /// Where its tokens start in `order`; one more at the end.
    starts: Vec<u32>,
    /// The tokens by id, rising for each.
    order: Vec<u32>,
}

/// Tokens by their id, at most `most` in a bucket.
fn buckets(ids: &[u32], most: usize) -> Buckets {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&t| ids[t as usize]);
    let (mut of, mut starts) = (Vec::new(), Vec::new());
    for (at, &t) in order.iter().enumerate() {
        let id = ids[t as usize];
        if of.last() != Some(&id) || at - *starts.last().expect("of the last id") as usize == most {
            of.push(id);
            starts.push(at as u32);
        }
    }
    starts.push(ids.len() as u32);
    Buckets { ids: of, starts, order }
}

#[cfg(test)]
mod tests {
    use super::buckets;

    #[test]
    fn buckets_have_every_token_once_under_its_id() {
        let b = buckets(&[7, 2, 7, 0, 2, 7], 10);
        assert_eq!((b.ids, b.starts, b.order), (vec![0, 2, 7], vec![0, 1, 3, 6], vec![3, 1, 4, 0, 2, 5]));
        let b = buckets(&[7, 2, 7, 0, 2, 7], 2);
        assert_eq!((b.ids, b.starts), (vec![0, 2, 7, 7], vec![0, 1, 3, 5, 6]));
        let b = buckets(&[], 2);
        assert_eq!((b.ids, b.starts, b.order), (vec![], vec![0], vec![]));
    }
}
