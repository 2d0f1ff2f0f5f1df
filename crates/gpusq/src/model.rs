//! A model on disk and in memory, at any stage of compression.
//!
//! A folder holds `config.json` and safetensors under HuggingFace's names, so that dense and pruned models
//! load in other tools; `gpusq.json` beside them says which stage wrote it. FORMAT.md has the details.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use gpusq_tensor::Tensor;
use rayon::prelude::*;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::arch::{self, Config, Entry, Layout};
use crate::config::CONFIG_FILE;
use crate::format::atomic::write_file;
pub use crate::format::packed::PACKED_FILE;
use crate::format::packed::{pack_f16, pack_int8, read_packed, round_dense, write_packed};
use crate::format::safetensors::{Checkpoint, check_finite, checksum, write_checksummed};
use crate::params::{Params, Weight};
use crate::sparsity::Pattern;
use crate::spec::{Head, Linear, TransformerSpec, is_step_size};
use crate::task::{HeadKind, Task};
use crate::{Error, Result, textfile};

/// What has been done to a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Nothing: every weight dense.
    Dense,
    /// GEMM weights are 2:4 (M_SF in the paper).
    Pruned,
    /// GEMM weights are 2:4 and carry learned INT8 step sizes, as do activations (M_SQ).
    Quantized,
    /// The engine's form of a pruned model: 2:4 values in f16.
    PackedF16,
    /// The engine's form of a quantised model: 2:4 values in INT8.
    PackedInt8,
}

impl Stage {
    /// How people call it.
    pub fn title(self) -> &'static str {
        match self {
            Stage::Dense => "dense",
            Stage::Pruned => "2:4",
            Stage::Quantized => "2:4 INT8 (fake-quantised)",
            Stage::PackedF16 => "2:4 FP16 (packed)",
            Stage::PackedInt8 => "2:4 INT8 (packed)",
        }
    }

    /// Whether the model runs in the engine rather than the training forward.
    pub fn packed(self) -> bool {
        matches!(self, Stage::PackedF16 | Stage::PackedInt8)
    }
}

/// A specification with its weights.
#[derive(Clone, Debug)]
pub struct Model {
    /// What the forward interprets.
    pub spec: TransformerSpec,
    /// Weights by the names `spec` gives them, and step sizes.
    pub params: Params,
    /// config.json as it was read, with the head of `spec`.
    pub config: Config,
    /// What has been done to it.
    pub stage: Stage,
    /// The keep:of pattern of its attention, if any.
    pub attention: Option<Pattern>,
    /// Name of the task it was trained on, if any.
    pub task: Option<String>,
    /// Longest input, in tokens, that it was trained on the task with, if that is known.
    pub max_length: Option<usize>,
    /// Head weights the checkpoint did not have, which hold random values until they are trained.
    pub fresh: Vec<String>,
    /// Tensors of the checkpoint that the specification has no place for.
    pub unused: Vec<String>,
}

/// `gpusq.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format_version: u32,
    stage: Stage,
    attention: Option<String>,
    task: Option<String>,
    /// Manifests of early versions do not have it.
    #[serde(default)]
    max_length: Option<usize>,
    /// Checksums of the files that decide what a packed model answers, besides its weights. Manifests of early versions
    /// do not have them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    files: BTreeMap<String, String>,
    program: String,
}

/// The version of `gpusq.json` this program writes and reads.
const MANIFEST_VERSION: u32 = 1;
/// File that says which stage wrote a folder; written last, so that a folder without it is not finished.
pub const MANIFEST_FILE: &str = "gpusq.json";
/// Folder of a run that is not finished.
pub const STATE_DIR: &str = "state";
/// Tokenizer files that go wherever a model goes.
pub(crate) const TOKENIZER_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
];

/// Whether `dir` holds a finished model: its manifest, and weights that nobody has taken away since.
pub fn is_complete(dir: &Path) -> bool {
    let weights = ["model.safetensors", PACKED_FILE];
    dir.join(MANIFEST_FILE).exists() && weights.iter().any(|file| dir.join(file).exists())
}

/// Takes back that the model in `dir` is finished, for whoever is about to make it again.
pub(crate) fn reopen(dir: &Path) -> Result<()> {
    let manifest = dir.join(MANIFEST_FILE);
    match std::fs::remove_file(&manifest) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(manifest)(e)),
        _ => Ok(()),
    }
}

