//! Everything a run needs to continue as if it had never stopped.

use std::collections::BTreeMap;
use std::path::Path;

use gpusq_tensor::{Moments, Tensor};
use serde::{Deserialize, Serialize};

use super::fit::Point;
use crate::distill::Terms;
use crate::format::safetensors::{Checkpoint, write_safetensors};
use crate::params::{Params, Weight};
use crate::{Error, Result};

/// Progress of a training stage and its optimiser's moments.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Progress.
    pub progress: Progress,
    /// Moments by weight name; of a weight's step sizes under the name with `#scale` appended.
    pub moments: BTreeMap<String, Moments>,
}

/// Suffix of the moments of a weight's step sizes.
pub(super) const SCALE: &str = "#scale";

/// How far a stage is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub step: usize,
    /// Bias-corrected running mean of the loss: its sum and its weight.
    pub running: (f64, f64),
    /// Losses since the curve's last point.
    pub recent: Vec<Terms>,
    /// Whether the running loss has fallen below its threshold.
    pub stopped: bool,
    /// The loss curve so far.
    pub curve: Vec<Point>,
    /// Seconds spent training so far.
    pub seconds: f64,
}

impl State {
    /// Writes weights and state to `path`, replacing it whole.
    ///
    /// # Errors
    /// What writing meets; the file that was there stays.
    pub fn save(&self, path: &Path, params: &Params) -> Result<()> {
        let mut tensors = Vec::new();
        for (name, w) in params.iter() {
            match w {
                Weight::Dense(t) => tensors.push((format!("value/{name}"), t.clone())),
                Weight::Masked { value, mask } | Weight::Fake { value, mask, .. } => {
                    tensors.push((format!("value/{name}"), value.clone()));
                    tensors.push((format!("mask/{name}"), mask.clone()));
                    if let Weight::Fake { scale, .. } = w {
                        tensors.push((format!("scale/{name}"), scale.clone()));
                    }
                }
                Weight::Packed(_) => unreachable!("packed weights are not trained"),
            }
        }
        for (name, m) in &self.moments {
            tensors.push((format!("first/{name}"), m.first.clone()));
            tensors.push((format!("second/{name}"), m.second.clone()));
        }
        let progress = serde_json::to_string(&self.progress).expect("plain data serialises");
        write_safetensors(path, &tensors, &BTreeMap::from([("progress".to_string(), progress)]))
    }

    /// Reads a state written by [`State::save`] into `params`, which holds the stage's starting weights.
    ///
    /// # Errors
    /// A malformed file, or one of another model.
    pub fn load(path: &Path, params: &mut Params) -> Result<State> {
        let file = Checkpoint::open_file(path)?;
        let text =
            file.metadata().get("progress").ok_or_else(|| Error::file(path, "is not a training state"))?;
        let progress = serde_json::from_str(text).map_err(|e| {
            Error::file(path, format!("training progress does not parse: {e}; start the run again"))
        })?;
        let get = |kind: &str, name: &str, like: &Tensor| -> Result<Tensor> {
            let full = format!("{kind}/{name}");
            let t = file.raw(&full)?;
            if t.shape() != like.shape() || t.dtype() != like.dtype() {
                let message = format!("is {t:?} where the model has {like:?}; this state is of another run");
                return Err(Error::tensor(path, full, message));
            }
            if kind == "mask" && t.u8().iter().any(|&m| m > 1) {
                return Err(Error::tensor(
                    path,
                    full,
                    "holds other values than 0 and 1; start the run again",
                ));
            }
            Ok(t)
        };
        for (name, w) in params.iter_mut() {
            match w {
                Weight::Dense(t) => *t = get("value", name, t)?,
                Weight::Masked { value, mask } => {
                    (*value, *mask) = (get("value", name, value)?, get("mask", name, mask)?);
                }
                Weight::Fake { value, mask, scale } => {
                    (*value, *mask) = (get("value", name, value)?, get("mask", name, mask)?);
                    *scale = get("scale", name, scale)?;
                }
                Weight::Packed(_) => unreachable!("packed weights are not trained"),
            }
        }
        let mut moments = BTreeMap::new();
        for name in file.names().filter_map(|n| n.strip_prefix("first/")) {
            let weight = params.get(name.strip_suffix(SCALE).unwrap_or(name));
            let like = match weight {
                Some(Weight::Fake { scale, .. }) if name.ends_with(SCALE) => scale,
                Some(Weight::Dense(t) | Weight::Masked { value: t, .. } | Weight::Fake { value: t, .. }) => t,
                _ => {
                    return Err(Error::tensor(
                        path,
                        name,
                        "is of no weight of the model; this state is of another run",
                    ));
                }
            };
            let (first, second) = (get("first", name, like)?, get("second", name, like)?);
            moments.insert(name.to_string(), Moments { first, second });
        }
        Ok(State { progress, moments })
    }
}
