//! `gpusq finetune | prune | quantize | compress`: the training commands.

use std::path::{Path, PathBuf};

use clap::ArgMatches;
use gpusq::compress::{self, Run, Trained};
use gpusq::config::Config;
use gpusq::format::packed::PACKED_FILE;
use gpusq::forward::Compute;
use gpusq::model::{Model, Stage};
use gpusq::outdir::{self, Held};
use gpusq::preflight::preflight;
use gpusq::task::{Dataset, Scores, Split, Task, Tokenizer, task};
use gpusq::tensor::Group;
use gpusq::train::{sections, teacher_cache};
use gpusq::{Error, Result, report};
use serde_json::json;

use crate::args;
use crate::progress::Progress;
use crate::ranks::local_rank;

/// What a training command needs of the model's head.
#[derive(PartialEq)]
pub(crate) enum Head {
    /// It must be trained for the task already.
    Trained,
    /// It gets one for the task, unless it has one that fits.
    New,
    /// It stays as it is; the command looks at it itself.
    Either,
}

/// What every training command reads before it starts.
pub(crate) struct Start<'g> {
    command: &'static str,
    config: Config,
    pub(crate) task: &'static Task,
    pub(crate) model_dir: PathBuf,
    pub(crate) model: Model,
    tokenizer: Tokenizer,
    train: Dataset,
    dev: Dataset,
    pub(crate) out: PathBuf,
    resume: bool,
    compute: Compute,
    group: &'g Group,
    pipeline: usize,
    teacher_cache: Option<PathBuf>,
    /// Why the device is the CPU where a GPU was looked for.
    no_gpu: Option<String>,
    progress: Progress,
}

impl<'g> Start<'g> {
    /// `command` starts from a model of stage `from` with such a `head`.
    pub(crate) fn read(
        command: &'static str,
        from: Stage,
        head: Head,
        m: &ArgMatches,
        group: &'g Group,
    ) -> Result<Start<'g>> {
        let config = args::settings(command, m)?;
        let task = task(m.get_one::<String>("task").expect("required"))?;
        let out = m.get_one::<PathBuf>("out").expect("required").clone();
        let data = m.get_one::<PathBuf>("data").expect("required");
        let resume = m.get_flag("resume");
        if group.is_first() {
            outdir::check(&out, resume)?;
        }
        let local = if group.size() > 1 { local_rank()? } else { None };
        let (compute, no_gpu) = args::compute(m, config.precision, local)?;
        group.compute_on(compute.device)?;
        let model_dir = args::model_dir(m)?;
        let (mut model, tokenizer) = args::load_model(&model_dir)?;
        if model.stage != from {
            let message = format!(
                "{} is {}, and `gpusq {command}` starts from a {} model; {}",
                model_dir.display(),
                model.stage.title(),
                from.title(),
                match (from, model.stage) {
                    (Stage::Pruned, Stage::Dense) =>
                        "run `gpusq prune` on it first, or `gpusq compress` for all stages",
                    _ => "give the folder of one",
                }
            );
            return Err(Error::Mismatch(message));
        }
        match head {
            Head::Trained => args::need_trained_head(&model, &model_dir, task)?,
            Head::New => model.set_task(task, config.seed)?,
            Head::Either => {}
        }
        // `gpusq reproduce` has no such flag.
        let pipeline = m.try_get_one::<u16>("pipeline").ok().flatten().map_or(1, |&n| usize::from(n));
        sections(&model.spec, pipeline, group.size())?;
        // Neither `gpusq finetune`, which has no teacher, nor `gpusq reproduce` has such a flag.
        let teacher_cache = m.try_get_one::<PathBuf>("teacher-cache").ok().flatten().cloned();
        if teacher_cache.is_some() && !config.distill.enabled {
            let message = "--teacher-cache keeps a teacher's outputs, and distillation is off; leave out one of the two";
            return Err(Error::Config(message.into()));
        }
        teacher_cache.as_deref().map(teacher_cache::writable).transpose()?;
        args::check_length(m, &config, &model)?;
        let load = |split| args::load_data(task, data, split, &tokenizer, config.data.max_length, &model);
        let (train, dev) = (load(Split::Train)?, load(Split::Dev)?);
        let progress = Progress::of(group, m.get_flag("json"));
        Ok(Start {
            command,
            config,
            task,
            model_dir,
            model,
            tokenizer,
            train,
            dev,
            out,
            resume,
            compute,
            group,
            pipeline,
            teacher_cache,
            no_gpu,
            progress,
        })
    }

    pub(crate) fn run(&self) -> Run<'_> {
        Run {
            config: &self.config,
            task: self.task,
            train: &self.train,
            dev: &self.dev,
            tokenizer: &self.tokenizer,
            tokenizer_dir: Some(&self.model_dir),
            out: &self.out,
            resume: self.resume,
            command: args::typed(),
            compute: self.compute,
            group: self.group,
            pipeline_parallel_size: self.pipeline,
            teacher_cache: self.teacher_cache.as_deref(),
        }
    }

    /// Preflight, then the output folder; `None` if the run in it is finished, which is told then.
    fn open(&mut self, teacher: bool, stages: u64) -> Result<Option<Held>> {
        let c = &self.config;
        let fits = match self.command {
            "finetune" => vec![&c.train.fit],
            "prune" => vec![&c.prune.fit],
            "quantize" => vec![&c.quantize.fit],
            _ => vec![&c.prune.fit, &c.quantize.fit],
        };
        // What rank 0 finds stands for all.
        let check = || {
            let cached = self.run().cache_bytes(&self.model, &fits)?;
            preflight(
                &self.model,
                &self.tokenizer,
                &self.train,
                &self.dev,
                &fits,
                self.group.size(),
                self.pipeline,
                teacher,
                stages,
                self.command != "finetune",
                self.compute,
                &self.out,
                self.teacher_cache.as_deref().map(|dir| (dir, cached)),
            )
        };
        let p = self.group.is_first().then(check).transpose()?;
        let held = self.run().open(self.command, &self.model)?;
        let mut gone = None;
        let finished = self.run().finished(&self.models(), &mut |e| {
            if let compress::Event::Note(text) = e {
                gone = Some(text.to_string());
            }
        })?;
        if let Some(text) = gone {
            self.progress.show(compress::Event::Note(&text));
        }
        if let Some(record) = finished {
            let line = format!("{} holds this run, finished", self.out.display());
            self.progress.say(&line, json!({ "event": "finished", "stages": record.stages }));
            for stage in &record.stages {
                let scores = Scores(stage.scores.clone());
                self.progress.show(compress::Event::Scored { name: &stage.name, scores: &scores });
            }
            return Ok(None);
        }
        if let Some(p) = &p {
            self.progress.preflight(p);
        }
        for note in self.notes() {
            self.progress.note(&note);
        }
        Ok(Some(held))
    }

    /// The folders that the command leaves models in.
    fn models(&self) -> Vec<PathBuf> {
        match self.command {
            "compress" => compress::MODELS.map(|name| self.out.join(name)).to_vec(),
            "quantize" => vec![self.out.clone(), self.out.join("packed")],
            _ => vec![self.out.clone()],
        }
    }

    /// What the user should know of the data and the device.
    pub(crate) fn notes(&self) -> Vec<String> {
        self.train.notes.iter().chain(&self.dev.notes).chain(&self.no_gpu).cloned().collect()
    }

    /// The report of a command that ran one stage.
    fn report(&mut self, trained: &Trained, stage: &str, sizes: Option<report::Sizes>) -> Result<()> {
        self.run().report(trained, stage, sizes)?;
        self.wrote(&self.out.clone())
    }

    fn wrote(&mut self, path: &Path) -> Result<()> {
        let line = format!("wrote {} and {}", path.display(), self.out.join("report.html").display());
        self.progress
            .say(&line, json!({ "event": "done", "model": path.display().to_string(), "report": self.out.join("report.html").display().to_string() }));
        Ok(())
    }
}