impl Model {
    /// Loads a model of any stage.
    ///
    /// # Errors
    /// No or malformed files, an unknown family, missing or misshapen tensors, values that are not finite,
    /// a pruned model that is not 2:4, an unfinished run; each names the file and the tensor.
    pub fn load(dir: &Path) -> Result<Model> {
        if !dir.is_dir() {
            return Err(Error::file(
                dir,
                "is not a folder; a model is a folder with config.json and model.safetensors",
            ));
        }
        // The settings stand beside a model only where a command wrote both, and then the manifest comes last.
        let unfinished = dir.join(STATE_DIR).is_dir()
            || dir.join(PACKED_FILE).exists()
            || (dir.join(CONFIG_FILE).exists() && dir.join("config.json").exists());
        if unfinished && !dir.join(MANIFEST_FILE).exists() {
            let message = match dir.join(PACKED_FILE).exists() {
                true => format!(
                    "has no {MANIFEST_FILE}, which says what the model is: copy it from where the folder came from, or \
                     if the run that wrote the folder was not finished, continue it with --resume first"
                ),
                false => "holds a run that is not finished; continue it with --resume first".into(),
            };
            return Err(Error::file(dir, message));
        }
        if !dir.join("config.json").exists() {
            let message = match dir.join("quantized").is_dir() || dir.join("pruned").is_dir() {
                true => {
                    "has no config.json; of a compressed model, give one of the folders in it, such as packed"
                }
                false => "has no config.json; a model is a folder with config.json and model.safetensors",
            };
            return Err(Error::file(dir, message));
        }
        let manifest = Manifest::read(dir)?;
        if let Some(m) = &manifest {
            m.check_files(dir)?;
        }
        let config = Config::read(dir)?;
        let spec = (arch::find(&config)?.spec)(&config)?;
        let (stage, attention, task, max_length) = match manifest {
            Some(m) => {
                let pattern = m.attention.as_deref().map(str::parse).transpose();
                let pattern = pattern
                    .map_err(|e: Error| Error::file(dir.join(MANIFEST_FILE), format!("`attention`: {e}")))?;
                (m.stage, pattern, m.task, m.max_length)
            }
            None => (Stage::Dense, None, None, None),
        };
        let mut model = Model {
            spec,
            params: Params::new(),
            config,
            stage,
            attention,
            task,
            max_length,
            fresh: Vec::new(),
            unused: Vec::new(),
        };
        if stage.packed() {
            let path = dir.join(PACKED_FILE);
            model.params = read_packed(&path)?.0;
            model.check_packed(&path)?;
        } else {
            model.read_checkpoint(dir)?;
        }
        Ok(model)
    }

    /// A dense model of the specification in `config` with random weights: matrices normal with standard
    /// deviation 0.02 from `seed`, norms 1, biases 0.
    ///
    /// # Errors
    /// A configuration that no family accepts.
    pub fn random(config: Config, seed: u64) -> Result<Model> {
        let spec = (arch::find(&config)?.spec)(&config)?;
        let mut params = Params::new();
        for (i, (name, shape)) in spec.weights().into_iter().enumerate() {
            let value = match shape.len() {
                2 => gpusq_tensor::normal(&shape, 0.02, seed.wrapping_mul(1_000_003).wrapping_add(i as u64)),
                _ if name.ends_with("norm.weight") => Tensor::full(&shape, 1.0),
                _ => Tensor::zeros(&shape),
            };
            params.insert(name, Weight::Dense(value));
        }
        Ok(Model {
            spec,
            params,
            config,
            stage: Stage::Dense,
            attention: None,
            task: None,
            max_length: None,
            fresh: Vec::new(),
            unused: Vec::new(),
        })
    }

    /// Prepares a dense model to be trained on `task`: a head, as [`Model::set_head`] makes it, and its labels.
    ///
    /// # Errors
    /// As [`Model::set_head`].
    pub fn set_task(&mut self, task: &Task, seed: u64) -> Result<()> {
        self.set_head(task.head, seed)?;
        if !task.labels.is_empty() {
            self.set_labels(task.labels);
        }
        Ok(())
    }

