//! Everything a run needs to continue as if it had never stopped.

use std::collections::BTreeMap;
use std::path::Path;

use gpusq_tensor::{Device, Group, Moments, Tensor};
use serde::{Deserialize, Serialize};

use super::fit::Point;
use crate::distill::Terms;
use crate::format::safetensors::{Checkpoint, checksum, write_checksummed};
use crate::params::{Params, Weight};
use crate::spec::{Section, is_step_size};
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

/// What to do about a state that is damaged.
const AGAIN: &str = "remove this file and run the command again with --resume, which starts the stage again";

/// Metadata keys of the progress, as JSON, and of its checksum, which early versions did not write.
const PROGRESS: &str = "progress";
const PROGRESS_SUM: &str = "progress_crc32";

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
}

impl Progress {
    /// Whether every number is finite. JSON has none that are not, and the reader refuses those too large for
    /// their type except in a flattened field, the terms of a point.
    fn finite(&self) -> bool {
        let terms = self.curve.iter().map(|p| p.terms);
        terms.flat_map(|t| [t.total, t.hard, t.soft, t.feature]).all(f32::is_finite)
    }
}

/// Says what makes a tensor unfit to go on training with: it would show as a loss that is not finite, or only
/// when the finished model is read.
fn usable(kind: &str, name: &str, t: &Tensor) -> std::result::Result<(), &'static str> {
    if kind == "mask" {
        let kept = |group: &[u8]| group.iter().map(|&m| usize::from(m)).sum::<usize>();
        let fine = t.u8().iter().all(|&m| m <= 1) && t.u8().chunks(4).all(|group| kept(group) == 2);
        return if fine { Ok(()) } else { Err("is no 2:4 mask") };
    }
    let step_size = kind == "scale" || kind == "value" && is_step_size(name);
    // Second moments are sums of squares.
    let fine = |x: f32| x.is_finite() && if step_size { x > 0.0 } else { kind != "second" || x >= 0.0 };
    if t.f32().iter().all(|&x| fine(x)) { Ok(()) } else { Err("holds values that no sound training leaves") }
}

/// A reader's error with what helps for a file that no one but this program makes or copies.
fn made_here(error: Error) -> Error {
    let instead = |message: String| {
        let what = message.split_once(';').map_or(message.as_str(), |(what, _)| what);
        format!("{what}; {AGAIN}")
    };
    match error {
        Error::File { path, message } => Error::File { path, message: instead(message) },
        Error::Tensor { path, name, message } => Error::Tensor { path, name, message: instead(message) },
        other => other,
    }
}

/// The tensor whose moments go by `name`.
fn trained<'a>(params: &'a Params, name: &str) -> Option<&'a Tensor> {
    let of_scale = name.strip_suffix(SCALE);
    match (params.get(of_scale.unwrap_or(name))?, of_scale) {
        (Weight::Fake { scale, .. }, Some(_)) => Some(scale),
        (Weight::Dense(t) | Weight::Masked { value: t, .. } | Weight::Fake { value: t, .. }, None) => Some(t),
        _ => None,
    }
}

/// The rank that holds the weight called `name`.
fn owner(sections: &[Section], name: &str) -> usize {
    sections.iter().position(|s| s.owns(name)).expect("every weight is in a section")
}

/// The weights of all `sections` on rank 0, in host memory; elsewhere `params`, this process's, in the place of theirs in
/// `rest`.
///
/// # Errors
/// A lost process.
pub(super) fn gather_params(
    group: &Group,
    sections: &[Section],
    rest: &Params,
    params: &Params,
) -> Result<Params> {
    let mut all = rest.clone();
    for (name, w) in params.to(Device::Cpu).iter() {
        all.insert(name, w.clone());
    }
    let owned = all.named_tensors_mut().into_iter().map(|(name, t)| (owner(sections, name), t));
    group.collect(&mut owned.collect::<Vec<_>>())?;
    Ok(all)
}

impl State {
    /// Gives all processes of `group` the weights and the state of rank 0.
    ///
    /// # Errors
    /// A lost process.
    pub(super) fn share(mut self, group: &Group, params: &mut Params) -> Result<State> {
        let names: Vec<&String> = self.moments.keys().collect();
        let text =
            group.share(&serde_json::to_string(&(&self.progress, names)).expect("plain data serialises"))?;
        if !group.is_first() {
            let other = |what: String| Error::Mismatch(format!("rank 0 sent a state of another run: {what}"));
            let (progress, names): (Progress, Vec<String>) =
                serde_json::from_str(&text).map_err(|e| other(e.to_string()))?;
            let zeros = |name: String| match trained(params, &name) {
                Some(like) => Ok((name, Moments::new(like))),
                None => Err(other(name)),
            };
            self = State { progress, moments: names.into_iter().map(zeros).collect::<Result<_>>()? };
        }
        let moments = self.moments.values_mut().flat_map(|m| [&mut m.first, &mut m.second]);
        group.broadcast(&mut params.tensors_mut().into_iter().chain(moments).collect::<Vec<_>>())?;
        Ok(self)
    }

