//! Settings of a run.
/// Learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Schedule {
    /// linear
    Linear,
    /// constant
    Constant,
    /// cosine
    Cosine,
}
/// Optimiser settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    /// e
    pub epochs: f64,
    /// b
    pub batch_size: usize,
    /// l
    pub learning_rate: f64,
    /// w
    pub warmup: f64,
    /// s
    pub schedule: Schedule,
    /// d
    pub weight_decay: f64,
    /// b1
    pub beta1: f64,
    /// b2
    pub beta2: f64,
    /// e
    pub eps: f64,
    /// g
    pub max_grad_norm: f64,
    /// d
    pub dropout: Option<f64>,
    /// m
    pub max_steps: Option<usize>,
    /// s
    pub stop_loss: Option<f64>,
}
impl Default for Optimizer {
    fn default() -> Self {
        Optimizer {
            epochs: 1.0,
            batch_size: 8,
            learning_rate: 3e-5,
            warmup: 0.1,
            schedule: Schedule::Linear,
            weight_decay: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 1.0,
            dropout: None,
            max_steps: None,
            stop_loss: None,
        }
    }
}
