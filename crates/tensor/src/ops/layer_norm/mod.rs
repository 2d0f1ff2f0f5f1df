//! Layer normalisation over rows (Ba et al. 2016, arXiv 1607.06450), with the residual sum before it fused in.

mod cpu;
mod cuda;

pub(crate) use cpu::lane_sum;
pub(crate) use cuda::SOURCE;

use crate::{Device, Tape, Tensor, Var};

/// What backward needs.
struct Saved {
    /// The normalised rows, before gain and bias.
    normal: Tensor,
    /// 1 / standard deviation of each row, `[rows]`.
    rstd: Tensor,
}

/// `(x + residual - mean) / sqrt(var + eps) * gain + bias`, mean and (biased) variance over each row.
/// `gain` and `bias` are `[width]`. With `half` the summands are rounded to f16 first, as the engine holds them; the
/// gradient passes straight through that. What is computed in bf16 rounds by that instead.
pub fn layer_norm(
    tape: &Tape,
    x: &Var,
    residual: Option<&Var>,
    gain: &Var,
    bias: &Var,
    eps: f32,
    half: bool,
) -> Var {
    let inputs: Vec<&Var> = [x, gain, bias].into_iter().chain(residual).collect();
    let keep = tape.tracks(&inputs);
    let values = [gain, bias].map(Var::value);
    let (y, saved) = compute(x.value(), residual.map(Var::value), values, eps, half, keep);
    let (x2, r2, g2, b2) = (x.clone(), residual.cloned(), gain.clone(), bias.clone());
    tape.push(y, &inputs, move |grad, grads| {
        let saved = saved.expect("kept when tracked");
        let (dx, sums) = match grad.device() {
            Device::Cpu => {
                let (dx, dgain, dbias) = cpu::backward(grad, &saved, g2.value());
                grads.add(&g2, dgain);
                grads.add(&b2, dbias);
                (dx, None)
            }
            Device::Cuda(gpu) => {
                let (dx, [dgain, dbias, sums]) = cuda::backward(gpu, grad, &saved, g2.value());
                grads.add_sums(&g2, dgain);
                grads.add_sums(&b2, dbias);
                (dx, Some(sums))
            }
        };
        if let Some(r) = &r2 {
            grads.add(r, dx.clone());
        }
        match sums {
            Some(sums) => grads.add_with_sums(&x2, dx, sums),
            None => grads.add(&x2, dx),
        }
    })
}

/// [`layer_norm`] without a tape.
pub fn apply(
    x: &Tensor,
    residual: Option<&Tensor>,
    gain: &Tensor,
    bias: &Tensor,
    eps: f32,
    half: bool,
) -> Tensor {
    compute(x, residual, [gain, bias], eps, half, false).0
}

fn compute(
    x: &Tensor,
    residual: Option<&Tensor>,
    [gain, bias]: [&Tensor; 2],
    eps: f32,
    half: bool,
    keep: bool,
) -> (Tensor, Option<Saved>) {
    assert_eq!(x.width(), gain.len(), "layer_norm: {:?}, {:?}", x.shape(), gain.shape());
    match x.device() {
        Device::Cpu => cpu::forward(x, residual, gain, bias, eps, half, keep),
        Device::Cuda(gpu) => cuda::forward(gpu, x, residual, gain, bias, eps, half, keep),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::{check, check_bf16, devices, noise};
    use super::super::linear::linear;
    use super::super::weighted_sum::dot;
    use super::*;

    fn reference(x: &[Vec<f64>], eps: f64) -> Vec<f64> {
        let (gain, bias) = (&x[1], &x[2]);
        let w = gain.len();
        let sum: Vec<f64> = match x.get(3) {
            Some(r) => x[0].iter().zip(r).map(|(a, b)| a + b).collect(),
            None => x[0].clone(),
        };
        sum.chunks(w)
            .flat_map(|row| {
                let mean = row.iter().sum::<f64>() / w as f64;
                let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / w as f64;
                let r = 1.0 / (var + eps).sqrt();
                row.iter().enumerate().map(|(i, v)| (v - mean) * r * gain[i] + bias[i]).collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn matches_reference() {
        for width in [3, 8, 37, 264] {
            let inputs =
                [noise(&[4, width], 1), noise(&[width], 2), noise(&[width], 3), noise(&[4, width], 4)];
            check(
                &inputs,
                |t, v| layer_norm(t, &v[0], Some(&v[3]), &v[1], &v[2], 1e-5, false),
                |x| reference(x, 1e-5f32 as f64),
            );
            check_bf16(
                &inputs,
                &[0, 3],
                |t, v| layer_norm(t, &v[0], Some(&v[3]), &v[1], &v[2], 1e-5, false),
                |x| reference(x, 1e-5f32 as f64),
            );
            check(
                &inputs[..3],
                |t, v| layer_norm(t, &v[0], None, &v[1], &v[2], 1e-5, false),
                |x| reference(x, 1e-5f32 as f64),
            );
        }
    }

    /// Rows in bf16 that a warp holds in its registers, several for each warp, and longer ones. The bias of the map
    /// before gets sums of the same pass.
    #[test]
    fn gradients_of_many_rows_are_the_cpus() {
        for device in devices().into_iter().filter(|d| *d != Device::Cpu) {
            for (rows, width) in [(1, 384), (300, 512), (5000, 768), (2500, 1000), (70, 1024), (2100, 1032)] {
                let round = |t: Tensor| t.to_bf16().to_f32();
                let (x, w) = (round(noise(&[rows, 8], 1)), round(noise(&[width, 8], 2)));
                let weights = round(noise(&[rows, width], 3));
                let vectors = [4, 5, 6].map(|seed| noise(&[width], seed));
                let run = |device: Device, bf16: bool| {
                    let tape = Tape::recording();
                    let [x, w] = [&x, &w].map(|t| if bf16 { t.to_bf16() } else { t.clone() }.to(device));
                    let (x, w) = (tape.leaf(x), tape.leaf(w));
                    let [before, gain, bias] = vectors.each_ref().map(|t| tape.leaf(t.to(device)));
                    let y = linear(&tape, &x, &w, Some(&before));
                    let y = layer_norm(&tape, &y, None, &gain, &bias, 1e-5, false);
                    let loss = dot(&tape, &y, &weights);
                    let mut grads = tape.backward(&loss);
                    [&w, &before, &gain, &bias].map(|v| grads.take(v).unwrap().to(Device::Cpu).to_f32())
                };
                let (got, want) = (run(device, true), run(Device::Cpu, false));
                for (what, (got, want)) in
                    ["weight", "bias before", "gain", "bias"].iter().zip(got.iter().zip(&want))
                {
                    let want: Vec<f64> = want.f32().iter().map(|&x| x as f64).collect();
                    let size = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                    let off =
                        got.f32().iter().zip(&want).map(|(g, w)| (*g as f64 - w).abs()).fold(0.0, f64::max);
                    assert!(off <= 0.02 * size, "{device:?} {rows} x {width}, {what}: {off} of {size}");
                }
            }
        }
    }
}
