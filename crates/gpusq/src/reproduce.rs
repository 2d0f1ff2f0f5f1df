//! The paper's accuracy tables and plots from real runs: each experiment is a list of variants, which differ in
//! settings alone, and each variant is compressed with several seeds.
//!
//! Every run is an ordinary one in a folder of its own, `seed1/dense` or `seed1/gemm-kd`, with its own report. A
//! finished one is recognised by that report and not repeated.

use std::path::{Path, PathBuf};

use crate::compress::{self, Run};
use crate::config::Config;
use crate::model::Model;
use crate::outdir;
use crate::preflight::{Preflight, preflight};
use crate::report::{
    self, Comparison, Measured, Outcome, RECORD_FILE, Row, RunRecord, SeedRun, Stage, Summary,
};
use crate::{Error, Result};

/// A table or plot of the paper.
pub struct Experiment {
    /// What the user types.
    pub name: &'static str,
    /// What it compares, and where in the paper.
    pub about: &'static str,
    /// Settings of all its variants, under their own.
    pub settings: &'static [(&'static str, &'static str)],
    /// What it compares, in the order of the table.
    pub variants: &'static [Variant],
}

/// One way to compress.
pub struct Variant {
    /// Its folder.
    pub name: &'static str,
    /// How the table calls it.
    pub label: &'static str,
    /// Its settings: dotted key and value.
    pub settings: &'static [(&'static str, &'static str)],
}

/// All experiments.
#[rustfmt::skip]
pub const EXPERIMENTS: &[Experiment] = &[
    Experiment {
        name: "table1",
        about: "2:4 weights alone (GEMM) and with 2:4 attention (GEMM-MHA), distilled and from labels alone \
                (paper, table 1)",
        settings: &[],
        variants: &[
            Variant { name: "gemm-kd", label: "GEMM, distilled",
                settings: &[("prune.attention", "none"), ("distill.enabled", "true")] },
            Variant { name: "gemm-labels", label: "GEMM, labels alone",
                settings: &[("prune.attention", "none"), ("distill.enabled", "false")] },
            Variant { name: "gemm-mha-kd", label: "GEMM-MHA, distilled",
                settings: &[("prune.attention", "2:4"), ("distill.enabled", "true")] },
            Variant { name: "gemm-mha-labels", label: "GEMM-MHA, labels alone",
                settings: &[("prune.attention", "2:4"), ("distill.enabled", "false")] },
        ],
    },
    Experiment {
        name: "figure4",
        about: "patterns of sparse attention over 2:4 weights, distilled, with dense attention for comparison \
                (paper, figure 4)",
        settings: &[("distill.enabled", "true")],
        variants: &[
            Variant { name: "attention-dense", label: "attention dense (GEMM)", settings: &[("prune.attention", "none")] },
            Variant { name: "attention-2of4", label: "attention 2:4", settings: &[("prune.attention", "2:4")] },
            Variant { name: "attention-2of8", label: "attention 2:8", settings: &[("prune.attention", "2:8")] },
            Variant { name: "attention-1of4", label: "attention 1:4", settings: &[("prune.attention", "1:4")] },
            Variant { name: "attention-2of16", label: "attention 2:16", settings: &[("prune.attention", "2:16")] },
            Variant { name: "attention-1of8", label: "attention 1:8", settings: &[("prune.attention", "1:8")] },
        ],
    },
    Experiment {
        name: "table5",
        about: "weights of the hard, soft and feature loss (alpha, beta, gamma), with 2:4 weights and dense attention \
                (paper, table 5; the row without labels is not in the paper)",
        settings: &[("distill.enabled", "true"), ("prune.attention", "none")],
        variants: &[
            Variant { name: "a1-b10-g1", label: "1, 10, 1 (default)",
                settings: &[("distill.alpha", "1"), ("distill.beta", "10"), ("distill.gamma", "1")] },
            Variant { name: "a1-b0-g1", label: "1, 0, 1 (no soft loss)",
                settings: &[("distill.alpha", "1"), ("distill.beta", "0"), ("distill.gamma", "1")] },
            Variant { name: "a1-b10-g0", label: "1, 10, 0 (no feature loss)",
                settings: &[("distill.alpha", "1"), ("distill.beta", "10"), ("distill.gamma", "0")] },
            Variant { name: "a0-b10-g1", label: "0, 10, 1 (no hard loss)",
                settings: &[("distill.alpha", "0"), ("distill.beta", "10"), ("distill.gamma", "1")] },
            Variant { name: "a1-b5-g1", label: "1, 5, 1",
                settings: &[("distill.alpha", "1"), ("distill.beta", "5"), ("distill.gamma", "1")] },
            Variant { name: "a1-b20-g1", label: "1, 20, 1",
                settings: &[("distill.alpha", "1"), ("distill.beta", "20"), ("distill.gamma", "1")] },
            Variant { name: "a1-b10-g0.8", label: "1, 10, 0.8",
                settings: &[("distill.alpha", "1"), ("distill.beta", "10"), ("distill.gamma", "0.8")] },
            Variant { name: "a1-b10-g1.2", label: "1, 10, 1.2",
                settings: &[("distill.alpha", "1"), ("distill.beta", "10"), ("distill.gamma", "1.2")] },
        ],
    },
];

