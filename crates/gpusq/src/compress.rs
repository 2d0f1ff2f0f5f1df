//! The pipeline: dense -> prune + fit -> quantise + fit -> pack, each stage a folder that can be resumed,
//! repeated and inspected alone (paper, figure 3 and algorithm 1).

mod times;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use gpusq_tensor::ops::masked::MaskGradient;
use gpusq_tensor::{DType, Device, Group, Tape, Tensor};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::{self, Config, Site};
use crate::distill::Mix;
use crate::evaluate::predict;
use crate::format::packed::round_dense;
use crate::forward::{Bound, Compute, Inputs, TapSet, forward};
use crate::model::{self, Model, PACKED_FILE, STATE_DIR, Stage, apply, compressible, is_complete};
use crate::outdir::{self, Held};
use crate::params::Weight;
use crate::quant::{self, Calibration};
use crate::report::{self, RunRecord};
use crate::sparsity::{self, InputStats, Pattern, weight_mask};
use crate::spec::{Head, Role};
use crate::task::{Dataset, Scores, Task, Tokenizer, one_class};
use crate::train::batch::{collate, shuffled};
use crate::train::teacher_cache::{self, Uses};
use crate::train::{self, Recipe, State, fit, total_steps};
use crate::{Error, Result};
use times::Times;

/// What a run works with.
#[derive(Clone)]
pub struct Run<'a> {
    /// Settings.
    pub config: &'a Config,
    /// The task, for names.
    pub task: &'static Task,
    /// Examples to train on.
    pub train: &'a Dataset,
    /// Examples to score on.
    pub dev: &'a Dataset,
    /// Of the model.
    pub tokenizer: &'a Tokenizer,
    /// Folder whose tokenizer files are copied beside each model.
    pub tokenizer_dir: Option<&'a Path>,
    /// Folder to write.
    pub out: &'a Path,
    /// Continue what `out` holds.
    pub resume: bool,
    /// The command line, for the report.
    pub command: String,
    /// Where and in what models other than packed ones are trained and run.
    pub compute: Compute,
    /// The processes that train together. Rank 0 alone reads and writes `out`, scores and packs; the others have what
    /// they need to know from it.
    pub group: &'a Group,
    /// Over how many of these the model is split: all, or 1 (each has the whole model and a part of every batch).
    pub pipeline_parallel_size: usize,
    /// Folder in which teachers' outputs are kept.
    pub teacher_cache: Option<&'a Path>,
}

/// What a run tells whoever watches.
pub enum Event<'a> {
    /// A training stage begins.
    Stage {
        /// Its name.
        name: &'a str,
        /// Steps it will take.
        steps: usize,
        /// Steps done before it was interrupted.
        done: usize,
    },
    /// Training goes on.
    Train(train::Event),
    /// A model was scored on the evaluation split.
    Scored {
        /// Which.
        name: &'a str,
        /// On what it scored.
        scores: &'a Scores,
    },
    /// Something the user should know.
    Note(&'a str),
}

/// Receives [`Event`]s.
pub type Watch<'w> = dyn FnMut(Event) + 'w;

const STATE_FILE: &str = "train.safetensors";
/// The models that [`Run::compress`] leaves in its output folder, in the order they are made.
pub const MODELS: [&str; 4] = ["pruned", "packed-fp16", "quantized", "packed"];
/// Batch size of evaluation: large enough to fill the machine, small enough for its memory.
const EVAL_BATCH: usize = 32;

