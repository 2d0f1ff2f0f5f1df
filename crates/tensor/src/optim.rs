//! AdamW and gradient clipping (Loshchilov and Hutter 2019, arXiv 1711.05101), and random initial weights.

use crate::cpu::{fold_rows, par_elements, random, simd};
use crate::cuda::{Gpu, Grid, Source, reduce};
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
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f32,
    /// Number of this step, from 1, for bias correction.
    pub step: u32,
    /// Gradients are multiplied by this first (global-norm clipping).
    pub clip: f32,
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
        let zeros = Tensor::zeros_on(param.device(), param.shape());
        Moments { first: zeros.clone(), second: zeros }
    }
}

/// The gradient of a step size is scaled by 1/sqrt(n * 127) and by the step size itself: usually below 1e-8, where
/// the usual `eps` would swallow the update. It only has to prevent 0 / 0 here.
const POSITIVE_EPS: f32 = 1e-15;

pub(crate) static SOURCE: Source = Source { name: "optim", text: include_str!("optim.cu") };

impl AdamW {
    /// `p -= lr * (m' / (sqrt(v') + eps) + weight_decay * p)` with bias-corrected moments `m'`, `v'`.
    pub fn update(&self, param: &mut Tensor, grad: &Tensor, moments: &mut Moments) {
        if let Device::Cuda(gpu) = param.device() {
            return self.launch(gpu, "adamw", param, grad, moments);
        }
        self.apply(param, grad, moments, |p, lr, delta, decay| p - lr * (delta + decay * p));
    }

    /// The same step on the logarithm of a positive tensor: `p *= exp(-lr * m' / (sqrt(v') + eps))` with
    /// the moments of the gradient of `ln p`. `p` stays positive whatever the gradient; no decay.
    pub fn update_positive(&self, param: &mut Tensor, grad: &Tensor, moments: &mut Moments) {
        if let Device::Cuda(gpu) = param.device() {
            let fine = AdamW { eps: POSITIVE_EPS, ..*self };
            return fine.launch(gpu, "adamw_positive", param, grad, moments);
        }
        let of_log = grad.f32().iter().zip(param.f32()).map(|(g, p)| g * p).collect();
        let grad = Tensor::from_f32(of_log, grad.shape());
        let fine = AdamW { eps: POSITIVE_EPS, ..*self };
        // A step below the smallest normal number would divide to infinity in the quantiser.
        fine.apply(param, &grad, moments, |p, lr, delta, _| (p * (-lr * delta).exp()).clamp(1e-30, 1e30));
    }

    fn apply(
        &self,
        param: &mut Tensor,
        grad: &Tensor,
        moments: &mut Moments,
        step: impl Fn(f32, f32, f32, f32) -> f32 + Sync,
    ) {
        assert_eq!(param.shape(), grad.shape(), "AdamW: parameter and gradient");
        assert_eq!(param.shape(), moments.first.shape(), "AdamW: parameter and moments");
        let AdamW { learning_rate: lr, beta1, beta2, eps, weight_decay, clip, .. } = *self;
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
                    *p = step(*p, lr, m * c1 / ((v * c2).sqrt() + eps), weight_decay);
                }
            })
        });
    }

    fn launch(
        &self,
        gpu: Gpu,
        kernel: &'static str,
        param: &mut Tensor,
        grad: &Tensor,
        moments: &mut Moments,
    ) {
        assert_eq!(param.shape(), grad.shape(), "AdamW: parameter and gradient");
        assert_eq!(param.shape(), moments.first.shape(), "AdamW: parameter and moments");
        let (n, (c1, c2)) = (param.len(), self.corrections());
        gpu.launch(
            &SOURCE,
            kernel,
            Grid::elements(n),
            &[
                param.memory_mut().into(),
                moments.first.memory_mut().into(),
                moments.second.memory_mut().into(),
                grad.memory().into(),
                n.into(),
                self.learning_rate.into(),
                self.beta1.into(),
                self.beta2.into(),
                self.eps.into(),
                self.weight_decay.into(),
                self.clip.into(),
                c1.into(),
                c2.into(),
            ],
        );
    }

    /// Factors that undo the moments' bias towards their start at 0.
    fn corrections(&self) -> (f32, f32) {
        let of = |beta: f32| 1.0 / (1.0 - beta.powi(self.step as i32));
        (of(self.beta1), of(self.beta2))
    }
}