/// Folder and name of the dense model beside the variants'.
const DENSE: &str = "dense";

/// The experiment called `name`.
///
/// # Errors
/// [`Error::Config`] that names the nearest one and lists all of them.
pub fn experiment(name: &str) -> Result<&'static Experiment> {
    EXPERIMENTS.iter().find(|e| e.name == name).ok_or_else(|| {
        let names: Vec<&str> = EXPERIMENTS.iter().map(|e| e.name).collect();
        let near = names.iter().min_by_key(|n| strsim::damerau_levenshtein(n, name));
        Error::Config(format!(
            "there is no experiment `{name}`; did you mean `{}`? Experiments: {}",
            near.unwrap_or(&""),
            names.join(", ")
        ))
    })
}

impl Experiment {
    /// Whether it sets the setting with the dotted `key` itself.
    pub fn sets(&self, key: &str) -> bool {
        let own = self.variants.iter().flat_map(|v| v.settings);
        self.settings.iter().chain(own).any(|(k, _)| *k == key)
    }

    /// The settings of a run: those of `base` with the seed and what the variant changes.
    fn config(&self, variant: &Variant, base: &Config, seed: u64) -> Result<Config> {
        let mut config = Config { seed, ..base.clone() };
        for (key, value) in self.settings.iter().chain(variant.settings) {
            config.set(key, value)?;
        }
        config.prune.check()?;
        config.distill.check()?;
        config.check_checkpointing()?;
        Ok(config)
    }
}

/// What an experiment tells whoever watches.
pub enum Event<'a> {
    /// What it will need, before anything is written.
    Preflight(&'a Preflight),
    /// A run begins.
    Run {
        /// Which, from 1.
        number: usize,
        /// Of how many.
        of: usize,
        /// Its seed.
        seed: u64,
        /// Its variant, for people.
        label: &'a str,
        /// Its folder.
        folder: &'a Path,
        /// Whether it was finished before.
        finished: bool,
    },
    /// What a run tells.
    Within(compress::Event<'a>),
}

/// Receives [`Event`]s.
pub type Watch<'w> = dyn FnMut(Event) + 'w;

/// An experiment to run.
pub struct Reproduction<'a> {
    /// Which.
    pub experiment: &'static Experiment,
    /// What all its runs share; its folder is that of the whole, its seed is not used.
    pub base: Run<'a>,
    /// The dense model to start from.
    pub model: &'a Model,
    /// Whether that is trained for the task already. Otherwise it is fine-tuned with each seed first.
    pub trained: bool,
    /// Seeds, each different.
    pub seeds: &'a [u64],
    /// Whether compressed models stay on disk once they are scored. The fine-tuned dense ones always do: what
    /// the next run starts from tells whether a finished one is the same.
    pub keep_models: bool,
}

