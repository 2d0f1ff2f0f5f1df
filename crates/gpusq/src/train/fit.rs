//! The training loop.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use gpusq_tensor::cuda::Replay;
use gpusq_tensor::ops::add::accumulate;
use gpusq_tensor::ops::masked::MaskGradient;
use gpusq_tensor::{AdamW, Device, Group, Moments, Slot, Tape, Tensor, Update};
use serde::{Deserialize, Serialize};

use super::batch::{Batch, MicroBatch, collate, epoch};
use super::memory::Step;
use super::state::{SCALE, State, gather_params};
use super::teacher_cache::{TeacherCache, Uses};
use crate::arch::{self, Layout};
use crate::config::{self, Schedule};
use crate::distill::{Mix, Sums, Terms, loss};
use crate::forward::{Bound, Compute, Inputs, Output, forward, prepare};
use crate::model::Model;
use crate::params::{Params, Weight};
use crate::sparsity::{Pattern, mask_rows};
use crate::spec::{Section, TransformerSpec, is_step_size};
use crate::task::Dataset;
use crate::{Error, Result};

/// What a training stage does, besides the optimiser's settings.
pub struct Recipe<'a> {
    /// Optimiser, schedule, batch size and budget.
    pub optimizer: &'a config::Fit,
    /// Weights of the loss terms.
    pub mix: Mix,
    /// The model whose outputs are imitated; `None` trains on labels alone.
    pub teacher: Option<&'a Model>,
    /// Folder in which the teacher's outputs are kept, for later epochs and runs; not in a pipeline.
    pub teacher_cache: Option<&'a Path>,
    /// Learning rate of step sizes (of their logarithm).
    pub scale_learning_rate: f64,
    /// Steps between new masks from the current magnitudes; 0 keeps the masks.
    pub mask_update_every: usize,
    /// Running loss at which training ends early (delta_prune, delta_calibrate).
    pub stop_loss: Option<f64>,
    /// Seed of batch order and dropout.
    pub seed: u64,
    /// Where the state is kept, every [`config::Fit::checkpoint_every`] steps; of several processes, only rank 0 has this.
    pub checkpoint: Option<PathBuf>,
    /// Padding id for batches.
    pub pad: u32,
    /// Where and in what it computes.
    pub compute: Compute,
    /// The processes that train together: each with its part of every batch, or with its section of the model.
    pub group: &'a Group,
    /// In how many sections the model is split: as many as there are processes, or 1, where each has the whole model.
    pub pipeline_parallel_size: usize,
}

/// One point of the loss curve: means over the steps since the last point.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Steps done.
    pub step: usize,
    /// Loss and its terms.
    #[serde(flatten)]
    pub terms: Terms,
    /// Learning rate.
    pub learning_rate: f64,
}

/// What the loop tells whoever watches.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A step is done.
    Step {
        /// Steps done.
        step: usize,
        /// Steps in all.
        steps: usize,
        /// The step's loss.
        terms: Terms,
        /// Its learning rate.
        learning_rate: f64,
        /// Unpadded tokens in its batch.
        tokens: usize,
    },
    /// The state was saved.
    Saved {
        /// Steps done.
        step: usize,
    },
    /// The running loss fell below the threshold, so the stage ends early.
    Stopped {
        /// Steps done.
        step: usize,
        /// The running loss.
        running: f64,
    },
}

/// What a stage did.
#[derive(Clone, Debug)]
pub struct Report {
    /// Steps done.
    pub steps: usize,
    /// The loss curve.
    pub curve: Vec<Point>,
    /// How often the teacher's cache was used, if there is one.
    pub cache: Option<Uses>,
    /// How many steps a GPU did from graphs.
    pub replayed: usize,
}

/// Gradients by weight's name, each with that of its step sizes if it has some.
pub(super) type Gradients = BTreeMap<String, (Tensor, Option<Tensor>)>;

/// Loss and gradients of those parts of a batch that are done.
#[derive(Default)]
pub(super) struct Summed {
    pub(super) losses: Option<Sums>,
    pub(super) gradients: Gradients,
}

impl Summed {
    pub(super) fn add_losses(&mut self, other: Sums) {
        match &mut self.losses {
            None => self.losses = Some(other),
            Some(losses) => losses.add(other),
        }
    }

