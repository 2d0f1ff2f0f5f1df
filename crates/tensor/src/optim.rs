//! AdamW and gradient clipping (Loshchilov and Hutter 2019, arXiv 1711.05101), and random initial weights.

use crate::cpu::{fold_rows, par_elements, random, simd};
use crate::cuda::{Arg, Gpu, Grid, Memory, Source};
use crate::{Device, Tensor};

/// Settings of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Number of this step, from 1, for bias correction.
    pub step: u32,
    /// Gradients of weights whose global norm is larger are scaled down to it.
    pub max_norm: Option<f32>,
}

/// First and second moment of one tensor's gradient.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Tensor,
    /// Running mean of its square.
    pub second: Tensor,
}

impl Moments {
    /// Zero moments for `param`, on its device.
    pub fn new(param: &Tensor) -> Self {
        let zeros = || Tensor::zeros_on(param.device(), param.shape());
        Moments { first: zeros(), second: zeros() }
    }

    /// The same moments on `device`.
    pub fn to(&self, device: Device) -> Self {
        Moments { first: self.first.to(device), second: self.second.to(device) }
    }
}

/// One f32 tensor that a step changes.
pub struct Slot<'a> {
    /// The tensor.
    pub param: &'a mut Tensor,
    /// Its gradient.
    pub grad: &'a Tensor,
    /// Its moments.
    pub moments: &'a mut Moments,
    /// How it moves.
    pub update: Update,
}

/// How a step changes a tensor; `m'` and `v'` are its bias-corrected moments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Update {
    /// `p -= lr * (m' / (sqrt(v') + eps) + decay * p)`.
    Weight {
        /// Decoupled weight decay, multiplied by the learning rate.
        decay: f32,
    },
    /// The same step on the logarithm of a positive tensor: `p *= exp(-lr * m' / (sqrt(v') + eps))` with the
    /// moments of the gradient of `ln p`. `p` stays positive whatever the gradient; neither decay nor clipping,
    /// and its gradient has no part in the global norm, except that the norm is NaN if it is not finite.
    Positive {
        /// Its own learning rate.
        learning_rate: f32,
    },
}

/// The gradient of a step size is scaled by 1/sqrt(n * 127) and by the step size itself: usually below 1e-8, where
/// the usual `eps` would swallow the update. It only has to prevent 0 / 0 here.
const POSITIVE_EPS: f32 = 1e-15;

pub(crate) static SOURCE: Source = Source { name: "optim", text: include_str!("optim.cu") };

/// Elements of a tensor that one block of threads updates.
const CHUNK: usize = 8192;

impl AdamW {
    /// Changes every slot's tensor and moments, all on the device of `loss`, and gives the global norm of the
    /// weights' gradients, f32 `[1]`. If `loss` `[1]` or the norm is not finite, nothing is changed. Does not wait
    /// for a GPU.
    pub fn step(&self, loss: &Tensor, slots: &mut [Slot]) -> Tensor {
        self.step_of(loss, None, slots)
    }

    /// Share number `share` of `shares` of a sum over all of a model's gradients: the squares of those of the weights in
    /// `slots`, f32 `[2 * shares]` on `device`, zeros but for its own two places. What all shares add up to is the same
    /// whatever adds them, as f32 would not be: the sum is in f64, held as f32 and what that leaves. Does not wait for a
    /// GPU.
    pub fn squares(device: Device, slots: &mut [Slot], share: usize, shares: usize) -> Tensor {
        assert!(share < shares, "share {share} of {shares}");
        match device {
            Device::Cpu => {
                let mut sums = vec![0.0; 2 * shares];
                let total = squares_cpu(slots);
                let high = total as f32;
                let low = if high.is_finite() { (total - f64::from(high)) as f32 } else { 0.0 };
                sums[2 * share..][..2].copy_from_slice(&[high, low]);
                Tensor::from_f32(sums, &[2 * shares])
            }
            Device::Cuda(gpu) => Table::new(gpu, 0.0, slots).squares(gpu, share, shares),
        }
    }

    /// [`AdamW::step`] of some of a model's tensors. `squares`, if given, are the sum of [`AdamW::squares`] of all of them.
    pub fn step_of(&self, loss: &Tensor, squares: Option<&Tensor>, slots: &mut [Slot]) -> Tensor {
        for s in slots.iter() {
            assert_eq!(s.param.shape(), s.grad.shape(), "AdamW: parameter and gradient");
            assert_eq!(s.param.shape(), s.moments.first.shape(), "AdamW: parameter and moments");
        }
        match loss.device() {
            Device::Cpu => self.step_cpu(loss.item(), squares, slots),
            Device::Cuda(gpu) => self.step_cuda(gpu, loss, squares, slots),
        }
    }