/// Sum of squares of all elements.
pub fn square_sum(x: &Tensor) -> f64 {
    match x.device() {
        Device::Cuda(gpu) => reduce::square_sum(gpu, x),
        Device::Cpu => {
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
    }
}

/// Normally distributed elements with mean 0, the same for the same `seed` (Box-Muller over the
/// counter-based generator).
pub fn normal(shape: &[usize], deviation: f32, seed: u64) -> Tensor {
    let key = seed.wrapping_mul(0xD134_2543_DE82_EF95).wrapping_add(1);
    let unit = |i: usize| (random(key, i as u32) as f64 + 0.5) / 4_294_967_296.0;
    let n: usize = shape.iter().product();
    let one = |i| (-2.0 * f64::ln(unit(2 * i))).sqrt() * (2.0 * std::f64::consts::PI * unit(2 * i + 1)).cos();
    Tensor::from_f32((0..n).map(|i| one(i) as f32 * deviation).collect(), shape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{devices, noise};

    const STEP: AdamW = AdamW {
        learning_rate: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.01,
        step: 1,
        clip: 0.5,
    };

    /// Three steps against the published recurrence in f64.
    #[test]
    fn follows_the_recurrence() {
        for device in devices() {
            let mut p = noise(&[50], 1).to(device);
            let mut want: Vec<f64> = p.to(Device::Cpu).f32().iter().map(|&x| x as f64).collect();
            let (mut m, mut v) = (vec![0.0f64; 50], vec![0.0f64; 50]);
            let mut moments = Moments::new(&p);
            for step in 1..=3u32 {
                let g = noise(&[50], 10 + step as u64);
                AdamW { step, ..STEP }.update(&mut p, &g.to(device), &mut moments);
                for i in 0..50 {
                    let g = 0.5 * g.f32()[i] as f64;
                    m[i] = 0.9 * m[i] + 0.1 * g;
                    v[i] = 0.99 * v[i] + 0.01 * g * g;
                    let (mh, vh) =
                        (m[i] / (1.0 - 0.9f64.powi(step as i32)), v[i] / (1.0 - 0.99f64.powi(step as i32)));
                    want[i] -= 0.1 * (mh / (vh.sqrt() + 1e-8) + 0.01 * want[i]);
                }
            }
            crate::ops::check::close("parameters", p.to(Device::Cpu).f32(), &want, 1e-5);
        }
    }

    #[test]
    fn positive_parameters_stay_positive_under_any_gradient() {
        for device in devices() {
            let mut s = Tensor::full(&[3], 0.01).to(device);
            let mut moments = Moments::new(&s);
            for step in 1..=200 {
                let g = Tensor::from_f32(vec![1e6, -1e6, 0.0], &[3]).to(device);
                AdamW { step, learning_rate: 0.5, ..STEP }.update_positive(&mut s, &g, &mut moments);
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
            AdamW { learning_rate: 1e-3, ..STEP }.update_positive(
                &mut s,
                &Tensor::full(&[1], g),
                &mut moments,
            );
            s.item()
        };
        assert!((step(1e-9) / step(1.0) - 1.0).abs() < 1e-5 && step(1e-9) < 0.01);
    }

    #[test]
    fn norm_and_normal() {
        let x = noise(&[1001], 1);
        let want: f64 = x.f32().iter().map(|&v| v as f64 * v as f64).sum();
        for device in devices() {
            assert!((square_sum(&x.to(device)) - want).abs() < 1e-3, "{device:?}");
        }
        let n = normal(&[100, 1000], 0.02, 7);
        let mean = n.f32().iter().sum::<f32>() / 1e5;
        let deviation = (square_sum(&n) / 1e5).sqrt();
        assert!(mean.abs() < 3e-4 && (deviation - 0.02).abs() < 3e-4, "{mean} {deviation}");
        assert!(normal(&[5], 1.0, 7) == normal(&[5], 1.0, 7) && normal(&[5], 1.0, 7) != normal(&[5], 1.0, 8));
    }
}