/// Gives every compressible weight of a dense model its mask: pruning without training. `samples` are
/// needed by criteria that look at inputs, computed as `compute` says.
///
/// # Errors
/// A model that is not dense, an unknown criterion, what a GPU meets.
pub fn prune_weights(
    model: &mut Model,
    settings: &config::Prune,
    samples: &[Inputs],
    compute: Compute,
) -> Result<()> {
    if model.stage != Stage::Dense {
        return Err(Error::Mismatch(format!(
            "the model is {} already; pruning starts from a dense one",
            model.stage.title()
        )));
    }
    let entry = sparsity::criterion(settings.criterion)?;
    settings.check()?;
    let criterion = (entry.build)();
    untie(model);
    let mut stats: BTreeMap<String, InputStats> = BTreeMap::new();
    if entry.needs_inputs {
        let tape = Tape::inference();
        let bound = Bound::new(&tape, &model.params, MaskGradient::Kept, compute);
        let want = TapSet { linears: true, ..TapSet::default() };
        let read: BTreeSet<String> = model.spec.linears().into_iter().map(|l| l.input).collect();
        for inputs in samples {
            let taps = forward(&tape, &model.spec, &bound, None, inputs, want).taps;
            for (name, v) in taps.iter().filter(|(name, _)| read.contains(*name)) {
                let t = unpadded(&v.value().to(Device::Cpu).to_f32(), inputs.tokens.mask.as_deref());
                stats.entry(name.clone()).or_insert_with(|| InputStats::new(t.width())).add(&t);
            }
        }
        compute.device.check()?;
    }
    for l in model.spec.linears().iter().filter(|l| compressible(l).is_none()) {
        let name = format!("{}.weight", l.name);
        let value = model.params.dense(&name).clone();
        let mask = weight_mask(criterion.as_ref(), &value, stats.get(&l.input), Pattern::TWO_FOUR);
        // Where masks may change, dropped values must be there to come back.
        let value = if settings.mask_update_every > 0 { value } else { apply(&value, &mask) };
        model.params.insert(name, Weight::Masked { value, mask });
    }
    model.stage = Stage::Pruned;
    model.attention = settings.attention;
    Ok(())
}

/// The rows of `t` that are no padding, where its rows are those of `mask`.
fn unpadded(t: &Tensor, mask: Option<&[bool]>) -> Tensor {
    let Some(mask) = mask.filter(|m| m.len() == t.rows()) else { return t.clone() };
    let rows = t.f32().chunks_exact(t.width()).zip(mask).filter(|(_, m)| **m);
    let kept: Vec<f32> = rows.flat_map(|(row, _)| row.iter().copied()).collect();
    let shape = [kept.len() / t.width(), t.width()];
    Tensor::from_f32(kept, &shape)
}

/// Gives a tied language-model head a weight of its own; the embedding stays as it is.
fn untie(model: &mut Model) {
    if let Head::LanguageModel { tied: tied @ true, .. } = &mut model.spec.head {
        *tied = false;
        let word = model.params.dense("embed.word").clone();
        model.params.insert("head.out.weight", Weight::Dense(word));
        model.config.json["tie_word_embeddings"] = false.into();
    }
}

/// The settings of `settings` as the quantiser takes them.
pub fn calibration(settings: &config::Quantize) -> Calibration {
    let role = |s: &Site| match s {
        Site::Q => Role::Query,
        Site::K => Role::Key,
        Site::V => Role::Value,
        Site::AttnOut => Role::AttentionOut,
        Site::FfnIn => Role::FeedForwardIn,
        Site::FfnOut => Role::FeedForwardOut,
    };
    Calibration {
        weights: settings.weights,
        activations: settings.calibration,
        percentile: settings.percentile,
        outputs: settings.outputs.iter().map(role).collect(),
    }
}

/// The loss mix of `d`; labels only where distillation is off.
fn mix(d: &config::Distill) -> Result<Mix> {
    if !d.enabled {
        return Ok(Mix::HARD);
    }
    d.check()?;
    Ok(Mix {
        alpha: d.alpha as f32,
        beta: d.beta as f32,
        gamma: d.gamma as f32,
        temperature: d.temperature as f32,
        attention_features: d.attention_features,
    })
}

/// What rank 0 finds of a stage that is done.
#[derive(Serialize, Deserialize)]
struct Done {
    scores: Vec<(String, f64)>,
    one_class: bool,
    seconds: f64,
}

/// A finished training stage.
pub struct Trained {
    /// The model.
    pub model: Model,
    /// Its scores on the evaluation split.
    pub scores: Scores,
    /// Whether it put all examples of that split into one class.
    pub one_class: bool,
    /// Seconds spent on it, by all processes that worked on it.
    pub seconds: f64,
    /// Its loss curve; empty if it was finished before this run.
    pub curve: Vec<train::Point>,
}