impl Reproduction<'_> {
    /// Runs what is not finished, and writes the table anew after each run, so that it can be watched growing.
    ///
    /// # Errors
    /// What any run meets; all of it can be resumed then.
    pub fn run(&self, watch: &mut Watch) -> Result<Comparison> {
        let variants = self.experiment.variants;
        let out = self.base.out;
        // Settings that exclude each other are found before the first run, not before the last.
        for variant in variants {
            self.experiment.config(variant, self.base.config, 0)?;
        }
        let mut headed = self.model.clone();
        if !self.trained {
            headed.set_task(self.base.task, 0)?;
        }
        let left = |name: &str| {
            let unfinished = |seed: &&u64| !out.join(folder(**seed, name)).join(RECORD_FILE).exists();
            self.seeds.iter().filter(unfinished).count() as u64
        };
        let dense = if self.trained { 0 } else { left(DENSE) };
        let compressed: u64 = variants.iter().map(|v| left(v.name)).sum();
        let models = 4 * if self.keep_models { compressed } else { compressed.min(1) };
        watch(Event::Preflight(&self.preflight(&headed, dense + models)?));

        let kind = format!("reproduce {}", self.experiment.name);
        let base = &self.base;
        let identity = outdir::identity(&kind, base.task.name, self.model, base.train, base.dev);
        let _held = outdir::open(out, base.resume, &identity, &shared(base.config))?;

        let mut all = self.comparison();
        let of = all.planned;
        for &seed in self.seeds {
            let tuned;
            let dense = if self.trained {
                self.model
            } else {
                let (model, record) = self.dense(seed, (all.runs.len() + 1, of), watch)?;
                tuned = model;
                self.add(&mut all, seed, DENSE, &[], record)?;
                &tuned
            };
            for variant in variants {
                let record = self.variant(variant, seed, dense, (all.runs.len() + 1, of), watch)?;
                self.add(&mut all, seed, variant.name, variant.settings, record)?;
            }
        }
        Ok(all)
    }

    /// Checks that `model` can be compressed, and that `stages` models more fit the disk.
    fn preflight(&self, model: &Model, stages: u64) -> Result<Preflight> {
        let (base, c) = (&self.base, self.base.config);
        let fits = [&c.train.fit, &c.prune.fit, &c.quantize.fit];
        preflight(
            model,
            base.tokenizer,
            base.train,
            base.dev,
            &fits,
            1,
            1,
            true,
            stages,
            true,
            base.compute,
            base.out,
            None,
        )
    }

    /// Opens a run and says so; its record if it is finished and still has the `models` that are read from it.
    fn begin(
        &self,
        run: &Run,
        kind: &str,
        from: &Model,
        label: &str,
        models: &[PathBuf],
        (number, of): (usize, usize),
        watch: &mut Watch,
    ) -> Result<(outdir::Held, Option<RunRecord>)> {
        let held = run.open(kind, from)?;
        let record = run.finished(models, &mut |e| watch(Event::Within(e)))?;
        let (seed, finished) = (run.config.seed, record.is_some());
        watch(Event::Run { number, of, seed, label, folder: run.out, finished });
        Ok((held, record))
    }

    /// The dense model fine-tuned with `seed`.
    fn dense(&self, seed: u64, number: (usize, usize), watch: &mut Watch) -> Result<(Model, RunRecord)> {
        let config = Config { seed, ..self.base.config.clone() };
        let out = self.base.out.join(folder(seed, DENSE));
        let run = Run { config: &config, out: &out, ..self.base.clone() };
        let mut model = self.model.clone();
        model.set_task(run.task, seed)?;
        let (_held, record) =
            self.begin(&run, "finetune", &model, DENSE, std::slice::from_ref(&out), number, watch)?;
        if let Some(record) = record {
            return Ok((Model::load(&out)?, record));
        }
        let trained = run.finetune(&model, &out, &mut |e| watch(Event::Within(e)))?;
        let record = run.report(&trained, DENSE, None)?;
        Ok((trained.model, record))
    }

    /// The record of `dense` compressed as `variant`.
    fn variant(
        &self,
        variant: &Variant,
        seed: u64,
        dense: &Model,
        number: (usize, usize),
        watch: &mut Watch,
    ) -> Result<RunRecord> {
        let config = self.experiment.config(variant, self.base.config, seed)?;
        let out = self.base.out.join(folder(seed, variant.name));
        let run = Run { config: &config, out: &out, ..self.base.clone() };
        let (_held, record) = self.begin(&run, "compress", dense, variant.label, &[], number, watch)?;
        let record = match record {
            Some(record) => record,
            None => {
                // What fine-tuning made of the weights is not known before, nor what others wrote to the disk.
                self.preflight(dense, 4)?;
                run.compress(dense, &mut |e| watch(Event::Within(e)))?
            }
        };
        if !self.keep_models {
            run.discard_models()?;
        }
        Ok(record)
    }

    /// Adds a finished run to the table, and writes that.
    fn add(
        &self,
        all: &mut Comparison,
        seed: u64,
        variant: &str,
        own: &[(&str, &str)],
        record: RunRecord,
    ) -> Result<()> {
        let shared = if variant == DENSE { &[][..] } else { self.experiment.settings };
        let settings = shared.iter().chain(own).map(|(k, v)| (k.to_string(), v.to_string()));
        if all.started.is_empty() || record.started < all.started {
            all.started = record.started;
        }
        all.lower_is_better = record.lower_is_better;
        all.runs.push(SeedRun {
            seed,
            variant: variant.into(),
            settings: settings.collect(),
            folder: folder(seed, variant),
            wall_seconds: record.wall_seconds,
            stages: record.stages,
        });
        all.rows = rows(self.experiment.variants, all);
        report::write_comparison(all, self.base.out)
    }

    /// The table before its first run.
    fn comparison(&self) -> Comparison {
        let (base, metrics) = (&self.base, self.base.task.metrics);
        let stack = self.model.spec.last_stack();
        let family = self.model.config.json["model_type"].as_str().unwrap_or("model");
        let dense = match self.trained {
            true => "The dense model was taken as it is: it is the same with each seed, and has no spread.",
            false => "The dense model was fine-tuned with each seed.",
        };
        let of_data = base.train.notes.iter().chain(&base.dev.notes).cloned();
        Comparison {
            experiment: self.experiment.name.into(),
            about: sentence(self.experiment.about),
            model: format!("{family} {} x {}", stack.layers, stack.hidden),
            task: base.task.name.into(),
            main_metric: metrics.first().copied().unwrap_or_default().into(),
            seeds: self.seeds.to_vec(),
            spread: "sample standard deviation (n − 1)".into(),
            planned: self.seeds.len() * (self.experiment.variants.len() + usize::from(!self.trained)),
            machine: report::Machine::current(rayon::current_num_threads(), &base.compute.to_string()),
            version: env!("CARGO_PKG_VERSION").into(),
            command: base.command.clone(),
            config: shared(base.config),
            notes: std::iter::once(dense.to_string()).chain(of_data).collect(),
            ..Comparison::default()
        }
    }
}