    fn step_cpu(&self, loss: f32, squares: Option<&Tensor>, slots: &mut [Slot]) -> Tensor {
        let of_all = |shares: &Tensor| shares.f32().iter().map(|&s| f64::from(s)).sum::<f64>();
        let norm = squares.map_or_else(|| squares_cpu(slots), of_all).sqrt() as f32;
        if loss.is_finite() && norm.is_finite() {
            let clip = self.max_norm.filter(|max| norm > *max).map_or(1.0, |max| max / norm);
            for s in slots {
                self.update(s, clip);
            }
        }
        Tensor::scalar(norm)
    }

    fn update(&self, slot: &mut Slot, clip: f32) {
        let Slot { param, grad, moments, update } = slot;
        let lr = self.learning_rate;
        match *update {
            Update::Weight { decay } => {
                self.apply(param, grad, moments, clip, self.eps, |p, d| p - lr * (d + decay * p));
            }
            Update::Positive { learning_rate: lr } => {
                let of_log = grad.f32().iter().zip(param.f32()).map(|(g, p)| g * p).collect();
                let grad = Tensor::from_f32(of_log, grad.shape());
                // A step below the smallest normal number would divide to infinity in the quantiser.
                let step = |p: f32, d: f32| (p * (-lr * d).exp()).clamp(1e-30, 1e30);
                self.apply(param, &grad, moments, 1.0, POSITIVE_EPS, step);
            }
        }
    }

    fn apply(
        &self,
        param: &mut Tensor,
        grad: &Tensor,
        moments: &mut Moments,
        clip: f32,
        eps: f32,
        step: impl Fn(f32, f32) -> f32 + Sync,
    ) {
        let AdamW { beta1, beta2, .. } = *self;
        let (c1, c2) = self.corrections();
        let g = grad.f32();
        par_elements(moments.first.f32_mut(), |at, m| {
            simd(|| {
                for (m, g) in m.iter_mut().zip(&g[at..]) {
                    *m = beta1 * *m + (1.0 - beta1) * (clip * g);
                }
            })
        });
        par_elements(moments.second.f32_mut(), |at, v| {
            simd(|| {
                for (v, g) in v.iter_mut().zip(&g[at..]) {
                    let g = clip * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                }
            })
        });
        let (m, v) = (moments.first.f32(), moments.second.f32());
        par_elements(param.f32_mut(), |at, p| {
            simd(|| {
                for ((p, m), v) in p.iter_mut().zip(&m[at..]).zip(&v[at..]) {
                    *p = step(*p, m * c1 / ((v * c2).sqrt() + eps));
                }
            })
        });
    }

    /// Three launches for any number of tensors: they find their tensor in a table.
    fn step_cuda(&self, gpu: Gpu, loss: &Tensor, squares: Option<&Tensor>, slots: &mut [Slot]) -> Tensor {
        let table = Table::new(gpu, self.learning_rate, slots);
        let device = Device::Cuda(gpu);
        let [norm, factor] = [(); 2].map(|()| Tensor::stale_on(device, &[1]));
        let parts = match squares {
            None => table.parts(gpu),
            Some(_) => gpu.allocate(0),
        };
        let max = self.max_norm.unwrap_or(f32::INFINITY);
        let arguments = [
            norm.memory().into(),
            factor.memory().into(),
            (&parts).into(),
            table.blocks.into(),
            squares.map_or(Arg::Pointer(0), |s| s.memory().into()),
            squares.map_or(0, |s| s.len() as i32 / 2).into(),
            loss.memory().into(),
            max.into(),
        ];
        gpu.launch(&SOURCE, "clip", Grid { threads: 1024, ..Grid::blocks(1) }, &arguments);
        let (c1, c2) = self.corrections();
        gpu.launch(
            &SOURCE,
            "adamw",
            Grid::blocks(table.blocks),
            &[
                (&table.memory).into(),
                table.entries.into(),
                factor.memory().into(),
                self.beta1.into(),
                self.beta2.into(),
                self.eps.into(),
                POSITIVE_EPS.into(),
                c1.into(),
                c2.into(),
            ],
        );
        norm
    }

