//! `gpusq finetune | prune | quantize | compress`: the training commands.

use std::path::{Path, PathBuf};

use clap::ArgMatches;
use gpusq::compress::{self, Run, Trained};
use gpusq::config::Config;
use gpusq::model::{Model, Stage};
use gpusq::preflight::preflight;
use gpusq::task::{Dataset, Split, Task, Tokenizer, task};
use gpusq::{Error, Result, report};
use serde_json::json;

use crate::args;
use crate::progress::Progress;

/// What every training command reads before it starts.
struct Start {
    config: Config,
    task: &'static Task,
    model_dir: PathBuf,
    model: Model,
    tokenizer: Tokenizer,
    train: Dataset,
    dev: Dataset,
    out: PathBuf,
    resume: bool,
    progress: Progress,
}

impl Start {
    fn read(m: &ArgMatches) -> Result<Start> {
        let config = args::settings(m)?;
        let task = task(m.get_one::<String>("task").expect("required"))?;
        let out = m.get_one::<PathBuf>("out").expect("required").clone();
        let data = m.get_one::<PathBuf>("data").expect("required");
        let resume = m.get_flag("resume");
        let model_dir = args::model_dir(m)?;
        let (mut model, tokenizer) = args::load_model(&model_dir)?;
        if model.stage == Stage::Dense {
            model.set_head(task.head, config.seed)?;
        }
        let load = |split| args::load_data(task, data, split, &tokenizer, config.data.max_length, &model);
        let (train, dev) = (load(Split::Train)?, load(Split::Dev)?);
        let progress = Progress::new(m.get_flag("json"));
        Ok(Start { config, task, model_dir, model, tokenizer, train, dev, out, resume, progress })
    }

    fn run(&self) -> Run<'_> {
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
        }
    }

    /// Preflight, then the output folder.
    fn open(&mut self, batch: usize, teacher: bool, stages: u64) -> Result<()> {
        let p = preflight(
            &self.model,
            &self.tokenizer,
            &self.train,
            &self.dev,
            batch,
            teacher,
            stages,
            &self.out,
        )?;
        self.progress.preflight(&p);
        for note in self.train.notes.iter().chain(&self.dev.notes) {
            self.progress.say(&format!("note: {note}"), json!({ "event": "note", "text": note }));
        }
        self.run().open()
    }

    /// Refuses a model whose head was never trained on this task.
    fn need_trained_head(&self) -> Result<()> {
        if self.model.fresh.is_empty() {
            return Ok(());
        }
        Err(Error::Mismatch(format!(
            "{} has no trained head for {}; run `gpusq finetune` on it first and compress its output",
            self.model_dir.display(),
            self.task.name
        )))
    }

    /// The report of a command that ran one stage.
    fn report(&mut self, trained: &Trained, stage: &str) -> Result<()> {
        let run = self.run();
        let mut record = run.record(&trained.model);
        record.stages.push(report::Stage {
            name: stage.into(),
            scores: trained.scores.0.clone(),
            wall_seconds: trained.seconds,
            examples: self.dev.examples.len(),
        });
        record.curves.push(compress::curve(stage, &trained.curve));
        record.layers = compress::layers(&trained.model);
        record.wall_seconds = trained.seconds;
        report::write(&record, &self.out)?;
        self.wrote(&self.out.clone())
    }

    fn wrote(&mut self, path: &Path) -> Result<()> {
        let line = format!("wrote {} and {}", path.display(), self.out.join("report.html").display());
        self.progress
            .say(&line, json!({ "event": "done", "model": path, "report": self.out.join("report.html") }));
        Ok(())
    }
}

pub(crate) fn finetune(m: &ArgMatches) -> Result<()> {
    let mut s = Start::read(m)?;
    if s.model.stage != Stage::Dense {
        let message = format!(
            "{} is {}; fine-tuning starts from a dense model",
            s.model_dir.display(),
            s.model.stage.title()
        );
        return Err(Error::Mismatch(message));
    }
    s.open(s.config.train.fit.batch_size, false, 1)?;
    let mut progress = std::mem::replace(&mut s.progress, Progress::new(m.get_flag("json")));
    let trained = s.run().finetune(&s.model, &s.out, &mut |e| progress.show(e))?;
    s.report(&trained, "dense")
}

pub(crate) fn prune(m: &ArgMatches) -> Result<()> {
    let mut s = Start::read(m)?;
    s.need_trained_head()?;
    s.open(s.config.prune.fit.batch_size, s.config.distill.enabled, 1)?;
    let mut progress = std::mem::replace(&mut s.progress, Progress::new(m.get_flag("json")));
    let trained = s.run().prune(&s.model, &s.out, &mut |e| progress.show(e))?;
    s.report(&trained, "2:4")
}

pub(crate) fn quantize(m: &ArgMatches) -> Result<()> {
    let mut s = Start::read(m)?;
    s.open(s.config.quantize.fit.batch_size, s.config.distill.enabled, 1)?;
    let mut progress = std::mem::replace(&mut s.progress, Progress::new(m.get_flag("json")));
    let run = s.run();
    let trained = run.quantize(&s.model, &s.out, &mut |e| progress.show(e))?;
    run.pack(&trained.model, &s.out.join("packed"), &mut |e| progress.show(e))?;
    s.report(&trained, "2:4 INT8")
}

pub(crate) fn compress(m: &ArgMatches) -> Result<()> {
    let mut s = Start::read(m)?;
    s.need_trained_head()?;
    let batch = s.config.prune.fit.batch_size.max(s.config.quantize.fit.batch_size);
    s.open(batch, s.config.distill.enabled, 4)?;
    let mut progress = std::mem::replace(&mut s.progress, Progress::new(m.get_flag("json")));
    let record = s.run().compress(&s.model, &mut |e| progress.show(e))?;
    let (_, verdict) = record.verdict();
    s.progress.say(&verdict, json!({ "event": "verdict", "text": verdict, "stages": record.stages }));
    s.wrote(&s.out.join("packed"))
}