/// The settings that all runs share, as a file: all but the seed, which stands alone before the first table.
fn shared(config: &Config) -> String {
    let text = config.to_toml();
    text.find("\n[").map_or(String::new(), |at| text[at + 1..].to_string())
}

/// Where a run lies in its experiment's folder.
fn folder(seed: u64, variant: &str) -> String {
    format!("seed{seed}/{variant}")
}

/// `text` with a capital and a full stop.
fn sentence(text: &str) -> String {
    let (first, rest) = text.split_at(text.chars().next().map_or(0, char::len_utf8));
    format!("{}{rest}.", first.to_uppercase())
}

/// Mean and spread of `values`.
fn summary(values: Vec<f64>) -> Summary {
    let n = values.len() as f64;
    // A mean of nothing is NaN, as is a deviation of less than two.
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
    let spread = if n < 2.0 { f64::NAN } else { (squares / (n - 1.0)).sqrt() };
    let low = values.iter().copied().fold(f64::NAN, f64::min);
    let high = values.iter().copied().fold(f64::NAN, f64::max);
    Summary { values, mean, spread, low, high }
}

/// The table of the runs there are: the dense model, then each variant's models.
fn rows(variants: &[Variant], all: &Comparison) -> Vec<Row> {
    let compressed = || all.runs.iter().filter(|r| r.variant != DENSE && !r.stages.is_empty());
    let mut dense: Vec<(u64, &Stage)> = Vec::new();
    for run in compressed() {
        if dense.iter().all(|(seed, _)| *seed != run.seed) {
            dense.push((run.seed, &run.stages[0]));
        }
    }
    let Some((_, first)) = dense.first() else { return Vec::new() };
    let mut metrics: Vec<&str> = first.scores.iter().map(|(name, _)| name.as_str()).collect();
    metrics.sort_by_key(|name| *name != all.main_metric);
    let score = |stage: &Stage, metric: &str| {
        stage.scores.iter().find(|(name, _)| name == metric).map_or(f64::NAN, |(_, x)| *x)
    };

    let measured = |name: &&str| Measured {
        name: name.to_string(),
        score: summary(dense.iter().map(|(_, s)| score(s, name)).collect()),
        difference: None,
    };
    let mut rows = vec![Row {
        variant: DENSE.into(),
        label: DENSE.into(),
        seeds: dense.iter().map(|(seed, _)| *seed).collect(),
        metrics: metrics.iter().map(measured).collect(),
        one_class: dense.iter().filter(|(_, s)| s.one_class).count(),
        ..Row::default()
    }];
    for variant in variants {
        let of: Vec<&SeedRun> = compressed().filter(|r| r.variant == variant.name).collect();
        let stages = of.iter().map(|r| r.stages.len()).min().unwrap_or(0);
        for i in 1..stages {
            let measured = |name: &&str| {
                let scores: Vec<f64> = of.iter().map(|r| score(&r.stages[i], name)).collect();
                // Each against the dense model of its own seed.
                let own = of.iter().zip(&scores).map(|(r, x)| x - score(&r.stages[0], name)).collect();
                Measured { name: name.to_string(), score: summary(scores), difference: Some(summary(own)) }
            };
            let mut row = Row {
                variant: variant.name.into(),
                label: variant.label.into(),
                stage: of[0].stages[i].name.clone(),
                seeds: of.iter().map(|r| r.seed).collect(),
                metrics: metrics.iter().map(measured).collect(),
                one_class: of.iter().filter(|r| r.stages[i].one_class).count(),
                ..Row::default()
            };
            let dense_of_one = of.iter().filter(|r| r.stages[0].one_class).count();
            (row.outcome, row.verdict) = judge(&row, dense_of_one, all.lower_is_better);
            rows.push(row);
        }
    }
    rows
}

