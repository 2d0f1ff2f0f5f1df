use super::RotaryTable;
use crate::cuda::{Gpu, Grid, Source, source};
use crate::{Device, Tensor};

pub(crate) static SOURCE: Source = source!("rotary");

pub(super) fn rotate(gpu: Gpu, x: &Tensor, positions: &[u32], table: &RotaryTable, sign: f32) -> Tensor {
    let rows = table.cos.rows();
    assert!(positions.iter().all(|&p| (p as usize) < rows), "rotary: a position is beyond the table");
    let device = Device::Cuda(gpu);
    let out = Tensor::stale_of(gpu, x.dtype(), x.shape());
    let (cos, sin, positions) = (table.cos.to(device), table.sin.to(device), gpu.upload(positions));
    // One thread for each pair that turns together.
    let n = x.len() / 2;
    gpu.launch(
        SOURCE.of(x.dtype()),
        "rotate",
        Grid::elements(n),
        &[
            out.memory().into(),
            x.memory().into(),
            (&positions).into(),
            cos.memory().into(),
            sin.memory().into(),
            n.into(),
            (x.width() / 2).into(),
            table.half.into(),
            sign.into(),
        ],
    );
    out
}