    pub(super) fn add(&mut self, gradients: Gradients) {
        for (name, (g, scale)) in gradients {
            let Some((sum, sum_scale)) = self.gradients.get_mut(&name) else {
                self.gradients.insert(name, (g, scale));
                continue;
            };
            accumulate(sum, &g);
            if let (Some(sum), Some(g)) = (sum_scale, scale) {
                accumulate(sum, &g);
            }
        }
    }

    /// The gradients of those weights whose names `wanted` takes.
    fn tensors(&mut self, wanted: impl Fn(&str) -> bool) -> Vec<&mut Tensor> {
        let these = self.gradients.iter_mut().filter(|(name, _)| wanted(name));
        these.flat_map(|(_, (g, scale))| std::iter::once(g).chain(scale)).collect()
    }
}

/// Decay of the running loss.
const RUNNING: f64 = 0.98;

/// Learning rate at step `step` (from 0) of `steps`.
fn learning_rate(o: &config::Fit, step: usize, steps: usize) -> f64 {
    let warm = (o.warmup * steps as f64).round();
    if (step as f64) < warm {
        return o.learning_rate * (step + 1) as f64 / warm;
    }
    let left = (steps - step) as f64 / (steps as f64 - warm).max(1.0);
    o.learning_rate
        * match o.schedule {
            Schedule::Constant => 1.0,
            Schedule::Linear => left,
            Schedule::Cosine => 0.5 * (1.0 - (std::f64::consts::PI * left).cos()),
        }
}

/// Steps a run over `examples` takes.
pub fn total_steps(o: &config::Fit, examples: usize) -> usize {
    let per_epoch = examples.div_ceil(o.batch_size);
    let steps = per_epoch * o.epochs;
    o.max_steps.map_or(steps, |m| steps.min(m)).max(1)
}

/// The sections of a model that `size` processes train; none if each has the whole model.
///
/// # Errors
/// [`Error::Config`] if the model or the number of processes does not allow a pipeline of `pipeline` processes.
pub fn sections(spec: &TransformerSpec, pipeline: usize, size: usize) -> Result<Vec<Section>> {
    if pipeline == 1 {
        return Ok(Vec::new());
    }
    if pipeline != size {
        return Err(Error::Config(format!(
            "a pipeline of {pipeline} processes was asked for, and there are {size}; a pipeline takes all processes (data \
             parallel training beside it is not supported): start {pipeline} processes (`gpusq launch --gpus {pipeline}` \
             does on one host), or ask for a pipeline of {size}"
        )));
    }
    let no = |why| {
        Error::Config(format!("the model cannot be split over a pipeline of {pipeline} processes: {why}"))
    };
    spec.sections(pipeline).map_err(no)
}

fn own(section: Option<&Section>, params: &Params) -> Params {
    section.map_or_else(|| params.clone(), |s| params.part(|name| s.owns(name)))
}

/// One optimiser step, with everything about it that does not change from step to step.
pub struct Stepper<'a> {
    pub(super) how: &'a Recipe<'a>,
    /// The student's specification with the run's dropout.
    pub(super) spec: TransformerSpec,
    /// Weights that are constants of the checkpoint.
    frozen: BTreeSet<String>,
    pub(super) quiet: Tape,
    pub(super) teacher: Option<(&'a Model, Bound)>,
    cache: Option<TeacherCache>,
    /// Where steps are replayed from graphs: one process on a GPU that computes its teacher's outputs itself.
    replay: Option<RefCell<Replay<Shape>>>,
    pub(super) gradient: MaskGradient,
    /// Those of a pipeline, by rank; none where each process has the whole model.
    sections: Vec<Section>,
}

/// What decides what a step asks of a GPU: of each part its sequences, their length, and whether some are padded.
type Shape = Vec<(usize, usize, bool)>;

fn shape(parts: &[MicroBatch]) -> Shape {
    let tokens = parts.iter().map(|p| &p.batch.inputs.tokens);
    tokens.map(|t| (t.batch, t.length, t.mask.is_some())).collect()
}

/// Is told what the names of a block's weights begin with when their gradients are there.
type Reached<'r> = &'r mut dyn FnMut(&mut Summed, &str);

