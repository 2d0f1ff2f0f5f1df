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

/// `sum[ids[t]] += factor * grad[t]`, in an order that depends on `ids` alone. The ids were checked in the lookup.
pub(super) fn scatter(gpu: Gpu, grad: &Tensor, ids: &[u32], factor: f32, sum: &mut Tensor) {
    let width = grad.width();
    let (distinct, starts, order) = buckets(ids);
    // 32 columns a block, as the kernel says.
    let grid =
        Grid { blocks: [distinct.len() as u32, width.div_ceil(32) as u32, 1], threads: 256, shared: 0 };
    let (distinct, starts, order) = (gpu.upload(&distinct), gpu.upload(&starts), gpu.upload(&order));
    let kernel = if sum.dtype() == DType::F32 { "scatter" } else { "scatter_activations" };
    gpu.launch(
        SOURCE.of(grad.dtype()),
        kernel,
        grid,
        &[
            sum.memory_mut().into(),
            grad.memory().into(),
            (&distinct).into(),
            (&starts).into(),
            (&order).into(),
            factor.into(),
            width.into(),
        ],
    );
}

/// The distinct ids in rising order, where the tokens of each start in the last list (one more than there are
/// ids), and the tokens by id, rising for each.
fn buckets(ids: &[u32]) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&t| ids[t as usize]);
    let (mut distinct, mut starts) = (Vec::new(), Vec::new());
    for (at, &t) in order.iter().enumerate() {
        let id = ids[t as usize];
        if distinct.last() != Some(&id) {
            distinct.push(id);
            starts.push(at as u32);
        }
    }
    starts.push(ids.len() as u32);
    (distinct, starts, order)
}

#[cfg(test)]
mod tests {
    use super::buckets;

    #[test]
    fn buckets_have_every_token_once_under_its_id() {
        let (distinct, starts, order) = buckets(&[7, 2, 7, 0, 2, 7]);
        assert_eq!(distinct, [0, 2, 7]);
        assert_eq!(starts, [0, 1, 3, 6]);
        assert_eq!(order, [3, 1, 4, 0, 2, 5]);
        assert_eq!(buckets(&[]), (vec![], vec![0], vec![]));
    }
}