    /// Names the classifier's outputs, in their order.
    pub fn set_labels(&mut self, names: &[&str]) {
        if let Some(json) = self.config.json.as_object_mut() {
            arch::set_labels(json, &names.iter().map(|n| n.to_string()).collect::<Vec<_>>());
        }
    }

    fn read_checkpoint(&mut self, dir: &Path) -> Result<()> {
        let checkpoint = Checkpoint::open(dir)?;
        let arch = arch::find(&self.config)?;
        let shapes: BTreeMap<String, Vec<usize>> = self.spec.weights().into_iter().collect();
        let mut used = BTreeSet::new();
        for entry in (arch.tensors)(&self.spec) {
            let spellings = arch.spellings(&entry.theirs);
            let Some(theirs) = spellings.iter().map(String::as_str).find(|n| checkpoint.info(n).is_some())
            else {
                if entry.ours.starts_with("head.") && entry.layout != Layout::Constant {
                    self.fresh.extend(shapes.contains_key(&entry.ours).then_some(entry.ours));
                    continue;
                }
                return Err(Error::tensor(
                    checkpoint.path_of(&entry.theirs),
                    &entry.theirs,
                    "is missing; is this checkpoint of the architecture that config.json names?",
                ));
            };
            used.insert(theirs.to_string());
            let dtype = checkpoint.info(theirs).expect("found by its name").dtype;
            if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                let found = format!("holds {dtype:?} elements; weights must be F32, F16 or BF16");
                return Err(Error::tensor(checkpoint.path_of(theirs), theirs, found));
            }
            let tensor = checkpoint.tensor(theirs)?;
            check_finite(checkpoint.path_of(theirs), theirs, &tensor)?;
            // A bare BERT carries a trained pooler, which its specification has no place for until a task
            // gives it a classifier.
            let want = shapes.get(&entry.ours).cloned().unwrap_or_else(|| tensor.shape().to_vec());
            let want = &want;
            let ours =
                from_checkpoint(&tensor, entry.layout).filter(|t| t.shape() == want).ok_or_else(|| {
                    let message = format!(
                        "has shape {:?}; config.json asks for {}",
                        tensor.shape(),
                        stored_shape(want, entry.layout)
                    );
                    Error::tensor(checkpoint.path_of(theirs), theirs, message)
                })?;
            self.params.insert(entry.ours, Weight::Dense(ours));
        }
        let quantized = self.stage == Stage::Quantized;
        if let Some(scale) = checkpoint.names().find(|n| n.starts_with("gpusq.")).filter(|_| !quantized) {
            return Err(Error::tensor(
                checkpoint.path_of(scale),
                scale,
                self.other_stage("is a step size, which only a quantized model has"),
            ));
        }
        if self.stage != Stage::Dense {
            for linear in self.spec.linears().iter().filter(|l| compressible(l).is_none()) {
                let name = format!("{}.weight", linear.name);
                let Some(Weight::Dense(value)) = self.params.remove(&name) else { continue };
                let mask =
                    two_four_mask(&value).map_err(|m| Error::tensor(checkpoint.path_of(&name), &name, m))?;
                let weight = if quantized {
                    let stored = format!("gpusq.{name}_scale");
                    let scale = read_scale(&checkpoint, &stored, linear.rows)?;
                    used.insert(stored);
                    Weight::Fake { value, mask, scale }
                } else {
                    Weight::Masked { value, mask }
                };
                self.params.insert(name, weight);
            }
        }
        if quantized {
            for name in checkpoint.names() {
                let Some(ours) = name.strip_prefix("gpusq.").filter(|n| is_step_size(n)) else {
                    continue;
                };
                self.params.insert(ours, Weight::Dense(read_scale(&checkpoint, name, 1)?));
                used.insert(name.to_string());
            }
            self.check_scales(checkpoint.path_of("gpusq."))?;
        }
        self.unused = checkpoint.names().filter(|n| !used.contains(*n)).map(str::to_string).collect();
        Ok(())
    }

    fn check_scales(&self, path: &Path) -> Result<()> {
        for l in self.spec.linears() {
            let quantized = matches!(
                self.params.get(&format!("{}.weight", l.name)),
                Some(Weight::Fake { .. } | Weight::Packed(crate::params::Packed { scale: Some(_), .. }))
            );
            if quantized && self.params.get(&l.input_scale()).is_none() {
                return Err(Error::tensor(
                    path,
                    l.input_scale(),
                    "is missing though its weight is quantised",
                ));
            }
        }
        Ok(())
    }

    /// What is stored against what the manifest says.
    fn other_stage(&self, stored: &str) -> String {
        let stage = serde_json::to_value(self.stage).expect("plain data serialises");
        format!("{stored}, and {MANIFEST_FILE} says {stage}; copy the folder again from its source")
    }

    fn check_packed(&self, path: &Path) -> Result<()> {
        let linears: BTreeMap<String, Linear> =
            self.spec.linears().into_iter().map(|l| (format!("{}.weight", l.name), l)).collect();
        for (name, shape) in self.spec.weights() {
            let found = match self.params.get(&name) {
                None => return Err(Error::tensor(path, name, "is missing; is config.json this model's?")),
                Some(Weight::Packed(p)) => vec![p.values.shape()[0], p.cols],
                Some(Weight::Dense(t)) => t.shape().to_vec(),
                Some(_) => unreachable!("a packed file holds packed and dense weights"),
            };
            if found != shape {
                return Err(Error::tensor(
                    path,
                    name,
                    format!("has shape {found:?}; config.json asks for {shape:?}"),
                ));
            }
            let stored = match self.params.get(&name) {
                Some(Weight::Packed(p)) if p.scale.is_some() => Some(Stage::PackedInt8),
                Some(Weight::Packed(_)) => Some(Stage::PackedF16),
                _ => None,
            };
            let wanted = linears.get(&name).filter(|l| compressible(l).is_none()).map(|_| self.stage);
            if stored != wanted {
                let stored =
                    stored.map_or("is stored dense".into(), |s| format!("is stored as {}", s.title()));
                let message = match wanted {
                    Some(_) => self.other_stage(&stored),
                    None => format!("{stored}; only weights of linear maps may be packed"),
                };
                return Err(Error::tensor(path, name, message));
            }
        }
        let places: BTreeSet<String> = self.spec.weights().into_iter().map(|(name, _)| name).collect();
        if let Some((name, _)) = self.params.iter().find(|(n, _)| !places.contains(*n) && !is_step_size(n)) {
            let message =
                "has no place in the model that config.json describes; is config.json this model's?";
            return Err(Error::tensor(path, name, message));
        }
        self.check_scales(path)
    }

    /// Writes the model into the folder `dir`, which exists, with the tokenizer files of `tokenizer`. The
    /// manifest comes last: a folder that has it is complete.
    ///
    /// # Errors
    /// What writing meets; files already written whole stay, and none is left half-written.
    pub fn save(&self, dir: &Path, tokenizer: Option<&Path>) -> Result<()> {
        if self.stage.packed() {
            write_packed(dir.join(PACKED_FILE), &self.params, &BTreeMap::new())?;
        } else {
            let tensors = self.to_checkpoint(&|name| match self.params.get(name)? {
                Weight::Dense(t) => Some(t.clone()),
                Weight::Masked { value, mask } | Weight::Fake { value, mask, .. } => Some(apply(value, mask)),
                Weight::Packed(_) => unreachable!("stage is not packed"),
            });
            let mut tensors: Vec<(String, Tensor)> = tensors.into_iter().collect();
            for (name, w) in self.params.iter() {
                match w {
                    Weight::Fake { scale, .. } => {
                        tensors.push((format!("gpusq.{name}_scale"), scale.clone()))
                    }
                    Weight::Dense(t) if is_step_size(name) => {
                        tensors.push((format!("gpusq.{name}"), t.clone()))
                    }
                    _ => {}
                }
            }
            let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
            write_checksummed(dir.join("model.safetensors"), &tensors, &metadata)?;
        }
        if let Some(from) = tokenizer.filter(|from| *from != dir) {
            for name in TOKENIZER_FILES {
                let source = from.join(name);
                if source.is_file() {
                    let bytes = std::fs::read(&source).map_err(Error::io(&source))?;
                    write_file(dir.join(name), |w| w.write_all(&bytes))?;
                }
            }
        }
        let config = arch::with_head(&self.config, &self.spec)?;
        write_json(&dir.join("config.json"), &config)?;
        // Other stages' folders are ordinary checkpoints, which people edit.
        let mut files = BTreeMap::new();
        if self.stage.packed() {
            for name in companions() {
                let path = dir.join(name);
                if path.is_file() {
                    files.insert(name.to_string(), file_checksum(&path)?);
                }
            }
        }
        let manifest = Manifest {
            format_version: MANIFEST_VERSION,
            stage: self.stage,
            attention: self.attention.map(|p| p.to_string()),
            task: self.task.clone(),
            max_length: self.max_length,
            files,
            program: concat!("gpusq ", env!("CARGO_PKG_VERSION")).into(),
        };
        write_json(&dir.join(MANIFEST_FILE), &manifest)
    }

    /// The engine's form of a pruned model (2:4 values in f16) or of a quantised one (INT8 codes). Weights
    /// that were never compressed stay dense, rounded to what the packed file stores: f16 with two or more
    /// dimensions (embeddings), f32 below. So the result equals what [`Model::save`] and [`Model::load`]
    /// make of it; and its answers are those of `self` bit for bit if `self`'s dense weights had been
    /// rounded so ([`round_dense`]).
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a model of another stage, and where a weight is not 2:4, does not fit f16 or
    /// has no code, naming weight, row and group.
    pub fn packed(&self) -> Result<Model> {
        let stage = match self.stage {
            Stage::Dense => {
                let message = "only a compressed model can be packed, and this one is dense; prune it first";
                return Err(Error::Mismatch(message.into()));
            }
            Stage::Pruned => Stage::PackedF16,
            Stage::Quantized => Stage::PackedInt8,
            Stage::PackedF16 | Stage::PackedInt8 => {
                return Err(Error::Mismatch("the model is packed already; use it as it is".into()));
            }
        };
        let mut params = Params::new();
        for (name, weight) in self.params.iter() {
            let weight = match (weight, stage) {
                (Weight::Dense(t), _) => Weight::Dense(t.clone()),
                (Weight::Masked { value, mask }, Stage::PackedF16) => {
                    Weight::Packed(pack_f16(value, mask, name)?)
                }
                (Weight::Fake { value, mask, scale }, Stage::PackedInt8) => {
                    Weight::Packed(pack_int8(value, mask, scale, name)?)
                }
                _ => {
                    let message = format!(
                        "weight `{name}` is not at the model's stage, {}; run that stage again",
                        self.stage.title()
                    );
                    return Err(Error::Mismatch(message));
                }
            };
            params.insert(name, weight);
        }
        round_dense(&mut params)?;
        Ok(Model { params, stage, ..self.clone() })
    }

    /// Tensors under the checkpoint's names and in its layout; `get` gives each weight by our name.
    pub fn to_checkpoint(&self, get: &dyn Fn(&str) -> Option<Tensor>) -> BTreeMap<String, Tensor> {
        let arch = arch::find(&self.config).expect("the configuration was accepted when it was read");
        let mut parts: BTreeMap<String, Vec<(Entry, Tensor)>> = BTreeMap::new();
        for entry in (arch.tensors)(&self.spec) {
            if let Some(t) = get(&entry.ours) {
                parts.entry(entry.theirs.clone()).or_default().push((entry, t));
            }
        }
        parts.into_iter().map(|(name, parts)| (name, to_stored(&parts))).collect()
    }

    /// Gives the model the head a task needs. A head of that kind and size stays; another is replaced by
    /// one with random weights (normal, standard deviation 0.02, from `seed`).
    ///
    /// # Errors
    /// [`Error::File`] if the family has no such head here.
    pub fn set_head(&mut self, kind: HeadKind, seed: u64) -> Result<()> {
        let arch = arch::find(&self.config)?;
        let missing = |what: &str, has: fn(&arch::Classes) -> &'static str| {
            let others = arch::ARCHS.iter().filter(|a| !has(&a.classes).is_empty()).map(|a| a.name);
            let others = others.collect::<Vec<_>>().join(", ");
            let message = format!(
                "models of the family `{}` have no head for {what} here; use one of {others}",
                arch.name
            );
            Error::file(self.config.path(), message)
        };
        let head = match kind {
            HeadKind::Classes(n) if !arch.classes.classify.is_empty() => {
                Head::Classify { outputs: n, dense: arch.classifier }
            }
            HeadKind::Value if !arch.classes.classify.is_empty() => {
                Head::Classify { outputs: 1, dense: arch.classifier }
            }
            HeadKind::Span if !arch.classes.span.is_empty() => Head::Span,
            HeadKind::Classes(_) | HeadKind::Value => {
                return Err(missing("classification", |c| c.classify));
            }
            HeadKind::Span => return Err(missing("question answering", |c| c.span)),
        };
        if head != self.spec.head {
            let dense_stays = matches!(head, Head::Classify { .. });
            self.spec.head = head;
            for name in ["head.dense.weight", "head.dense.bias", "head.out.weight", "head.out.bias"] {
                if !(dense_stays && name.starts_with("head.dense")) {
                    self.params.remove(name);
                }
            }
            // Read back, so that what depends on the head (its dropout) is as it will be after loading.
            self.config.json = arch::with_head(&self.config, &self.spec)?;
            self.spec = (arch.spec)(&self.config)?;
        }
        let shapes: BTreeMap<String, Vec<usize>> = self.spec.weights().into_iter().collect();
        self.fresh.clear();
        for (i, name) in shapes.keys().filter(|n| n.starts_with("head.")).enumerate() {
            let shape = &shapes[name];
            if matches!(self.params.get(name), Some(Weight::Dense(t)) if t.shape() == shape) {
                continue;
            }
            let value = match shape.len() {
                1 => Tensor::zeros(shape),
                _ => gpusq_tensor::normal(shape, 0.02, seed.wrapping_add(i as u64)),
            };
            self.params.insert(name.clone(), Weight::Dense(value));
            self.fresh.push(name.clone());
        }
        Ok(())
    }
}