    /// Weights and state of a pipeline, in host memory: on rank 0 those of all `sections`, which the ranks hold; `params`
    /// are this process's, and `rest` has what the whole model has.
    ///
    /// # Errors
    /// A GPU that failed; a lost process.
    pub(super) fn gather(
        &self,
        group: &Group,
        sections: &[Section],
        rest: &Params,
        params: &Params,
    ) -> Result<(State, Params)> {
        let mut moments: BTreeMap<String, Moments> =
            self.moments.iter().map(|(name, m)| (name.clone(), m.to(Device::Cpu))).collect();
        // A GPU that failed meanwhile left zeros.
        for device in self.moments.values().map(|m| m.first.device()).take(1) {
            device.check()?;
        }
        let params = gather_params(group, sections, rest, params)?;
        let names: Vec<&String> = moments.keys().collect();
        for text in group.gather(&serde_json::to_string(&names).expect("plain data serialises"))? {
            let names: Vec<String> = serde_json::from_str(&text)
                .map_err(|e| Error::Mismatch(format!("another rank sent no names of weights: {e}")))?;
            for name in names {
                if let Some(like) = trained(&params, &name) {
                    moments.entry(name).or_insert_with(|| Moments::new(like));
                }
            }
        }
        let both = moments.iter_mut().flat_map(|(name, m)| [(name, &mut m.first), (name, &mut m.second)]);
        group.collect(&mut both.map(|(name, t)| (owner(sections, name), t)).collect::<Vec<_>>())?;
        Ok((State { progress: self.progress.clone(), moments }, params))
    }