impl<'a> Stepper<'a> {
    /// Prepares to train `student` as `how` says.
    ///
    /// # Errors
    /// A model that cannot be split as `how` asks; a teacher's cache in a pipeline, or in a folder that cannot be made; a
    /// lost process.
    pub fn new(student: &Model, how: &'a Recipe<'a>) -> Result<Self> {
        let sections = sections(&student.spec, how.pipeline_parallel_size, how.group.size())?;
        if !sections.is_empty() {
            how.group.connect_neighbours()?;
        }
        let mut spec = student.spec.clone();
        if let Some(p) = how.optimizer.dropout {
            for s in spec.encoder.iter_mut().chain(spec.decoder.iter_mut()) {
                let p = p as f32;
                (s.dropout.hidden, s.dropout.attention, s.dropout.head) = (p, p, p);
            }
        }
        let frozen = (arch::find(&student.config)?.tensors)(&spec)
            .into_iter()
            .filter(|e| e.layout == Layout::Constant)
            .map(|e| e.ours)
            .collect();
        prepare(&spec, student.attention, how.compute);
        if let Some(teacher) = how.teacher {
            prepare(&teacher.spec, teacher.attention, how.compute);
        }
        let cache = match (how.teacher, how.teacher_cache) {
            (Some(_), Some(_)) if !sections.is_empty() => {
                let message = "a pipeline cannot keep its teacher's outputs: each process has a part of them; leave out \
                               teacher_cache";
                return Err(Error::Config(message.into()));
            }
            (Some(teacher), Some(dir)) => Some(TeacherCache::open(dir, teacher, &how.mix, how.compute)?),
            _ => None,
        };
        let quiet = Tape::inference();
        let section = sections.get(how.group.rank());
        let bound = |t: &Model| Bound::new(&quiet, &own(section, &t.params), MaskGradient::Kept, how.compute);
        let teacher = how.teacher.map(|t| (t, bound(t)));
        let replay = match how.compute.device {
            Device::Cuda(gpu) if how.group.size() == 1 && cache.is_none() => {
                Some(RefCell::new(Replay::new(gpu)))
            }
            _ => None,
        };
        let gradient = if how.mask_update_every > 0 { MaskGradient::All } else { MaskGradient::Kept };
        Ok(Stepper { how, spec, frozen, quiet, teacher, cache, replay, gradient, sections })
    }

    /// Of `params` those that this process trains: all, or those of its section.
    pub fn own(&self, params: &Params) -> Params {
        own(self.sections.get(self.how.group.rank()), params)
    }

    /// Step number `step` (from 0) at learning rate `lr` on a batch, given as the parts that this process computes (of a
    /// pipeline each computes all): teacher and student forward, loss, backward of each, sums over all processes,
    /// clipping, AdamW. Those of the student's weights and moments that are [`Stepper::own`] are on the recipe's device.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, and the weights are untouched then; what the GPU meets; a lost process.
    pub fn step(
        &self,
        student: &mut Model,
        moments: &mut BTreeMap<String, Moments>,
        parts: &[MicroBatch],
        step: usize,
        lr: f64,
    ) -> Result<Terms> {
        let how = self.how;
        let mut whole = || self.terms_and_norm(student, moments, parts, step, lr);
        let done = match &self.replay {
            Some(replay) => replay.borrow_mut().run(shape(parts), whole),
            None => whole(),
        };
        let (terms, norm) = done?;
        let finished = how.compute.device.check();
        // Whoever is lost explains what else went wrong.
        how.group.check()?;
        finished?;
        if terms.total.is_finite() && norm.is_finite() {
            return Ok(terms);
        }
        let what = if terms.total.is_finite() {
            format!("the gradient's norm is {norm}")
        } else {
            format!("the loss is {}", terms.total)
        };
        if step == 0 {
            let message = format!(
                "{what} at step 1, before any weight was trained: the model's own outputs are not finite or far too \
                 large; check its config.json and weights, or copy it again"
            );
            return Err(Error::file(
                student.config.path().parent().unwrap_or(student.config.path()),
                message,
            ));
        }
        Err(Error::Mismatch(format!(
            "{what} at step {}; lower the learning rate (now {}) or raise the warm-up{}",
            step + 1,
            how.optimizer.learning_rate,
            if how.checkpoint.is_some() { "; the last saved state is kept" } else { "" }
        )))
    }

    /// How many steps a GPU did from graphs.
    pub fn replayed(&self) -> usize {
        self.replay.as_ref().map_or(0, |r| r.borrow().replayed())
    }