    /// Factors that undo the moments' bias towards their start at 0.
    fn corrections(&self) -> (f32, f32) {
        let of = |beta: f32| 1.0 / (1.0 - beta.powi(self.step as i32));
        (of(self.beta1), of(self.beta2))
    }
}

/// The slots of a step on a GPU, where its kernels find them.
struct Table {
    memory: Memory,
    entries: i32,
    /// Blocks of threads that all tensors take.
    blocks: usize,
}

impl Table {
    fn new(gpu: Gpu, learning_rate: f32, slots: &mut [Slot]) -> Table {
        let mut blocks = 0;
        let mut table: Vec<u64> = Vec::with_capacity(slots.len() * 7);
        for s in slots.iter_mut() {
            let (positive, lr, decay) = match s.update {
                Update::Weight { decay } => (0, learning_rate, decay),
                Update::Positive { learning_rate } => (1, learning_rate, 0.0),
            };
            table.extend([
                s.param.memory_mut().address(),
                s.moments.first.memory_mut().address(),
                s.moments.second.memory_mut().address(),
                s.grad.memory().address(),
                s.param.len() as u64,
                u64::from(lr.to_bits()) | u64::from(decay.to_bits()) << 32,
                positive | (blocks as u64) << 32,
            ]);
            blocks += s.param.len().div_ceil(CHUNK);
        }
        Table { memory: gpu.upload(&table), entries: slots.len() as i32, blocks }
    }

    /// A sum of squares, in f64, of each block.
    fn parts(&self, gpu: Gpu) -> Memory {
        let parts = gpu.allocate(self.blocks * size_of::<f64>());
        let arguments = [(&parts).into(), (&self.memory).into(), self.entries.into()];
        gpu.launch(&SOURCE, "norms", Grid::blocks(self.blocks), &arguments);
        parts
    }

    fn squares(&self, gpu: Gpu, share: usize, shares: usize) -> Tensor {
        // Other threads' work may take the room of the parts once they are dropped.
        let (sums, parts) = (Tensor::stale_on(Device::Cuda(gpu), &[2 * shares]), self.parts(gpu));
        let [share, shares] = [share as i32, shares as i32].map(Arg::from);
        let arguments = [sums.memory().into(), share, shares, (&parts).into(), self.blocks.into()];
        gpu.launch(&SOURCE, "squares", Grid { threads: 1024, ..Grid::blocks(1) }, &arguments);
        sums
    }
}

/// Sum of squares of the gradients of weights in host memory.
fn squares_cpu(slots: &[Slot]) -> f64 {
    let part = |s: &Slot| match s.update {
        Update::Weight { .. } => square_sum(s.grad),
        // 0, and no number if one of them is none.
        Update::Positive { .. } => s.grad.f32().iter().map(|g| 0.0 * *g as f64).sum(),
    };
    slots.iter().map(part).sum()
}

/// Sum of squares of all elements, which are in host memory.
fn square_sum(x: &Tensor) -> f64 {
    let x = x.f32();
    let lanes = fold_rows(x.len().div_ceil(16), 16, |rows, sum| {
        for c in x[rows.start * 16..x.len().min(rows.end * 16)].chunks(16) {
            for (s, v) in sum.iter_mut().zip(c) {
                *s += v * v;
            }
        }
    });
    lanes.iter().map(|&l| l as f64).sum()
}