impl Run<'_> {
    fn pad(&self) -> u32 {
        self.tokenizer.pad_id()
    }

    /// The first training examples of a seeded shuffle, for calibration and input-aware criteria.
    fn samples(&self) -> Vec<Inputs> {
        let wanted = self.config.quantize.calibration_examples.min(self.train.examples.len());
        let batches =
            shuffled(&self.train.examples, EVAL_BATCH.min(wanted.max(1)), self.config.seed ^ 0xCA1B, 0);
        let mut out = Vec::new();
        let mut n = 0;
        for which in batches {
            if n >= wanted {
                break;
            }
            n += which.len();
            out.push(collate(&self.train.examples, &which, self.train.head, self.pad()).inputs);
        }
        out
    }

    /// Scores a model of any stage, and says whether it put all examples into one class. In f32, whatever it was
    /// trained in: that is what the engine computes in between its integers, and bf16's rounding alone moves scores
    /// by up to a point and a half.
    ///
    /// # Errors
    /// What the engine says of a packed model it cannot run.
    pub fn score(&self, model: &Model, name: &str, watch: &mut Watch) -> Result<(Scores, bool)> {
        let compute = Compute { element: DType::F32, tf32: false, ..self.compute };
        let outputs = predict(model, self.dev, EVAL_BATCH, self.pad(), compute, Device::Cpu, &mut |_| {})?;
        let scores = self.dev.score(&outputs);
        watch(Event::Scored { name, scores: &scores });
        let one_class = one_class(self.dev, &outputs);
        if one_class {
            watch(Event::Note(&format!("{name}: predicts one class for every example")));
        }
        Ok((scores, one_class))
    }

    /// Makes the output folder, or checks that it may be continued, stores the configuration in it and keeps
    /// other processes out while the result lives. `kind` names what is run, `model` is what it starts from.
    ///
    /// # Errors
    /// A folder with content without `resume`; with it, one that holds another run or other settings; one
    /// that another process writes into; processes that were started with different settings or data.
    pub fn open(&self, kind: &str, model: &Model) -> Result<Held> {
        let identity = outdir::identity(kind, self.task.name, model, self.train, self.dev);
        let settings = self.config.to_toml();
        if self.group.size() > 1 {
            let pipeline = format!("pipeline_parallel_size = {}", self.pipeline_parallel_size);
            self.group.agree("run", &format!("{identity}{settings}\n{pipeline}"))?;
        }
        if !self.group.is_first() {
            return Ok(Held::by_rank_0());
        }
        let held = outdir::open(self.out, self.resume, &identity, &settings)?;
        Times::of(self.out)?.keep(self.out)?;
        Ok(held)
    }

    /// The record of the run in `out`, if it is finished. `models` are the folders it left models in; where one
    /// is gone, the run goes on and makes it again. A report that is gone is written again here.
    ///
    /// # Errors
    /// A record that does not parse; what writing meets.
    pub fn finished(&self, models: &[PathBuf], watch: &mut Watch) -> Result<Option<RunRecord>> {
        self.told(|| self.found_finished(models, watch))
    }

    fn found_finished(&self, models: &[PathBuf], watch: &mut Watch) -> Result<Option<RunRecord>> {
        let file = self.out.join(report::RECORD_FILE);
        if !self.resume || !file.exists() {
            return Ok(None);
        }
        let record = report::read(&file)?;
        let gone: Vec<String> =
            models.iter().filter(|dir| !is_complete(dir)).map(|dir| dir.display().to_string()).collect();
        if !gone.is_empty() {
            let gone = gone.join(" and ");
            watch(Event::Note(&format!(
                "the run was finished, but no model is in {gone} any more: making it again"
            )));
            Times::of_finished(&record).keep(self.out)?;
            return Ok(None);
        }
        if !self.out.join(report::PAGE_FILE).exists() {
            report::write(&record, self.out)?;
        }
        Times::forget(self.out)?;
        Ok(Some(record))
    }

    /// Writes the report of the run, which ends it.
    ///
    /// # Errors
    /// What writing meets.
    pub fn finish(&self, record: &RunRecord) -> Result<()> {
        report::write(record, self.out)?;
        Times::forget(self.out)
    }

    /// Seconds spent on the run so far, by all processes that worked on it.
    ///
    /// # Errors
    /// A file of times that does not parse.
    pub fn seconds(&self) -> Result<f64> {
        Ok(Times::of(self.out)?.total())
    }

    /// Runs one training stage in the folder `dir`: from its saved state if there is one, or not at all if
    /// it is finished.
    fn stage(
        &self,
        name: &str,
        dir: &Path,
        start: &mut dyn FnMut() -> Result<Model>,
        recipe: Recipe,
        watch: &mut Watch,
    ) -> Result<Trained> {
        let mut clock = Instant::now();
        let state_dir = dir.join(STATE_DIR);
        let first = self.group.is_first();
        let finished = self.told(|| Ok(is_complete(dir)))?;
        let mut model = if finished && first {
            watch(Event::Note(&format!("{name}: finished before, read from {}", dir.display())));
            Model::load(dir)?
        } else {
            if first {
                model::reopen(dir)?;
                std::fs::create_dir_all(&state_dir).map_err(Error::io(&state_dir))?;
            }
            start()?
        };
        let of = model.stage;
        let mut curve = Vec::new();
        if !finished {
            let file = state_dir.join(STATE_FILE);
            let state = match first && file.exists() {
                true => State::load(&file, &mut model.params)?,
                false => State::default(),
            };
            let steps = total_steps(recipe.optimizer, self.train.examples.len());
            watch(Event::Stage { name, steps, done: state.progress.step });
            let checkpoint = first.then_some(file);
            let recipe = Recipe { checkpoint, ..recipe };
            let mut kept = Ok(0.0);
            let report = fit(&mut model, self.train, &recipe, state, &mut |e| {
                if let train::Event::Saved { .. } = e {
                    kept = Times::add(self.out, of, &mut clock);
                }
                watch(Event::Train(e));
            })?;
            kept?;
            if let Some(Uses { read, written, damaged, lost, why }) = report.cache {
                let n = read + written + lost;
                watch(Event::Note(&format!(
                    "{name}: {read} of {n} outputs of the teacher were in the cache"
                )));
                if damaged > 0 {
                    watch(Event::Note(&format!(
                        "{name}: {damaged} files of the cache were damaged, and their outputs computed again"
                    )));
                }
                if let Some(why) = why {
                    watch(Event::Note(&format!(
                        "{name}: {lost} outputs of the teacher were computed and not kept, the first because {why}"
                    )));
                }
            }
            if model.stage == Stage::Quantized {
                // The packed model keeps large dense weights in f16; rounding them here makes its scores this
                // stage's own.
                round_dense(&mut model.params)?;
            }
            curve = report.curve;
        }
        model.task = Some(self.task.name.into());
        model.max_length = self.train.max_length;
        model.fresh.clear();
        let done = self.told(|| {
            let (scores, one_class) = self.score(&model, name, watch)?;
            // The folder below may be the last thing that this process finishes.
            let mut seconds = Times::add(self.out, of, &mut clock)?;
            if finished {
                curve = read_curve(&dir.join("curve.json"))?;
            } else {
                model::write_json(&dir.join("curve.json"), &curve)?;
                model.save(dir, self.tokenizer_dir)?;
            }
            clear_state(&state_dir)?;
            if !finished {
                // What a later stage sees is what is on disk, so that a resumed run sees the same.
                model = Model::load(dir)?;
                seconds = Times::add(self.out, of, &mut clock)?;
            }
            Ok(Done { scores: scores.0, one_class, seconds })
        })?;
        // A stage's model has one form, whether it was trained or read; the weights are rank 0's.
        self.group.broadcast(&mut model.params.tensors_mut())?;
        let Done { scores, one_class, seconds } = done;
        Ok(Trained { model, scores: Scores(scores), one_class, seconds, curve })
    }

    /// What `f` gives on rank 0, for all: the others wait for it. An error there ends them all.
    fn told<T: Serialize + DeserializeOwned>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.group.is_first() {
            let own = f()?;
            self.group.share(&serde_json::to_string(&own).expect("plain data serialises"))?;
            return Ok(own);
        }
        let text = self.group.share("")?;
        let unknown =
            |e| Error::Mismatch(format!("rank 0 sent what this version of gpusq does not know: {e}"));
        serde_json::from_str(&text).map_err(unknown)
    }

    /// Dense fine-tuning into `dir`: labels only.
    ///
    /// # Errors
    /// What training or saving meets; the stage can be resumed then.
    pub fn finetune(&self, model: &Model, dir: &Path, watch: &mut Watch) -> Result<Trained> {
        let recipe = self.recipe(&self.config.train.fit, Mix::HARD, None);
        self.stage("dense", dir, &mut || Ok(model.clone()), recipe, watch)
    }

    /// The pruning stage into `dir`: masks, then training under the dense teacher (equation 6).
    ///
    /// # Errors
    /// What training or saving meets; the stage can be resumed then.
    pub fn prune(&self, dense: &Model, dir: &Path, watch: &mut Watch) -> Result<Trained> {
        let p = &self.config.prune;
        let d = &self.config.distill;
        let recipe = Recipe {
            mask_update_every: p.mask_update_every,
            stop_loss: p.stop_loss,
            ..self.recipe(&p.fit, mix(d)?, d.enabled.then_some(dense))
        };
        let start = &mut || {
            let mut model = dense.clone();
            prune_weights(&mut model, p, &self.samples(), self.compute)?;
            Ok(model)
        };
        self.stage("2:4", dir, start, recipe, watch)
    }

    /// The quantisation stage into `dir`: calibration, then training under the pruned teacher (equation 7).
    ///
    /// # Errors
    /// A model that is not pruned; what training or saving meets; the stage can be resumed then.
    pub fn quantize(&self, pruned: &Model, dir: &Path, watch: &mut Watch) -> Result<Trained> {
        if pruned.stage != Stage::Pruned {
            let message =
                format!("the model is {}; quantisation starts from a pruned one", pruned.stage.title());
            return Err(Error::Mismatch(message));
        }
        let q = &self.config.quantize;
        let d = &self.config.distill;
        let recipe = Recipe {
            scale_learning_rate: q.scale_learning_rate,
            stop_loss: q.stop_loss,
            ..self.recipe(&q.fit, mix(d)?, d.enabled.then_some(pruned))
        };
        let start = &mut || {
            let mut model = pruned.clone();
            quant::calibrate(&mut model, &self.samples(), &calibration(q), self.compute)?;
            Ok(model)
        };
        self.stage("2:4 INT8", dir, start, recipe, watch)
    }

    /// Bytes of the teachers' outputs that training as each of `fits` says keeps in the cache; 0 if there is none.
    ///
    /// # Errors
    /// Settings of the loss that do not go together.
    pub fn cache_bytes(&self, model: &Model, fits: &[&config::Fit]) -> Result<u64> {
        let d = &self.config.distill;
        if self.teacher_cache.is_none() || !d.enabled {
            return Ok(0);
        }
        let mix = mix(d)?;
        let of = |fit: &&config::Fit| {
            teacher_cache::bytes(&model.spec, self.train, fit, self.config.seed, &mix, self.compute)
        };
        Ok(fits.iter().map(of).sum())
    }

    fn recipe<'a>(&'a self, optimizer: &'a config::Fit, mix: Mix, teacher: Option<&'a Model>) -> Recipe<'a> {
        Recipe {
            optimizer,
            mix,
            teacher,
            scale_learning_rate: 0.0,
            mask_update_every: 0,
            stop_loss: None,
            seed: self.config.seed,
            checkpoint: None,
            pad: self.pad(),
            compute: self.compute,
            group: self.group,
            pipeline_parallel_size: self.pipeline_parallel_size,
            teacher_cache: self.teacher_cache,
        }
    }

    /// Writes the engine's form of `model` into `dir` and scores it from there. Gives the seconds spent on both
    /// forms too, by all processes that worked on them.
    ///
    /// # Errors
    /// A model that is neither pruned nor quantised; what saving or the engine meets.
    pub fn pack(&self, model: &Model, dir: &Path, watch: &mut Watch) -> Result<(Model, Scores, bool, f64)> {
        let mut clock = Instant::now();
        if !is_complete(dir) {
            model::reopen(dir)?;
            std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
            model.packed()?.save(dir, self.tokenizer_dir)?;
        }
        let packed = Model::load(dir)?;
        let (scores, one_class) = self.score(&packed, packed.stage.title(), watch)?;
        let seconds = Times::add(self.out, model.stage, &mut clock)?;
        Ok((packed, scores, one_class, seconds))
    }

    /// What a process other than rank 0 does of [`Run::compress`]: its part of the training.
    ///
    /// # Errors
    /// What training meets, here or in another process.
    pub fn follow(&self, dense: &Model, watch: &mut Watch) -> Result<()> {
        let [pruned, _, quantized, _] = MODELS.map(|name| self.out.join(name));
        let pruned = self.prune(dense, &pruned, watch)?;
        self.quantize(&pruned.model, &quantized, watch)?;
        Ok(())
    }

    /// All stages of compression of the dense model into `out`, with report. `dense_scores` are the dense
    /// model's, if they are known already.
    ///
    /// # Errors
    /// What any stage meets; the run can be resumed then.
    pub fn compress(&self, dense: &Model, watch: &mut Watch) -> Result<RunRecord> {
        let mut record = self.record(dense)?;
        record.variant = variant(self.config.prune.attention, &self.config.distill);
        let mut clock = Instant::now();
        let (scores, one_class) = self.score(dense, "dense", watch)?;
        let seconds = Times::add(self.out, dense.stage, &mut clock)?;
        record.main_metric = scores.0[0].0.clone();
        record.stages.push(self.scored("dense", &scores, one_class, seconds));

        let [pruned, packed_fp16, quantized, packed_int8] = MODELS.map(|name| self.out.join(name));
        let pruned = self.prune(dense, &pruned, watch)?;
        let (_, scores, one_class, seconds) = self.pack(&pruned.model, &packed_fp16, watch)?;
        record.stages.push(self.scored("2:4 FP16", &scores, one_class, seconds));
        record.curves.push(curve("prune", &pruned.curve));

        let quantized = self.quantize(&pruned.model, &quantized, watch)?;
        let (packed, scores, one_class, seconds) = self.pack(&quantized.model, &packed_int8, watch)?;
        if scores != quantized.scores {
            let note =
                format!("the packed model scores {scores}, the fake-quantised one {}", quantized.scores);
            watch(Event::Note(&note));
            record.notes.push(note);
        }
        record.stages.push(self.scored("2:4 INT8", &scores, one_class, seconds));
        record.curves.push(curve("quantise", &quantized.curve));

        record.layers = layers(&quantized.model);
        record.sizes = Some(sizes(&packed, &packed_int8.join(PACKED_FILE))?);
        record.wall_seconds = self.seconds()?;
        self.finish(&record)?;
        Ok(record)
    }

    /// Ends a run of one stage, which made `trained`: its record, called `stage` in it, written as the report.
    ///
    /// # Errors
    /// What writing meets.
    pub fn report(&self, trained: &Trained, stage: &str, sizes: Option<report::Sizes>) -> Result<RunRecord> {
        let mut record = self.record(&trained.model)?;
        record.main_metric = trained.scores.0[0].0.clone();
        record.stages.push(self.scored(stage, &trained.scores, trained.one_class, trained.seconds));
        record.curves.push(curve(stage, &trained.curve));
        record.layers = layers(&trained.model);
        record.sizes = sizes;
        record.wall_seconds = self.seconds()?;
        self.finish(&record)?;
        Ok(record)
    }

    /// Removes the models that a finished [`Run::compress`] left in `out`. Its report stays, and with it the run
    /// is still known as finished. Leaves an unfinished run alone.
    ///
    /// # Errors
    /// What removing meets.
    pub fn discard_models(&self) -> Result<()> {
        if !self.out.join(report::RECORD_FILE).exists() {
            return Ok(());
        }
        for folder in MODELS.map(|name| self.out.join(name)) {
            match std::fs::remove_dir_all(&folder) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&folder)(e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// A record with what is known before the first stage.
    ///
    /// # Errors
    /// A file of times that does not parse.
    pub fn record(&self, model: &Model) -> Result<RunRecord> {
        let stack = model.spec.last_stack();
        let on = match self.group.size() {
            1 => self.compute.to_string(),
            n if self.pipeline_parallel_size > 1 => {
                format!("{}, the first of a pipeline of {n} processes", self.compute)
            }
            n => format!("{}, the first of {n} processes", self.compute),
        };
        Ok(RunRecord {
            title: format!(
                "{} {} x {}",
                model.config.json["model_type"].as_str().unwrap_or("model"),
                stack.layers,
                stack.hidden
            ),
            task: self.task.name.into(),
            variant: match model.stage {
                Stage::Dense => "dense, nothing compressed".into(),
                _ => variant(model.attention, &self.config.distill),
            },
            started: Times::of(self.out)?.started,
            machine: report::Machine::current(rayon::current_num_threads(), &on),
            version: env!("CARGO_PKG_VERSION").into(),
            command: self.command.clone(),
            config: self.config.to_toml(),
            notes: self.train.notes.iter().chain(&self.dev.notes).cloned().collect(),
            ..RunRecord::default()
        })
    }

    /// A scored model as the report shows it.
    pub fn scored(&self, name: &str, scores: &Scores, one_class: bool, seconds: f64) -> report::Stage {
        report::Stage {
            name: name.into(),
            scores: scores.0.clone(),
            wall_seconds: seconds,
            one_class,
            examples: self.dev.count,
        }
    }
}

/// What the paper calls a model whose attention keeps `attention`, and that it had no teacher if so.
fn variant(attention: Option<Pattern>, distill: &config::Distill) -> String {
    let what = attention.map_or("GEMM".into(), |p| format!("GEMM-MHA, attention {p}"));
    if distill.enabled { what } else { format!("{what}, without distillation (labels only)") }
}

/// The report's form of a loss curve.
pub fn curve(stage: &str, points: &[train::Point]) -> report::Curve {
    let point = |p: &train::Point| report::Point {
        step: p.step as u64,
        loss: p.terms.total as f64,
        hard: p.terms.hard as f64,
        soft: p.terms.soft as f64,
        feature: p.terms.feature as f64,
        lr: p.learning_rate,
    };
    report::Curve { stage: stage.into(), points: points.iter().map(point).collect() }
}

/// Removes the state of a stage that is finished, and its folder unless the run's lock is in it.
fn clear_state(folder: &Path) -> Result<()> {
    let file = folder.join(STATE_FILE);
    match std::fs::remove_file(&file) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&file)(e)),
        _ => {}
    }
    // Fails where the lock is, and that is right.
    let _ = std::fs::remove_dir(folder);
    Ok(())
}

