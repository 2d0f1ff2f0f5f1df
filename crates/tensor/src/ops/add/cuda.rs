use crate::Tensor;
use crate::cuda::{Gpu, Grid, Source, source};

pub(crate) static SOURCE: Source = source!("add");

pub(super) fn add(gpu: Gpu, a: &Tensor, b: &Tensor) -> Tensor {
    let out = Tensor::stale_of(gpu, a.dtype(), a.shape());
    launch(gpu, &out, a, b);
    out
}

pub(super) fn accumulate(gpu: Gpu, sum: &mut Tensor, x: &Tensor) {
    // Writing in place would copy first.
    if sum.shared() {
        *sum = add(gpu, sum, x);
    } else {
        launch(gpu, sum, sum, x);
    }
}

fn launch(gpu: Gpu, out: &Tensor, a: &Tensor, b: &Tensor) {
    assert_eq!(a.dtype(), b.dtype(), "add");
    let n = a.len();
    let arguments = [out.memory().into(), a.memory().into(), b.memory().into(), n.into()];
    gpu.launch(SOURCE.of(a.dtype()), "add", Grid::packs(n), &arguments);
}