/// Normally distributed elements with mean 0, the same for the same `seed` (Box-Muller over the
/// counter-based generator).
pub fn normal(shape: &[usize], deviation: f32, seed: u64) -> Tensor {
    let key = seed.wrapping_mul(0xD134_2543_DE82_EF95).wrapping_add(1);
    let unit = |i: usize| (random(key, i as u32) as f64 + 0.5) / 4_294_967_296.0;
    let one = |i: usize| {
        (-2.0 * f64::ln(unit(2 * i))).sqrt() * (2.0 * std::f64::consts::PI * unit(2 * i + 1)).cos()
    };
    let mut out = Tensor::stale(shape);
    par_elements(out.f32_mut(), |at, part| {
        part.iter_mut().enumerate().for_each(|(i, x)| *x = one(at + i) as f32 * deviation);
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{close, devices, noise};

    const STEP: AdamW =
        AdamW { learning_rate: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, step: 1, max_norm: None };

    fn one(adam: AdamW, param: &mut Tensor, grad: &Tensor, moments: &mut Moments, update: Update) -> f32 {
        let loss = Tensor::scalar(1.0).to(param.device());
        adam.step(&loss, &mut [Slot { param, grad, moments, update }]).item()
    }

    /// Three steps of two tensors, one longer than a block's chunk, against the published recurrence in f64 with
    /// clipping by their global norm.
    #[test]
    fn follows_the_recurrence() {
        let lengths = [50, CHUNK + 4099];
        for device in devices() {
            let mut params: Vec<Tensor> = (0..2).map(|k| noise(&[lengths[k]], k as u64).to(device)).collect();
            let mut want: Vec<Vec<f64>> = (0..2)
                .map(|k| noise(&[lengths[k]], k as u64).f32().iter().map(|&x| x as f64).collect())
                .collect();
            let zeros = || lengths.map(|n| vec![0.0f64; n]);
            let (mut m, mut v) = (zeros(), zeros());
            let mut moments: Vec<Moments> = params.iter().map(Moments::new).collect();
            for step in 1..=3u32 {
                let grads: Vec<Tensor> =
                    (0..2).map(|k| noise(&[lengths[k]], 10 * (k as u64 + 1) + step as u64)).collect();
                let on: Vec<Tensor> = grads.iter().map(|g| g.to(device)).collect();
                let adam = AdamW { step, max_norm: Some(3.0), ..STEP };
                let mut slots: Vec<Slot> = params
                    .iter_mut()
                    .zip(&on)
                    .zip(&mut moments)
                    .map(|((param, grad), moments)| Slot {
                        param,
                        grad,
                        moments,
                        update: Update::Weight { decay: 0.01 },
                    })
                    .collect();
                let norm = adam.step(&Tensor::scalar(1.0).to(device), &mut slots).item() as f64;
                let squares = grads.iter().flat_map(|g| g.f32()).map(|&g| g as f64 * g as f64).sum::<f64>();
                assert!((norm / squares.sqrt() - 1.0).abs() < 1e-5 && norm > 3.0, "{norm}");
                let (c1, c2) = (1.0 - 0.9f64.powi(step as i32), 1.0 - 0.99f64.powi(step as i32));
                for k in 0..2 {
                    for i in 0..lengths[k] {
                        let g = 3.0 / squares.sqrt() * grads[k].f32()[i] as f64;
                        m[k][i] = 0.9 * m[k][i] + 0.1 * g;
                        v[k][i] = 0.99 * v[k][i] + 0.01 * g * g;
                        let delta = m[k][i] / c1 / ((v[k][i] / c2).sqrt() + 1e-8);
                        want[k][i] -= 0.1 * (delta + 0.01 * want[k][i]);
                    }
                }
            }
            for k in 0..2 {
                close("parameters", params[k].to(Device::Cpu).f32(), &want[k], 1e-5);
            }
        }
    }

    /// Two processes that have a tensor each move them as one that has both.
    #[test]
    fn tensors_of_several_processes_are_clipped_by_the_norm_of_all() {
        for device in devices() {
            let adam = AdamW { max_norm: Some(1.0), ..STEP };
            let loss = Tensor::scalar(1.0).to(device);
            let grads = [noise(&[50], 1), noise(&[CHUNK + 3], 2)].map(|g| g.to(device));
            let start = || [noise(&[50], 3), noise(&[CHUNK + 3], 4)].map(|p| p.to(device));
            let update = Update::Weight { decay: 0.1 };
            let run = |apart: bool| {
                let mut params = start();
                let mut moments = params.each_ref().map(Moments::new);
                let mut slots: Vec<Slot> = params
                    .iter_mut()
                    .zip(&grads)
                    .zip(&mut moments)
                    .map(|((param, grad), moments)| Slot { param, grad, moments, update })
                    .collect();
                let norm = if apart {
                    let (one, two) = slots.split_at_mut(1);
                    let [a, b] = [(&mut *one, 0), (&mut *two, 1)]
                        .map(|(s, share)| AdamW::squares(device, s, share, 2).to(Device::Cpu));
                    let all: Vec<f32> = a.f32().iter().zip(b.f32()).map(|(a, b)| a + b).collect();
                    let all = Tensor::from_f32(all, &[4]).to(device);
                    let norms = [one, two].map(|s| adam.step_of(&loss, Some(&all), s).item());
                    assert_eq!(norms[0], norms[1]);
                    norms[0]
                } else {
                    adam.step(&loss, &mut slots).item()
                };
                (norm, params.map(|p| p.to(Device::Cpu)))
            };
            let (together, apart) = (run(false), run(true));
            assert!(together.0 > 10.0 && (apart.0 / together.0 - 1.0).abs() < 1e-6, "{device:?}");
            for (a, b) in apart.1.iter().zip(&together.1) {
                let want: Vec<f64> = b.f32().iter().map(|&x| x as f64).collect();
                close("parameters", a.f32(), &want, 1e-6);
            }
        }
    }

    #[test]
    fn nothing_changes_where_loss_or_gradient_is_not_finite() {
        for device in devices() {
            let (nan, infinite) = (f32::NAN, f32::INFINITY);
            // Of a weight and of a step size beside it.
            for (loss, of_weight, of_step) in [
                (nan, 1.0, 1.0),
                (infinite, 1.0, 1.0),
                (1.0, nan, 1.0),
                (1.0, infinite, 1.0),
                (1.0, 1.0, nan),
                (1.0, 1.0, -infinite),
            ] {
                let mut params = [0, 1].map(|_| Tensor::full(&[3], 2.0).to(device));
                let mut moments = [0, 1].map(|i| Moments::new(&params[i]));
                let grads =
                    [of_weight, of_step].map(|g| Tensor::from_f32(vec![1.0, g, 1.0], &[3]).to(device));
                let updates = [Update::Weight { decay: 0.1 }, Update::Positive { learning_rate: 0.1 }];
                let mut slots: Vec<Slot> = params
                    .iter_mut()
                    .zip(&grads)
                    .zip(&mut moments)
                    .zip(updates)
                    .map(|(((param, grad), moments), update)| Slot { param, grad, moments, update })
                    .collect();
                let norm = STEP.step(&Tensor::scalar(loss).to(device), &mut slots).item();
                assert_eq!(norm.is_finite(), !loss.is_finite(), "{device:?}: {norm}");
                for (param, moments) in params.iter().zip(&moments) {
                    assert_eq!(*param, Tensor::full(&[3], 2.0), "{device:?}");
                    assert_eq!(moments.second, Tensor::zeros(&[3]));
                }
            }
        }
    }

    #[test]
    fn positive_parameters_stay_positive_under_any_gradient() {
        let update = Update::Positive { learning_rate: 0.5 };
        for device in devices() {
            let mut s = Tensor::full(&[3], 0.01).to(device);
            let mut moments = Moments::new(&s);
            for step in 1..=200 {
                let g = Tensor::from_f32(vec![1e6, -1e6, 0.0], &[3]).to(device);
                one(AdamW { step, max_norm: Some(1.0), ..STEP }, &mut s, &g, &mut moments, update);
            }
            let s = s.to(Device::Cpu);
            assert!(s.f32().iter().all(|&s| s > 0.0 && s.is_finite()), "{:?}", s.f32());
            assert!(s.f32()[0] < 0.01 && s.f32()[1] > 0.01 && s.f32()[2] == 0.01);
        }
    }

    #[test]
    fn tiny_gradients_move_positive_parameters_as_far_as_large_ones() {
        let step = |g: f32| {
            let mut s = Tensor::full(&[1], 0.01);
            let mut moments = Moments::new(&s);
            let update = Update::Positive { learning_rate: 1e-3 };
            let norm = one(STEP, &mut s, &Tensor::full(&[1], g), &mut moments, update);
            assert_eq!(norm, 0.0, "step sizes have no part in the norm");
            s.item()
        };
        assert!((step(1e-9) / step(1.0) - 1.0).abs() < 1e-5 && step(1e-9) < 0.01);
    }

    #[test]
    fn norm_and_normal() {
        let x = noise(&[1001], 1);
        let want: f64 = x.f32().iter().map(|&v| v as f64 * v as f64).sum();
        assert!((square_sum(&x) - want).abs() < 1e-3);
        let n = normal(&[100, 1000], 0.02, 7);
        let mean = n.f32().iter().sum::<f32>() / 1e5;
        let deviation = (square_sum(&n) / 1e5).sqrt();
        assert!(mean.abs() < 3e-4 && (deviation - 0.02).abs() < 3e-4, "{mean} {deviation}");
        assert!(normal(&[5], 1.0, 7) == normal(&[5], 1.0, 7) && normal(&[5], 1.0, 7) != normal(&[5], 1.0, 8));
    }
}