    /// [`Stepper::step`] without looking at what came out: the loss, and the gradient's norm. Waits for a GPU at its end.
    fn terms_and_norm(
        &self,
        student: &mut Model,
        moments: &mut BTreeMap<String, Moments>,
        parts: &[MicroBatch],
        step: usize,
        lr: f64,
    ) -> Result<(Terms, f32)> {
        let (how, o) = (self.how, self.how.optimizer);
        let section = self.sections.get(how.group.rank());
        let (mut losses, gradients) = how.compute.training(|| match section {
            Some(section) => self.through_pipeline(section, student, parts, step),
            None => self.of_parts(student, parts, step),
        })?;
        let adam = AdamW {
            learning_rate: lr as f32,
            beta1: o.beta1 as f32,
            beta2: o.beta2 as f32,
            eps: o.eps as f32,
            step: step as u32 + 1,
            max_norm: o.max_grad_norm.map(|max| max as f32),
        };
        let mut slots = self.slots(student, moments, &gradients, lr);
        let squares = match section {
            None => None,
            // Gradients are of this section alone, and their norm is of all.
            Some(_) => {
                let group = how.group;
                let mut squares = AdamW::squares(how.compute.device, &mut slots, group.rank(), group.size());
                group.sum(&mut losses.values().chain([&mut squares]).collect::<Vec<_>>())?;
                Some(squares)
            }
        };
        let norm = adam.step_of(losses.total(), squares.as_ref(), &mut slots);
        Ok(losses.terms_beside(&norm))
    }

    /// What the student computes `part` of the batch of step `step` on.
    pub(super) fn tape(&self, part: &MicroBatch, step: usize) -> Tape {
        let seed = self.how.seed ^ (step as u64 + 1).wrapping_mul(0xA076_1D64_78BD_642F);
        Tape::training(seed).of_part(part.part).recomputing(self.how.optimizer.gradient_checkpointing)
    }

    /// Loss and gradients of the batch of step `step`, of which this process computes `parts`: summed over all processes.
    /// On GPUs the gradients of a block are summed while the backward pass goes on with the blocks before it.
    fn of_parts(&self, student: &Model, parts: &[MicroBatch], step: usize) -> Result<(Sums, Gradients)> {
        let group = self.how.group;
        let mut summed = Summed::default();
        let mut asked: Vec<String> = Vec::new();
        let mut outcome = Ok(());
        for (i, part) in parts.iter().enumerate() {
            let mut sum = |summed: &mut Summed, block: &str| {
                if outcome.is_ok() {
                    outcome = group.sum_beside(&mut summed.tensors(|name| name.starts_with(block)));
                    asked.push(block.to_string());
                }
            };
            let reached: Option<Reached> = match group.size() > 1 && i + 1 == parts.len() {
                true => Some(&mut sum),
                false => None,
            };
            self.differentiate(student, part, step, &mut summed, reached)?;
        }
        outcome?;
        let mut losses = summed.losses.take().expect("a batch has parts");
        let mut rest = summed.tensors(|name| !asked.iter().any(|block| name.starts_with(block)));
        rest.extend(losses.values());
        group.sum(&mut rest)?;
        Ok((losses, summed.gradients))
    }

    /// Adds loss and gradients of `part` of the batch of step `step` to `summed`, and calls `reached`, if anybody asks,
    /// with what the names of a block's weights begin with when those are there.
    fn differentiate(
        &self,
        student: &Model,
        part: &MicroBatch,
        step: usize,
        summed: &mut Summed,
        mut reached: Option<Reached>,
    ) -> Result<()> {
        let (how, Batch { inputs, targets }) = (self.how, &part.batch);
        let taps = how.mix.taps();
        let taught = self.taught(inputs)?;
        let tape = self.tape(part, step);
        let bound = Bound::new(&tape, &student.params, self.gradient, how.compute);
        let out = forward(&tape, &self.spec, &bound, student.attention, inputs, taps);
        let l = loss(&tape, &how.mix, &out, taught.as_ref(), targets, &inputs.tokens, part.share);
        let mut grads = tape.backward_with(Some(&l.total), None, &mut |block, grads| {
            if let Some(reached) = reached.as_deref_mut() {
                summed.add(bound.gradients(grads, block));
                reached(summed, block);
            }
        });
        // Weights are updated in place once nothing else holds them, and `bound` ends here.
        summed.add(bound.gradients(&mut grads, ""));
        summed.add_losses(l.sums());
        Ok(())
    }

    /// The teacher's outputs for `inputs`, if there is one.
    fn taught(&self, inputs: &Inputs) -> Result<Option<Output>> {
        let Some((t, bound)) = &self.teacher else { return Ok(None) };
        let taps = self.how.mix.taps();
        let compute = || forward(&self.quiet, &t.spec, bound, t.attention, inputs, taps);
        match &self.cache {
            Some(cache) => cache.outputs(&self.quiet, inputs, compute).map(Some),
            None => Ok(Some(compute())),
        }
    }