    /// Writes weights and state, wherever they are, to `path`, replacing it whole.
    ///
    /// # Errors
    /// What writing meets; the file that was there stays.
    pub fn save(&self, path: &Path, params: &Params) -> Result<()> {
        let mut tensors = Vec::new();
        let devices: Vec<Device> = self.moments.values().map(|m| m.first.device()).take(1).collect();
        let params = params.to(Device::Cpu);
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
            let m = m.to(Device::Cpu);
            tensors.push((format!("first/{name}"), m.first));
            tensors.push((format!("second/{name}"), m.second));
        }
        // A GPU that failed meanwhile left zeros, which must not take the place of a good state.
        for device in devices {
            device.check()?;
        }
        let progress = serde_json::to_string(&self.progress).expect("plain data serialises");
        let sum = checksum(progress.as_bytes());
        let metadata = [(PROGRESS.to_string(), progress), (PROGRESS_SUM.to_string(), sum)];
        write_checksummed(path, &tensors, &metadata.into())
    }

    /// Reads a state written by [`State::save`] into `params`, which holds the stage's starting weights.
    ///
    /// # Errors
    /// A malformed or damaged file, or one of another model.
    pub fn load(path: &Path, params: &mut Params) -> Result<State> {
        let file = Checkpoint::open_file(path).map_err(made_here)?;
        let text =
            file.metadata().get(PROGRESS).ok_or_else(|| Error::file(path, "is not a training state"))?;
        if file.metadata().get(PROGRESS_SUM).is_some_and(|sum| *sum != checksum(text.as_bytes())) {
            return Err(Error::file(path, format!("its progress is not what was written; {AGAIN}")));
        }
        let progress: Progress = serde_json::from_str(text)
            .map_err(|e| Error::file(path, format!("training progress does not parse: {e}; {AGAIN}")))?;
        if !progress.finite() {
            return Err(Error::file(path, format!("training progress holds infinite numbers; {AGAIN}")));
        }
        let get = |kind: &str, name: &str, like: &Tensor| -> Result<Tensor> {
            let full = format!("{kind}/{name}");
            let t = file.raw(&full).map_err(made_here)?;
            if t.shape() != like.shape() || t.dtype() != like.dtype() {
                let message = format!("is {t:?} where the model has {like:?}; this state is of another run");
                return Err(Error::tensor(path, full, message));
            }
            usable(kind, name, &t).map_err(|what| Error::tensor(path, full, format!("{what}; {AGAIN}")))?;
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
            let Some(like) = trained(params, name) else {
                let message = "is of no weight of the model; this state is of another run";
                return Err(Error::tensor(path, name, message));
            };
            let (first, second) = (get("first", name, like)?, get("second", name, like)?);
            moments.insert(name.to_string(), Moments { first, second });
        }
        Ok(State { progress, moments })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> Params {
        let mask = Tensor::from_u8(vec![1, 0, 0, 1], &[1, 4]);
        let value = Tensor::from_f32(vec![1.0, 0.0, 0.0, -2.0], &[1, 4]);
        let mut params = Params::new();
        params.insert("b.input_scale", Weight::Dense(Tensor::scalar(0.5)));
        params.insert("b.weight", Weight::Fake { value, mask, scale: Tensor::scalar(0.25) });
        params
    }

    /// What loading says of a state that `change` has spoilt.
    fn refusal(change: impl FnOnce(&mut State, &mut Params)) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let (mut state, mut saved) = (State::default(), params());
        state.moments.insert("b.weight".into(), Moments::new(&Tensor::zeros(&[1, 4])));
        state.moments.insert(format!("b.weight{SCALE}"), Moments::new(&Tensor::zeros(&[1])));
        state.save(&path, &saved).unwrap();
        assert_eq!(State::load(&path, &mut params()).unwrap().moments.len(), 2);
        change(&mut state, &mut saved);
        state.save(&path, &saved).unwrap();
        State::load(&path, &mut params()).unwrap_err().to_string()
    }

    #[test]
    fn a_state_that_training_cannot_continue_from_is_refused() {
        let weight = |params: &mut Params, to: (f32, u8, f32)| {
            let Some(Weight::Fake { value, mask, scale }) = params.get_mut("b.weight") else {
                unreachable!()
            };
            (value.f32_mut()[0], mask.u8_mut()[0], scale.f32_mut()[0]) = to;
        };
        for (to, tensor, what) in [
            ((f32::NAN, 1, 0.25), "value/b.weight", "no sound training"),
            ((1.0, 0, 0.25), "mask/b.weight", "no 2:4 mask"),
            ((1.0, 2, 0.25), "mask/b.weight", "no 2:4 mask"),
            ((1.0, 1, 0.0), "scale/b.weight", "no sound training"),
        ] {
            let error = refusal(|_, params| weight(params, to));
            assert!(error.contains(&format!("`{tensor}`")) && error.contains(what), "{error}");
        }
        let error = refusal(|_, params| params.insert("b.input_scale", Weight::Dense(Tensor::scalar(-0.5))));
        assert!(error.contains("`value/b.input_scale`"), "{error}");
        let error = refusal(|s, _| s.moments.get_mut("b.weight").unwrap().second.f32_mut()[3] = -1.0);
        assert!(error.contains("`second/b.weight`"), "{error}");
        let error = refusal(|s, _| {
            drop(s.moments.insert(format!("b.input_scale{SCALE}"), Moments::new(&Tensor::zeros(&[1]))))
        });
        assert!(error.contains("is of no weight of the model"), "{error}");
    }

    #[test]
    fn a_flipped_bit_anywhere_is_found_and_the_advice_is_to_start_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let mut state = State::default();
        state.progress.step = 70;
        state.moments.insert("b.weight".into(), Moments::new(&Tensor::full(&[1, 4], 0.5)));
        state.save(&path, &params()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        State::load(&path, &mut params()).unwrap();
        let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        let step = whole.windows(2).position(|w| w == b"70").unwrap();
        for at in (header..whole.len()).chain([step, step + 1]) {
            for bit in [0, 3, 7] {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                std::fs::write(&path, bytes).unwrap();
                let error = State::load(&path, &mut params()).unwrap_err().to_string();
                assert!(error.contains(path.to_str().unwrap()), "{error}");
                assert!(error.contains(AGAIN) || at < header, "byte {at}, bit {bit}: {error}");
            }
        }
        for len in [0, 7, 100, header, whole.len() - 1] {
            std::fs::write(&path, &whole[..len]).unwrap();
            let error = State::load(&path, &mut params()).unwrap_err().to_string();
            assert!(error.contains(AGAIN) && !error.contains("copy"), "{error}");
        }
    }

    #[test]
    fn a_state_of_an_early_version_has_no_checksums() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let mut state = State::default();
        state.progress.step = 70;
        state.save(&path, &params()).unwrap();
        let file = Checkpoint::open_file(&path).unwrap();
        let tensors: Vec<_> = file.names().map(|n| (n.to_string(), file.raw(n).unwrap())).collect();
        let mut metadata = file.metadata().clone();
        assert!(metadata.remove(PROGRESS_SUM).is_some());
        crate::format::safetensors::write_safetensors(&path, &tensors, &metadata).unwrap();
        assert_eq!(State::load(&path, &mut params()).unwrap().progress, state.progress);
    }

    #[test]
    fn a_loss_too_large_for_its_type_is_not_finite() {
        let point = Point { step: 1, terms: Terms::default(), learning_rate: 0.1 };
        let progress = Progress { curve: vec![point], ..Progress::default() };
        assert!(progress.finite());
        let text = serde_json::to_string(&progress).unwrap().replace("\"soft\":0.0", "\"soft\":1e39");
        assert!(!serde_json::from_str::<Progress>(&text).unwrap().finite());
    }
}