pub(crate) fn finetune(m: &ArgMatches, group: &Group) -> Result<()> {
    let mut s = Start::read("finetune", Stage::Dense, Head::New, m, group)?;
    let Some(_held) = s.open(false, 1)? else { return Ok(()) };
    let mut progress = std::mem::replace(&mut s.progress, Progress::of(group, m.get_flag("json")));
    let trained = s.run().finetune(&s.model, &s.out, &mut |e| progress.show(e))?;
    if !group.is_first() {
        return Ok(());
    }
    s.report(&trained, "dense", None)
}

pub(crate) fn prune(m: &ArgMatches, group: &Group) -> Result<()> {
    let mut s = Start::read("prune", Stage::Dense, Head::Trained, m, group)?;
    let opened = s.open(s.config.distill.enabled, 1)?;
    let Some(_held) = opened else { return Ok(()) };
    let mut progress = std::mem::replace(&mut s.progress, Progress::of(group, m.get_flag("json")));
    let trained = s.run().prune(&s.model, &s.out, &mut |e| progress.show(e))?;
    if !group.is_first() {
        return Ok(());
    }
    s.report(&trained, "2:4", None)
}

pub(crate) fn quantize(m: &ArgMatches, group: &Group) -> Result<()> {
    let mut s = Start::read("quantize", Stage::Pruned, Head::Trained, m, group)?;
    let opened = s.open(s.config.distill.enabled, 1)?;
    let Some(_held) = opened else { return Ok(()) };
    let mut progress = std::mem::replace(&mut s.progress, Progress::of(group, m.get_flag("json")));
    let run = s.run();
    let mut trained = run.quantize(&s.model, &s.out, &mut |e| progress.show(e))?;
    if !group.is_first() {
        return Ok(());
    }
    let dir = s.out.join("packed");
    let (packed, scores, _, seconds) = run.pack(&trained.model, &dir, &mut |e| progress.show(e))?;
    trained.seconds = seconds;
    if scores != trained.scores {
        let message = format!("the packed model scores {scores}, the fake-quantised one {}", trained.scores);
        progress.show(compress::Event::Note(&message));
    }
    let sizes = compress::sizes(&packed, &dir.join(PACKED_FILE))?;
    s.report(&trained, "2:4 INT8", Some(sizes))
}

pub(crate) fn compress(m: &ArgMatches, group: &Group) -> Result<()> {
    let mut s = Start::read("compress", Stage::Dense, Head::Trained, m, group)?;
    let Some(_held) = s.open(s.config.distill.enabled, 4)? else { return Ok(()) };
    let mut progress = std::mem::replace(&mut s.progress, Progress::of(group, m.get_flag("json")));
    if !group.is_first() {
        return s.run().follow(&s.model, &mut |e| progress.show(e));
    }
    let record = s.run().compress(&s.model, &mut |e| progress.show(e))?;
    let (_, verdict) = record.verdict();
    s.progress.say(&verdict, json!({ "event": "verdict", "text": verdict, "stages": record.stages }));
    s.wrote(&s.out.join("packed"))
}