    /// Every tensor that is trained, with its gradient and moments; these start at 0.
    fn slots<'s>(
        &self,
        student: &'s mut Model,
        moments: &'s mut BTreeMap<String, Moments>,
        gradients: &'s Gradients,
        lr: f64,
    ) -> Vec<Slot<'s>> {
        let trained = || gradients.iter().filter(|(name, _)| !self.frozen.contains(*name));
        for (name, (grad, scale_grad)) in trained() {
            if let Some(g) = scale_grad {
                moments.entry(format!("{name}{SCALE}")).or_insert_with(|| Moments::new(g));
            }
            moments.entry(name.clone()).or_insert_with(|| Moments::new(grad));
        }
        let mut moments: BTreeMap<&str, &mut Moments> =
            moments.iter_mut().map(|(name, m)| (name.as_str(), m)).collect();
        let mut weights: BTreeMap<&str, &mut Weight> = student.params.iter_mut().collect();
        // Step sizes are trained in their logarithm, where a step is a relative change.
        let o = self.how.optimizer;
        let positive =
            Update::Positive { learning_rate: (self.how.scale_learning_rate * lr / o.learning_rate) as f32 };
        let mut slots = Vec::new();
        for (name, (grad, scale_grad)) in trained() {
            let mut take = |name: &str| moments.remove(name).expect("made above");
            let weight = weights.remove(name.as_str()).expect("gradients are of weights");
            let param = match weight {
                Weight::Fake { value, scale, .. } => {
                    if let Some(grad) = scale_grad {
                        let moments = take(&format!("{name}{SCALE}"));
                        slots.push(Slot { param: scale, grad, moments, update: positive });
                    }
                    value
                }
                Weight::Dense(t) | Weight::Masked { value: t, .. } => t,
                Weight::Packed(_) => unreachable!("packed weights are not trained"),
            };
            let update = match is_step_size(name) {
                true => positive,
                // Biases and norms are not decayed (Devlin et al. 2019, published code).
                false => Update::Weight {
                    decay: if param.shape().len() >= 2 { o.weight_decay as f32 } else { 0.0 },
                },
            };
            slots.push(Slot { param, grad, moments: take(name), update });
        }
        slots
    }
}