/// What decides a packed model's answers besides its weights.
fn companions() -> impl Iterator<Item = &'static str> {
    ["config.json"].into_iter().chain(TOKENIZER_FILES.iter().copied())
}

fn file_checksum(path: &Path) -> Result<String> {
    Ok(checksum(&std::fs::read(path).map_err(Error::io(path))?))
}

impl Manifest {
    /// Whether the files beside the weights are still those that were saved with them.
    fn check_files(&self, dir: &Path) -> Result<()> {
        for (name, saved) in &self.files {
            if !companions().any(|known| known == name) {
                let message = format!("`files` names {name}, which is no file of a model; take it out");
                return Err(Error::file(dir.join(MANIFEST_FILE), message));
            }
            let path = dir.join(name);
            let found = file_checksum(&path)?;
            if found != *saved {
                let message = format!(
                    "is not the file that the model was saved with (its checksum is {found}, and {MANIFEST_FILE} has \
                     {saved}); copy it again from its source, or if the change is meant, take it out of `files` there"
                );
                return Err(Error::file(path, message));
            }
        }
        Ok(())
    }

    fn read(dir: &Path) -> Result<Option<Manifest>> {
        let path = dir.join(MANIFEST_FILE);
        if !path.exists() {
            return Ok(None);
        }
        Self::parse(&path, &textfile::text(&path)?).map(Some)
    }