/// Whether the mean of a compressed model's main score is below the dense one's by more than the spread, with a
/// sentence about it. With `dense_of_one` seeds the dense model puts all examples into one class.
fn judge(row: &Row, dense_of_one: usize, lower_is_better: bool) -> (Outcome, String) {
    let Some(difference) = row.metrics.first().and_then(|m| m.difference.as_ref()) else {
        return (Outcome::Unknown, "no score.".into());
    };
    let loss = if lower_is_better { difference.mean } else { -difference.mean };
    let (size, spread) = (format!("{:.2}", loss.abs()), difference.spread);
    // The score of such a model says nothing, on whichever side it is.
    for (who, n) in [("", row.one_class), ("the dense model ", dense_of_one)] {
        if n > 0 {
            let text =
                format!("{who}predicts one class for every example with {n} of {} seeds.", row.seeds.len());
            return (Outcome::Unknown, text);
        }
    }
    if !loss.is_finite() {
        return (Outcome::Unknown, "has no usable score.".into());
    }
    let side = if loss > 0.0 { "worse" } else { "better" };
    if !spread.is_finite() {
        let text = format!("{size} {side} than dense; one seed does not tell the spread.");
        return (Outcome::Unknown, text);
    }
    let said = format!("{size} ± {spread:.2} {side} than dense");
    if loss > spread {
        return (Outcome::Lost, format!("{said}, more than the spread over seeds."));
    }
    let text = match size.as_str() {
        "0.00" => format!("as good as dense (± {spread:.2})."),
        _ if loss > 0.0 => format!("{said}, within the spread over seeds."),
        _ => format!("{said}."),
    };
    (Outcome::Held, text)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn experiments_change_what_they_say() {
        for e in EXPERIMENTS {
            let base = Config::default();
            let configs: Vec<Config> = e.variants.iter().map(|v| e.config(v, &base, 7).unwrap()).collect();
            let names: BTreeSet<&str> = e.variants.iter().map(|v| v.name).collect();
            let labels: BTreeSet<&str> = e.variants.iter().map(|v| v.label).collect();
            assert_eq!(
                (names.len(), labels.len()),
                (configs.len(), configs.len()),
                "{} has one twice",
                e.name
            );
            assert!(!names.contains(DENSE), "{}", e.name);
            for (i, c) in configs.iter().enumerate() {
                assert_eq!(c.seed, 7);
                assert!(
                    configs[..i].iter().all(|other| other != c),
                    "{}: {} is there twice",
                    e.name,
                    names.len()
                );
                // A folder on every system.
                let plain = |c: char| c.is_ascii_alphanumeric() || "-.".contains(c);
                assert!(e.variants[i].name.chars().all(plain), "{}", e.variants[i].name);
            }
            // What a base sets otherwise does not reach the runs.
            let changed: Vec<(String, String)> = [
                ("prune.attention", "4:8"),
                ("distill.enabled", "false"),
                ("distill.alpha", "3"),
                ("distill.beta", "3"),
                ("distill.gamma", "3"),
            ]
            .into_iter()
            .filter(|(key, _)| e.sets(key))
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
            assert!(!changed.is_empty(), "{} changes nothing", e.name);
            let base = Config::load(None, None, &changed).unwrap();
            let again: Vec<Config> = e.variants.iter().map(|v| e.config(v, &base, 7).unwrap()).collect();
            assert!(again == configs, "{}: a variant leaves open what another sets", e.name);
        }
    }

    /// The paper's table 5, rows 2 to 8, and figure 4's patterns.
    #[test]
    fn experiments_hold_the_papers_choices() {
        let base = Config::default();
        let of = |name: &str| {
            let e = experiment(name).unwrap();
            e.variants.iter().map(|v| e.config(v, &base, 1).unwrap()).collect::<Vec<_>>()
        };
        let factors: Vec<[f64; 3]> =
            of("table5").iter().map(|c| [c.distill.alpha, c.distill.beta, c.distill.gamma]).collect();
        for row in [
            [1.0, 10.0, 1.0],
            [1.0, 0.0, 1.0],
            [1.0, 10.0, 0.0],
            [1.0, 5.0, 1.0],
            [1.0, 20.0, 1.0],
            [1.0, 10.0, 0.8],
            [1.0, 10.0, 1.2],
        ] {
            assert!(factors.contains(&row), "{row:?}");
        }
        assert!((0..3).all(|i| factors.iter().any(|f| f[i] == 0.0)), "each factor is switched off once");
        let d = Config::default().distill;
        assert_eq!(factors[0], [d.alpha, d.beta, d.gamma]);
        for (variant, f) in experiment("table5").unwrap().variants.iter().zip(&factors) {
            let said = format!("{}, {}, {}", f[0], f[1], f[2]);
            assert!(
                variant.label == said || variant.label.starts_with(&format!("{said} (")),
                "{}",
                variant.label
            );
        }
        let patterns = |name| -> Vec<String> {
            let text = |c: &Config| c.prune.attention.map_or("dense".into(), |p| p.to_string());
            of(name).iter().map(text).collect()
        };
        assert_eq!(patterns("figure4"), ["dense", "2:4", "2:8", "1:4", "2:16", "1:8"]);
        assert!(of("figure4").iter().chain(&of("table5")).all(|c| c.distill.enabled));
        assert_eq!(patterns("table1"), ["dense", "dense", "2:4", "2:4"]);
        assert_eq!(
            of("table1").iter().map(|c| c.distill.enabled).collect::<Vec<_>>(),
            [true, false, true, false]
        );
    }

    #[test]
    fn an_unknown_experiment_names_the_nearest() {
        let error = experiment("tabel1").err().unwrap().to_string();
        assert_eq!(
            error,
            "there is no experiment `tabel1`; did you mean `table1`? Experiments: table1, figure4, table5"
        );
    }

    #[test]
    fn a_summary_has_mean_and_sample_deviation() {
        // Deviations -2, 0, 2: squares sum to 8, over n - 1 = 2 gives 4.
        let s = summary(vec![88.0, 90.0, 92.0]);
        assert_eq!((s.mean, s.spread, s.low, s.high), (90.0, 2.0, 88.0, 92.0));
        let one = summary(vec![5.0]);
        assert!(one.mean == 5.0 && one.spread.is_nan() && one.low == 5.0);
        assert!(summary(vec![]).mean.is_nan() && summary(vec![1.0, f64::NAN]).mean.is_nan());
    }

    #[test]
    fn the_seed_is_no_shared_setting() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("shared.toml");
        let config = Config { seed: 7, ..Config::load(None, Some("quick"), &[]).unwrap() };
        std::fs::write(&file, shared(&config)).unwrap();
        let read = Config::load(Some(&file), None, &[]).unwrap();
        assert_eq!(read, Config { seed: Config::default().seed, ..config });
    }

    const VARIANTS: [Variant; 2] =
        [Variant { name: "a", label: "A", settings: &[] }, Variant { name: "b", label: "B", settings: &[] }];

    /// A run that scored so: dense, then compressed.
    fn run(variant: &str, seed: u64, scores: [f64; 2]) -> SeedRun {
        let stage = |(i, x): (usize, &f64)| Stage {
            name: ["dense", "INT8"][i].into(),
            scores: vec![("f1".into(), x / 2.0), ("accuracy".into(), *x)],
            ..Stage::default()
        };
        let stages = scores.iter().enumerate().map(stage).collect();
        SeedRun { seed, variant: variant.into(), stages, ..SeedRun::default() }
    }

    fn compared(runs: Vec<SeedRun>) -> Vec<Row> {
        let all = Comparison { main_metric: "accuracy".into(), runs, ..Comparison::default() };
        rows(&VARIANTS, &all)
    }

    #[test]
    fn differences_are_paired_by_seed() {
        let found = compared(vec![
            run("dense", 1, [80.0, 0.0]),
            run("a", 1, [80.0, 79.0]),
            run("b", 1, [80.0, 84.0]),
            run("a", 2, [90.0, 88.0]),
            run("b", 2, [90.0, 90.0]),
            run("a", 3, [100.0, 97.0]),
        ]);
        let of = |i: usize, metric: usize| {
            let m = &found[i].metrics[metric];
            let d = m.difference.as_ref().map(|d| (d.values.clone(), d.mean, d.spread));
            (m.name.as_str(), m.score.mean, m.score.spread, d)
        };
        assert_eq!(found.iter().map(|r| r.variant.as_str()).collect::<Vec<_>>(), ["dense", "a", "b"]);
        // The main metric comes first, though the runs name it second.
        assert_eq!(of(0, 0), ("accuracy", 90.0, 10.0, None));
        assert_eq!(of(0, 1).1, 45.0);
        // 79, 88 and 97 spread by 9; the differences -1, -2 and -3 by 1.
        assert_eq!(of(1, 0), ("accuracy", 88.0, 9.0, Some((vec![-1.0, -2.0, -3.0], -2.0, 1.0))));
        assert_eq!((found[1].outcome, found[1].seeds.as_slice()), (Outcome::Lost, &[1, 2, 3][..]));
        assert_eq!(found[1].verdict, "2.00 ± 1.00 worse than dense, more than the spread over seeds.");
        // Its third seed is still to run, and dense counts for the two that are there alone.
        let b = of(2, 0).3.unwrap();
        assert_eq!((b.0, b.1), (vec![4.0, 0.0], 2.0));
        assert_eq!((found[2].outcome, found[2].seeds.as_slice()), (Outcome::Held, &[1, 2][..]));
        assert_eq!(found[2].verdict, "2.00 ± 2.83 better than dense.");
    }

    #[test]
    fn what_is_within_the_spread_is_not_lost_and_what_is_unknown_is_not_judged() {
        let judged = |runs| {
            let row = compared(runs).pop().unwrap();
            (row.outcome, row.verdict)
        };
        let (outcome, text) = judged(vec![run("a", 1, [90.0, 91.0]), run("a", 2, [90.0, 88.0])]);
        assert_eq!(
            (outcome, text.as_str()),
            (Outcome::Held, "0.50 ± 2.12 worse than dense, within the spread over seeds.")
        );
        let (outcome, text) = judged(vec![run("a", 1, [90.0, 90.0]), run("a", 2, [91.0, 91.0])]);
        assert_eq!((outcome, text.as_str()), (Outcome::Held, "as good as dense (± 0.00)."));
        let (outcome, text) = judged(vec![run("a", 1, [90.0, 70.0])]);
        assert_eq!(
            (outcome, text.as_str()),
            (Outcome::Unknown, "20.00 worse than dense; one seed does not tell the spread.")
        );
        let (outcome, text) = judged(vec![run("a", 1, [90.0, f64::NAN]), run("a", 2, [90.0, 90.0])]);
        assert_eq!((outcome, text.as_str()), (Outcome::Unknown, "has no usable score."));
        let mut same = run("a", 1, [90.0, 90.0]);
        same.stages[1].one_class = true;
        let (outcome, text) = judged(vec![same, run("a", 2, [90.0, 90.0])]);
        assert_eq!(
            (outcome, text.as_str()),
            (Outcome::Unknown, "predicts one class for every example with 1 of 2 seeds.")
        );
        let mut constant = run("a", 2, [90.0, 90.0]);
        constant.stages[0].one_class = true;
        let (outcome, text) = judged(vec![run("a", 1, [90.0, 91.0]), constant]);
        assert_eq!(outcome, Outcome::Unknown);
        assert_eq!(text, "the dense model predicts one class for every example with 1 of 2 seeds.");
        // A record that someone emptied is no reason to panic.
        assert!(compared(vec![SeedRun { variant: "a".into(), ..SeedRun::default() }]).is_empty());
    }
}