/// Trains `student` on `data`, from `state` on; of several processes, from the weights and state of rank 0. The same
/// inputs give the same bits on the same CPU, however often the run was stopped and resumed. `student` comes and goes in host memory, wherever training computes.
///
/// # Errors
/// A loss or gradient that is not finite or a GPU that fails (the last saved state stays), or what saving meets.
pub fn fit(
    student: &mut Model,
    data: &Dataset,
    how: &Recipe,
    mut state: State,
    watch: &mut dyn FnMut(Event),
) -> Result<Report> {
    let o = how.optimizer;
    let steps = total_steps(o, data.examples.len());
    state = state.share(how.group, &mut student.params)?;
    let per_epoch = data.examples.len().div_ceil(o.batch_size);
    let stepper = Stepper::new(student, how)?;
    // Only what is trained here goes to the device; of a pipeline the rest stays, to be filled in at the end.
    let own = stepper.own(&student.params).to(how.compute.device);
    let rest = std::mem::replace(&mut student.params, own);
    state.moments.retain(|name, _| stepper.sections.get(how.group.rank()).is_none_or(|s| s.owns(name)));
    let rest = (!stepper.sections.is_empty()).then_some(rest);
    for m in state.moments.values_mut() {
        *m = m.to(how.compute.device);
    }
    let quantises = student.params.iter().any(|(_, w)| matches!(w, Weight::Fake { .. }));
    let needs = |batch: &Batch, accumulates: bool| Step {
        length: batch.inputs.tokens.length,
        teacher: how.teacher.is_some(),
        quantises,
        recomputes: o.gradient_checkpointing,
        accumulates,
        pipeline: how.pipeline_parallel_size,
        compute: how.compute,
    };
    let mut order: (usize, Vec<Vec<usize>>) = (usize::MAX, Vec::new());
    while state.progress.step < steps && !state.progress.stopped {
        let step = state.progress.step;
        let n = step / per_epoch;
        if order.0 != n {
            order = (n, epoch(&data.examples, o, how.seed, n));
        }
        let batch = collate(&data.examples, &order.1[step % per_epoch], data.head, how.pad);
        let lr = learning_rate(o, step, steps);
        let (rank, size) = match rest {
            Some(_) => (0, 1),
            None => (how.group.rank(), how.group.size()),
        };
        let own = batch.inputs.tokens.batch.div_ceil(size);
        let most = o.micro_batch(own, how.pipeline_parallel_size);
        let parts = batch.parts(rank, size, most, how.teacher.is_some());
        let most = parts.iter().map(|p| p.part.count).max().unwrap_or(0);
        let done = stepper.step(student, &mut state.moments, &parts, step, lr);
        let terms = needs(&batch, parts.len() > 1).explain(&stepper.spec, most, done)?;
        let p = &mut state.progress;
        p.step = step + 1;
        // No step is a multiple of 0, which stands for never.
        if p.step.is_multiple_of(how.mask_update_every) && p.step < steps {
            update_masks(student);
        }
        p.running.0 = RUNNING * p.running.0 + (1.0 - RUNNING) * terms.total as f64;
        p.running.1 = RUNNING * p.running.1 + (1.0 - RUNNING);
        p.recent.push(terms);
        let running = p.running.0 / p.running.1;
        p.stopped = how.stop_loss.is_some_and(|limit| running < limit);
        if p.step.is_multiple_of(o.log_every) || p.step == steps || p.stopped {
            p.curve.push(Point { step: p.step, terms: mean(&p.recent), learning_rate: lr });
            p.recent.clear();
        }
        let tokens = batch.inputs.tokens.unpadded();
        watch(Event::Step { step: p.step, steps, terms, learning_rate: lr, tokens });
        if p.stopped {
            watch(Event::Stopped { step: p.step, running });
        }
        if p.step.is_multiple_of(o.checkpoint_every) && p.step < steps {
            let gathered = match &rest {
                Some(rest) => Some(state.gather(how.group, &stepper.sections, rest, &student.params)?),
                None => None,
            };
            if let Some(path) = &how.checkpoint {
                match &gathered {
                    Some((state, params)) => state.save(path, params)?,
                    None => state.save(path, &student.params)?,
                }
                watch(Event::Saved { step: state.progress.step });
            }
        }
    }
    student.params = student.params.to(Device::Cpu);
    how.compute.device.check()?;
    if let Some(rest) = &rest {
        student.params = gather_params(how.group, &stepper.sections, rest, &student.params)?;
        how.group.broadcast(&mut student.params.tensors_mut())?;
    }
    let p = state.progress;
    let replayed = stepper.replayed();
    Ok(Report {
        steps: p.step,
        curve: p.curve,
        cache: stepper.cache.as_ref().map(TeacherCache::uses),
        replayed,
    })
}

fn mean(terms: &[Terms]) -> Terms {
    let n = terms.len().max(1) as f32;
    let of = |f: fn(&Terms) -> f32| terms.iter().map(f).sum::<f32>() / n;
    Terms { total: of(|t| t.total), hard: of(|t| t.hard), soft: of(|t| t.soft), feature: of(|t| t.feature) }
}

/// New masks from current magnitudes.
fn update_masks(model: &mut Model) {
    for (_, w) in model.params.iter_mut() {
        if let Weight::Masked { value, mask } | Weight::Fake { value, mask, .. } = w {
            let (host, mut chosen) = (value.to(Device::Cpu), mask.to(Device::Cpu));
            mask_rows(host.f32(), host.width(), Pattern::TWO_FOUR, chosen.u8_mut());
            // The old one's memory is free before the new one takes some: it gets the same, as graphs have it.
            *mask = chosen;
            *mask = mask.to(value.device());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_warm_up_and_end_low() {
        let o = config::Fit {
            learning_rate: 1.0,
            warmup: 0.1,
            schedule: Schedule::Linear,
            ..config::Fit::default()
        };
        let rates: Vec<f64> = (0..100).map(|s| learning_rate(&o, s, 100)).collect();
        assert!((rates[0] - 0.1).abs() < 1e-12 && (rates[9] - 1.0).abs() < 1e-12);
        assert!((rates[10] - 1.0).abs() < 1e-12 && rates[99] > 0.0 && rates[99] < 0.02);
        assert!(rates[10..].windows(2).all(|w| w[1] < w[0]));
        let flat = config::Fit { schedule: Schedule::Constant, ..o.clone() };
        assert_eq!(learning_rate(&flat, 99, 100), 1.0);
        let cosine = config::Fit { schedule: Schedule::Cosine, ..o };
        assert!((learning_rate(&cosine, 55, 100) - 0.5).abs() < 1e-9);
    }
}
