use crate::Tensor;
use crate::cpu::par_rows;

pub(super) fn rotate(
    x: &Tensor,
    positions: &[u32],
    cos: &[f32],
    sin: &[f32],
    half: usize,
    sign: f32,
) -> Tensor {
    let width = x.width();
    let mut out = Tensor::stale(x.shape());
    let x = x.f32();
    par_rows(out.f32_mut(), width, |first, block| {
        for (k, row) in block.chunks_exact_mut(width).enumerate() {
            let t = first + k;
            let at = positions[t] as usize * half;
            let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
            let heads = row.chunks_exact_mut(2 * half).zip(x[t * width..].chunks_exact(2 * half));
            for (out, x) in heads {
                for i in 0..half {
                    let (a, b, s) = (x[i], x[half + i], sign * sin[i]);
                    out[i] = a * cos[i] - b * s;
                    out[half + i] = b * cos[i] + a * s;
                }
            }
        }
    });
    out
}