    fn parse(path: &Path, text: &str) -> Result<Manifest> {
        let version =
            serde_json::from_str::<serde_json::Value>(text).ok().and_then(|v| v["format_version"].as_u64());
        if version.is_some_and(|v| v != MANIFEST_VERSION as u64) {
            let message = format!(
                "has format_version {}; this program reads {MANIFEST_VERSION}, use a newer one",
                version.unwrap_or(0)
            );
            return Err(Error::file(path, message));
        }
        let manifest: Manifest = serde_json::from_str(text).map_err(|e| {
            Error::line(
                path,
                e.line(),
                format!("not a manifest of gpusq: {e}; copy the folder again from its source"),
            )
        })?;
        if manifest.max_length == Some(0) {
            return Err(Error::file(path, "`max_length` is 0; it must be null or at least 1"));
        }
        Ok(manifest)
    }
}

/// Writes `value` as indented JSON.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).expect("plain data serialises");
    write_file(path, |w| w.write_all(text.as_bytes()))
}

/// Why a linear map is not compressed; `None` if it is (DESIGN: input width a multiple of 4).
pub fn compressible(linear: &Linear) -> Option<String> {
    (!linear.cols.is_multiple_of(4)).then(|| format!("input width {} is not a multiple of 4", linear.cols))
}