fn read_curve(path: &Path) -> Result<Vec<train::Point>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|e| Error::line(path, e.line(), e.to_string()))
}

/// One row for each linear map of a compressed model: sparsity, quantisation error, step size. None for a
/// dense one, of which nothing is compressed.
pub fn layers(model: &Model) -> Vec<report::LayerRow> {
    if model.stage == Stage::Dense {
        return Vec::new();
    }
    let row = |l: crate::spec::Linear| {
        let weight = model.params.get(&format!("{}.weight", l.name));
        let scale = match model.params.get(&l.input_scale()) {
            Some(Weight::Dense(t)) => t.item() as f64,
            _ => f64::NAN,
        };
        let (kept, error) = match weight {
            Some(Weight::Fake { value, mask, scale }) => {
                let kept = mask.u8().iter().filter(|&&m| m != 0).count() as f64 / mask.len() as f64;
                (kept, quant::relative_error(&apply(value, mask), scale))
            }
            Some(Weight::Masked { mask, .. }) => {
                (mask.u8().iter().filter(|&&m| m != 0).count() as f64 / mask.len() as f64, f64::NAN)
            }
            Some(Weight::Packed(_)) => (0.5, f64::NAN),
            _ => (1.0, f64::NAN),
        };
        report::LayerRow {
            kept,
            weight_error: error,
            activation_scale: scale,
            left_dense: compressible(&l),
            name: l.name,
            rows: l.rows,
            cols: l.cols,
        }
    };
    model.spec.linears().into_iter().map(row).collect()
}

/// Sizes of a packed model and its file.
pub fn sizes(packed: &Model, file: &Path) -> Result<report::Sizes> {
    let s = crate::format::packed::sizes(&packed.params);
    let bytes = std::fs::metadata(file).map_err(Error::io(file))?.len();
    Ok(report::Sizes {
        dense_fp16_bits: s.dense_fp16_bits,
        packed_bits: s.packed_bits,
        scale_bits: s.scale_bits,
        rest_bits: s.rest_bits,
        file_bytes: bytes,
    })
}