/// `value * mask` with +0 in every dropped place, and for a kept -0 too.
pub(crate) fn apply(value: &Tensor, mask: &Tensor) -> Tensor {
    let kept = |(v, m): (&f32, &u8)| if *m != 0 { *v + 0.0 } else { 0.0 };
    let kept = value.f32().par_iter().zip(mask.u8()).map(kept).collect();
    Tensor::from_f32(kept, value.shape())
}

/// The mask of a weight that is already 2:4: the two largest magnitudes of each group, lower index first.
fn two_four_mask(value: &Tensor) -> std::result::Result<Tensor, String> {
    let mut mask = vec![0u8; value.len()];
    crate::sparsity::mask_rows(value.f32(), value.width(), Pattern::TWO_FOUR, &mut mask);
    match value.f32().iter().zip(&mask).position(|(v, m)| *m == 0 && *v != 0.0) {
        None => Ok(Tensor::from_u8(mask, value.shape())),
        Some(i) => {
            let (row, group) = (i / value.width(), i % value.width() / 4);
            Err(format!("is not 2:4: row {row}, group {group} has more than two nonzeros"))
        }
    }
}

fn read_scale(checkpoint: &Checkpoint, name: &str, len: usize) -> Result<Tensor> {
    let t = checkpoint.tensor(name)?;
    let positive = t.dtype() == gpusq_tensor::DType::F32 && t.f32().iter().all(|&s| s > 0.0 && s.is_finite());
    if t.len() != len || !positive {
        let message = format!("must hold {len} positive step size(s), found {t:?}");
        return Err(Error::tensor(checkpoint.path_of(name), name, message));
    }
    Ok(t.reshape(&[len]))
}

/// A weight from the tensor that stores it; `None` if the shape does not allow it.
fn from_checkpoint(t: &Tensor, layout: Layout) -> Option<Tensor> {
    match (layout, t.shape()) {
        (Layout::Same, _) => Some(t.clone()),
        (Layout::Transposed, [_, _]) => Some(t.transpose()),
        (Layout::Constant, [1, n]) => Some(t.reshape(&[*n])),
        (Layout::Part { part, parts }, shape) => {
            let width = *shape.last()?;
            if shape.len() > 2 || width % parts != 0 {
                return None;
            }
            let w = width / parts;
            let columns: Vec<f32> =
                t.f32().chunks_exact(width).flat_map(|row| row[part * w..(part + 1) * w].to_vec()).collect();
            Some(match shape {
                [rows, _] => Tensor::from_f32(columns, &[*rows, w]).transpose(),
                _ => Tensor::from_f32(columns, &[w]),
            })
        }
        _ => None,
    }
}

fn stored_shape(want: &[usize], layout: Layout) -> String {
    match (layout, want) {
        (Layout::Transposed, [a, b]) => format!("[{b}, {a}]"),
        (Layout::Part { parts, .. }, [a, b]) => format!("[{b}, {}]", a * parts),
        (Layout::Part { parts, .. }, [a]) => format!("[{}]", a * parts),
        (Layout::Constant, [n]) => format!("[1, {n}]"),
        _ => format!("{want:?}"),
    }
}

/// The stored tensor of weights that share it.
fn to_stored(parts: &[(Entry, Tensor)]) -> Tensor {
    let (entry, t) = &parts[0];
    match entry.layout {
        Layout::Same => t.clone(),
        Layout::Transposed => t.transpose(),
        Layout::Constant => t.reshape(&[1, t.len()]),
        Layout::Part { .. } => {
            let columns: Vec<Tensor> = parts
                .iter()
                .map(|(_, t)| if t.shape().len() == 2 { t.transpose() } else { t.clone() })
                .collect();
            let (rows, w) = (columns[0].rows(), columns[0].width());
            let mut out = Vec::with_capacity(rows * w * columns.len());
            for r in 0..rows {
                for c in &columns {
                    out.extend_from_slice(&c.f32()[r * w..(r + 1) * w]);
                }
            }
            let mut shape = columns[0].shape().to_vec();
            *shape.last_mut().expect("a stored tensor has a dimension") = w * columns.len();
            Tensor::from_f32(out, &shape)
        }
    }
}
