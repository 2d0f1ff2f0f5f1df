//! What a run did, and the page that shows it.
//!
//! A run fills a [`RunRecord`]; [`write()`] saves it as `run.json` with `report.html` beside it: one file
//! with its styles and plots inside, no script, nothing fetched. [`read`] takes a `run.json` back, so that
//! a page can be made again without the run.

mod bench;
mod comparison;
mod html;
mod plot;

use std::io::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use bench::{
    BENCH_FILE, Bench, BenchCell, BenchLoad, BenchSeries, BenchTexts, TextBatch, Unit, write_bench,
};
pub use comparison::{
    COMPARISON_FILE, Comparison, Measured, Row, SeedRun, Summary, TABLE_FILE, write_comparison,
};

use crate::{Error, Result};

/// Everything the report shows. Parts a run did not reach stay empty and are left out of the page.
///
/// In `run.json` a number that is not finite is `null`, and `null` is read back as NaN. Missing fields
/// read as empty and unknown ones are skipped, so that records of other versions stay readable.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunRecord {
    /// What was compressed: the model's name, shown as the page's title.
    pub title: String,
    /// The task's name ("sst2").
    pub task: String,
    /// Which of the scores decides; it must be named so in each [`Stage::scores`].
    pub main_metric: String,
    /// Whether a smaller main score is better (perplexity). Differences are then counted in percent of the
    /// dense score, else in points.
    pub lower_is_better: bool,
    /// What was made sparse: "GEMM" or "GEMM-MHA, attention 2:4"; or that nothing was; and whether the run went
    /// without distillation.
    pub variant: String,
    /// When the run began, RFC 3339.
    pub started: String,
    /// Duration of the whole run, seconds: of all processes that worked on it, each up to its end or, where it
    /// was killed, its last checkpoint.
    #[serde(with = "number")]
    pub wall_seconds: f64,
    /// Where it ran.
    pub machine: Machine,
    /// Version of the program.
    pub version: String,
    /// The command line that repeats the run.
    pub command: String,
    /// Scored models in the order they were made. The first is the dense one all others are compared to,
    /// the last is what the run delivers.
    pub stages: Vec<Stage>,
    /// Training curves, one for each loop; loops run for an ablation may be added under their own names.
    pub curves: Vec<Curve>,
    /// Every GEMM weight of the model, if it was compressed.
    pub layers: Vec<LayerRow>,
    /// Sizes of the packed model, if the run packed one.
    pub sizes: Option<Sizes>,
    /// Scores of runs that differ in one choice, such as no distillation.
    pub ablation: Vec<Ablation>,
    /// The resolved configuration, TOML text.
    pub config: String,
    /// Remarks for the reader, plain text.
    pub notes: Vec<String>,
}

/// This moment, as records say when they began: UTC, to the second.
pub fn now() -> String {
    humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()
}

/// The computer a run used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// Model name of the CPU.
    pub cpu: String,
    /// Threads the run used.
    pub threads: usize,
    /// Operating system.
    pub os: String,
    /// What the models were trained on: `CPU`, or a GPU with its name.
    pub device: String,
}

impl Machine {
    /// This computer, with `threads` as the number used and `device` as what models were trained on. What the system does not tell is replaced by the
    /// names of the processor family and system the program was built for.
    pub fn current(threads: usize, device: &str) -> Self {
        let field = |path: &str, key: &str| {
            let text = std::fs::read_to_string(path).ok()?;
            let value = text.lines().find_map(|line| line.strip_prefix(key))?;
            Some(value.trim_matches([' ', '\t', ':', '=', '"']).to_string())
        };
        let cpu = field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.into());
        let os = field("/etc/os-release", "PRETTY_NAME").unwrap_or_else(|| std::env::consts::OS.into());
        Machine { cpu, threads, os, device: device.into() }
    }
}

/// One scored model of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stage {
    /// "dense", "2:4 FP16", "2:4 INT8 (fake-quantised)", "2:4 INT8 (packed engine)".
    pub name: String,
    /// Metric name and score. Accuracies, F1 and correlations are in points (percent: 0 to 100).
    #[serde(with = "scores")]
    pub scores: Vec<(String, f64)>,
    /// Time spent making and scoring it, seconds.
    #[serde(with = "number")]
    pub wall_seconds: f64,
    /// Number of examples it was scored on; of SQuAD its questions.
    pub examples: usize,
    /// Whether it put all of them into one class, which makes its score that of no model at all.
    pub one_class: bool,
}

/// The losses of one training loop.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Curve {
    /// What was trained, usually a [`Stage::name`].
    pub stage: String,
    /// Its steps, in any order.
    pub points: Vec<Point>,
}

/// One optimiser step. Terms that the loop did not use are 0 or NaN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Point {
    /// Optimiser steps since the loop began.
    pub step: u64,
    /// The loss that was minimised: the terms times their weights.
    #[serde(with = "number")]
    pub loss: f64,
    /// Cross-entropy, before its weight alpha.
    #[serde(with = "number")]
    pub hard: f64,
    /// Divergence from the teacher's predictions, before its weight beta.
    #[serde(with = "number")]
    pub soft: f64,
    /// Distance from the teacher's activations, before its weight gamma.
    #[serde(with = "number")]
    pub feature: f64,
    /// Learning rate of the step.
    #[serde(with = "number")]
    pub lr: f64,
}

/// One GEMM weight `[rows, cols]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LayerRow {
    /// The weight's name.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Fraction of the elements that is kept, 0 to 1.
    #[serde(with = "number")]
    pub kept: f64,
    /// Relative root-mean-square error of quantising the kept elements, `|q - w| / |w|`; NaN if not quantised.
    #[serde(with = "number")]
    pub weight_error: f64,
    /// Step size of the input activations; NaN if not quantised.
    #[serde(with = "number")]
    pub activation_scale: f64,
    /// Why the weight was left dense; `None` if it was compressed.
    pub left_dense: Option<String>,
}

/// Sizes of the packed model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sizes {
    /// The compressed weights before compression, as FP16, bits.
    pub dense_fp16_bits: u64,
    /// The same weights packed: values and 2:4 indices, bits.
    pub packed_bits: u64,
    /// Their quantisation scales, bits.
    pub scale_bits: u64,
    /// What stays dense (embeddings, norms, biases, weights left out), as FP16, bits.
    pub rest_bits: u64,
    /// The packed file on disk, bytes.
    pub file_bytes: u64,
}

impl Sizes {
    /// Packed over dense bits of the compressed weights: 0.5625 for 2:4 FP16, 0.3125 for 2:4 INT8. NaN if
    /// nothing was compressed.
    pub fn ratio(&self) -> f64 {
        match self.dense_fp16_bits {
            0 => f64::NAN,
            dense => self.packed_bits as f64 / dense as f64,
        }
    }

    /// The same for the whole model: scales counted in, the dense rest counted on both sides.
    pub fn model_ratio(&self) -> f64 {
        match self.dense_fp16_bits as f64 + self.rest_bits as f64 {
            0.0 => f64::NAN,
            dense => (self.packed_bits as f64 + self.scale_bits as f64 + self.rest_bits as f64) / dense,
        }
    }
}

/// The scores of a run that differs in one choice.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ablation {
    /// The difference ("2:4 INT8 without distillation").
    pub label: String,
    /// As in [`Stage::scores`].
    #[serde(with = "scores")]
    pub scores: Vec<(String, f64)>,
}

/// Whether compression kept the dense model's main score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// There are no two scores to compare.
    #[default]
    Unknown,
    /// One run: within one point (one percent where lower is better) of dense, or better. Runs with several
    /// seeds: not below dense by more than their spread.
    Held,
    /// Worse than that.
    Lost,
}

impl Outcome {
    /// The style sheet's class for it.
    fn class(self) -> &'static str {
        match self {
            Outcome::Held => "good",
            Outcome::Lost => "bad",
            Outcome::Unknown => "",
        }
    }
}

impl RunRecord {
    /// The main score among `scores`; NaN if it is not there.
    fn main_score(&self, scores: &[(String, f64)]) -> f64 {
        scores.iter().find(|(name, _)| *name == self.main_metric).map_or(f64::NAN, |(_, score)| *score)
    }

    /// How much worse a main score is than the dense one, in points (percent where lower is better).
    fn loss_to_dense(&self, score: f64) -> f64 {
        let dense = self.stages.first().map_or(f64::NAN, |dense| self.main_score(&dense.scores));
        if self.lower_is_better { 100.0 * (score - dense) / dense } else { dense - score }
    }

    fn outcome(&self, score: f64) -> Outcome {
        let loss = self.loss_to_dense(score);
        // The slack keeps 91.2 against 90.2, which differ by a little over 1 in binary, "within 1 point".
        match loss.is_finite() {
            false => Outcome::Unknown,
            true if loss <= 1.0 + 1e-9 => Outcome::Held,
            true => Outcome::Lost,
        }
    }

    /// Compares the last stage's main score with the first's: the outcome, and one or two plain sentences.
    pub fn verdict(&self) -> (Outcome, String) {
        let unknown = |why: String| (Outcome::Unknown, why);
        let (first, last) = match self.stages.as_slice() {
            [] => return unknown("No model was scored in this run.".into()),
            [only] => {
                let one_class = if only.one_class { " It predicts one class for every example." } else { "" };
                let name = &only.name;
                return unknown(format!("Only {name} was scored: there is nothing to compare.{one_class}"));
            }
            [first, .., last] => (first, last),
        };
        let one_class = match (first.one_class, last.one_class) {
            (true, true) => {
                format!("{} and {} each predict one class for every example", first.name, last.name)
            }
            (true, false) => format!("{} predicts one class for every example", first.name),
            (false, true) => format!("{} predicts one class for every example", last.name),
            (false, false) => String::new(),
        };
        let (dense, score) = (self.main_score(&first.scores), self.main_score(&last.scores));
        let loss = self.loss_to_dense(score);
        let outcome = self.outcome(score);
        if outcome == Outcome::Unknown {
            let at = if dense.is_finite() { &last.name } else { &first.name };
            return unknown(format!(
                "No comparison with {}: {at} has no usable {}.",
                first.name, self.main_metric
            ));
        }
        if outcome == Outcome::Held && !one_class.is_empty() {
            let scores = format!("{} against {} {}", fixed(score, 2), fixed(dense, 2), self.main_metric);
            return unknown(format!("{one_class}: the scores compare nothing ({scores})."));
        }
        let unit = if self.lower_is_better { "%" } else { "points" };
        let one = if self.lower_is_better { "%" } else { "point" };
        let scores = format!("{} against {} {}", fixed(score, 2), fixed(dense, 2), self.main_metric);
        let text = if outcome == Outcome::Lost {
            // Which step cost most tells the reader where to look.
            let mut before = 0.0;
            let mut worst = (0.0, "");
            for stage in &self.stages[1..] {
                let now = self.loss_to_dense(self.main_score(&stage.scores));
                if now - before > worst.0 {
                    worst = (now - before, &stage.name);
                }
                if now.is_finite() {
                    before = now;
                }
            }
            let share = format!("The largest step down was {}: {} {unit}.", worst.1, fixed(worst.0, 2));
            let one_class = if one_class.is_empty() { one_class } else { format!(" {one_class}.") };
            let lost = fixed(loss, 2);
            format!("{} lost {lost} {unit} to {} ({scores}). {share}{one_class}", last.name, first.name)
        } else if fixed(loss, 2) == "0.00" {
            format!("{} matches {} ({scores}).", last.name, first.name)
        } else if loss < 0.0 {
            format!("{} is {} {unit} better than {} ({scores}).", last.name, fixed(-loss, 2), first.name)
        } else {
            format!("{} is within 1 {one} of {} ({scores}).", last.name, first.name)
        };
        (outcome, text)
    }
}

/// `x` with `digits` decimals: a true minus sign, no negative zero, "–" for NaN, powers of ten where the
/// digits would run long.
fn fixed(x: f64, digits: usize) -> String {
    let text = match x {
        _ if x.is_nan() => return "–".into(),
        f64::INFINITY => return "∞".into(),
        f64::NEG_INFINITY => return "−∞".into(),
        _ if x.abs() >= 1e9 => format!("{x:.digits$e}"),
        _ => format!("{x:.digits$}"),
    };
    match text.strip_prefix('-') {
        Some(positive) if positive.bytes().all(|b| b == b'0' || b == b'.') => positive.into(),
        Some(positive) => format!("−{positive}"),
        None => text,
    }
}

/// `1234567` as `1,234,567`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Bytes for people: `1.5 kB`, in the decimal units of disks and file managers.
pub fn bytes(n: u64) -> String {
    match n {
        0..1_000 => format!("{n} B"),
        1_000..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

/// The page for `record`: one HTML document (also well-formed XML) that needs nothing beside itself.
pub fn render(record: &RunRecord) -> String {
    html::page(record)
}

/// File of the run record in an output folder; written last, so that a run that has it is finished.
pub const RECORD_FILE: &str = "run.json";
/// The page beside it.
pub const PAGE_FILE: &str = "report.html";

/// Writes `run.json` and `report.html` into the folder `dir`, which is made if need be. Both are complete
/// on disk before either takes its name: running out of space leaves earlier files as they were and no others.
pub fn write(record: &RunRecord, dir: impl AsRef<Path>) -> Result<()> {
    let dir = dir.as_ref();
    let json = serde_json::to_vec(record).map_err(|e| Error::file(dir.join(RECORD_FILE), e.to_string()))?;
    write_together(dir, [(PAGE_FILE, render(record).into_bytes()), (RECORD_FILE, json)])
}

/// Writes files into the folder `dir` as [`write()`] says, in this order.
fn write_together<const N: usize>(dir: &Path, files: [(&str, Vec<u8>); N]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let mut staged = Vec::new();
    for (name, content) in files {
        let path = dir.join(name);
        let mut builder = tempfile::Builder::new();
        builder.prefix(".report-").suffix(".tmp");
        // Temporary files are private by default; these are ordinary ones, limited by the umask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(dir).map_err(Error::io(&path))?;
        file.write_all(&content).and_then(|()| file.as_file().sync_all()).map_err(Error::io(&path))?;
        staged.push((file, path));
    }
    for (file, path) in staged {
        file.persist(&path).map_err(|e| Error::io(&path)(e.error))?;
    }
    // The renames themselves are durable only once the folder is; not every system can open one.
    #[cfg(unix)]
    std::fs::File::open(dir).and_then(|folder| folder.sync_all()).map_err(Error::io(dir))?;
    Ok(())
}

/// Reads a `run.json`. Errors name the file, and the line where it is not a run record.
pub fn read(path: impl AsRef<Path>) -> Result<RunRecord> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|e| {
        Error::line(path, e.line(), format!("not a run record: {e}; it is made by a run, do not edit it"))
    })
}

/// JSON has no NaN or infinity: both are written as `null`, which reads as NaN.
mod number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(x: &f64, s: S) -> Result<S::Ok, S::Error> {
        x.is_finite().then_some(*x).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(d)?.unwrap_or(f64::NAN))
    }
}

/// [`number`] for a list of names and scores.
mod scores {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(scores: &[(String, f64)], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(scores.iter().map(|(name, x)| (name, x.is_finite().then_some(*x))))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<(String, f64)>, D::Error> {
        let scores = Vec::<(String, Option<f64>)>::deserialize(d)?;
        Ok(scores.into_iter().map(|(name, x)| (name, x.unwrap_or(f64::NAN))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record whose stages have these main scores.
    fn scored(scores: &[f64]) -> RunRecord {
        let names = ["dense", "2:4 FP16", "2:4 INT8"];
        let stage = |(i, score): (usize, &f64)| Stage {
            name: names[i].into(),
            scores: vec![("F1".into(), 1.0), ("accuracy".into(), *score)],
            ..Stage::default()
        };
        let stages = scores.iter().enumerate().map(stage).collect();
        RunRecord { main_metric: "accuracy".into(), stages, ..RunRecord::default() }
    }

    #[test]
    fn verdicts() {
        let lower = |scores: &[f64]| RunRecord { lower_is_better: true, ..scored(scores) };
        let cases = [
            (scored(&[]), Outcome::Unknown, "No model was scored in this run."),
            (scored(&[90.0]), Outcome::Unknown, "Only dense was scored: there is nothing to compare."),
            (
                scored(&[90.0, f64::NAN]),
                Outcome::Unknown,
                "No comparison with dense: 2:4 FP16 has no usable accuracy.",
            ),
            (
                scored(&[f64::NAN, 90.0]),
                Outcome::Unknown,
                "No comparison with dense: dense has no usable accuracy.",
            ),
            (
                scored(&[91.2, 91.0, 90.2]),
                Outcome::Held,
                "2:4 INT8 is within 1 point of dense (90.20 against 91.20 accuracy).",
            ),
            (
                scored(&[91.2, 91.0, 91.2]),
                Outcome::Held,
                "2:4 INT8 matches dense (91.20 against 91.20 accuracy).",
            ),
            (
                scored(&[91.2, 91.0, 91.7]),
                Outcome::Held,
                "2:4 INT8 is 0.50 points better than dense (91.70 against 91.20 accuracy).",
            ),
            (
                scored(&[91.2, 88.5, 88.0]),
                Outcome::Lost,
                "2:4 INT8 lost 3.20 points to dense (88.00 against 91.20 accuracy). \
                 The largest step down was 2:4 FP16: 2.70 points.",
            ),
            (
                scored(&[91.2, f64::NAN, 88.0]),
                Outcome::Lost,
                "2:4 INT8 lost 3.20 points to dense (88.00 against 91.20 accuracy). \
                 The largest step down was 2:4 INT8: 3.20 points.",
            ),
            (
                lower(&[20.0, 20.1]),
                Outcome::Held,
                "2:4 FP16 is within 1 % of dense (20.10 against 20.00 accuracy).",
            ),
            (
                lower(&[20.0, 25.0]),
                Outcome::Lost,
                "2:4 FP16 lost 25.00 % to dense (25.00 against 20.00 accuracy). The largest step down was 2:4 FP16: 25.00 %.",
            ),
        ];
        for (record, outcome, text) in cases {
            assert_eq!(record.verdict(), (outcome, text.into()));
        }
        for (which, scores, outcome, says) in [
            (&[0, 2][..], [50.0, 50.0, 50.0], Outcome::Unknown, "dense and 2:4 INT8 each predict one class"),
            (&[2], [50.0, 50.0, 50.0], Outcome::Unknown, "2:4 INT8 predicts one class"),
            (&[0], [50.0, 50.0, 60.0], Outcome::Unknown, "dense predicts one class"),
            (&[2], [90.0, 88.0, 50.0], Outcome::Lost, "points. 2:4 INT8 predicts one class"),
        ] {
            let mut record = scored(&scores);
            which.iter().for_each(|&i| record.stages[i].one_class = true);
            let (found, text) = record.verdict();
            assert!(found == outcome && text.contains(says) && text.contains("for every example"), "{text}");
        }
        let unnamed = RunRecord { main_metric: "EM".into(), ..scored(&[1.0, 2.0]) };
        assert_eq!(unnamed.verdict().0, Outcome::Unknown);
    }

    #[test]
    fn numbers_are_written_for_people() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "0.0"),
            (-0.04, "0.0"),
            (-0.06, "−0.1"),
            (2.25, "2.2"),
            (1e12, "1.0e12"),
            (f64::NAN, "–"),
            (f64::INFINITY, "∞"),
            (f64::NEG_INFINITY, "−∞"),
        ];
        for (x, text) in cases {
            assert_eq!(fixed(x, 1), text, "{x}");
        }
    }

    #[test]
    fn bytes_are_readable() {
        assert_eq!(
            ["999 B", "1.5 kB", "2.0 MB", "1.25 GB"],
            [999, 1_500, 2_000_000, 1_250_000_000].map(bytes)
        );
    }

    #[test]
    fn digits_are_grouped_by_three() {
        assert_eq!(["0", "999", "1,000", "12,345,678"], [0, 999, 1000, 12_345_678].map(grouped));
    }

    #[test]
    fn ratios_are_exact() {
        let sizes =
            Sizes { dense_fp16_bits: 1600, packed_bits: 500, scale_bits: 100, rest_bits: 400, file_bytes: 0 };
        assert_eq!((sizes.ratio(), sizes.model_ratio()), (0.3125, 0.5));
        assert!(Sizes::default().ratio().is_nan() && Sizes::default().model_ratio().is_nan());
    }

    #[test]
    fn a_record_comes_back_from_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("new/run");
        let mut record = scored(&[91.2, 1.0 / 3.0, 1e-300]);
        record.sizes = Some(Sizes { dense_fp16_bits: u64::MAX, ..Sizes::default() });
        record.machine = Machine::current(2, "CPU");
        record.curves =
            vec![Curve { stage: "ü \"<".into(), points: vec![Point { loss: 0.1, ..Point::default() }] }];
        record.layers = vec![LayerRow { left_dense: Some("odd".into()), ..LayerRow::default() }];
        record.ablation = vec![Ablation { label: "no".into(), scores: vec![("F1".into(), 0.1)] }];
        record.notes = vec!["line\nline".into()];
        write(&scored(&[1.0]), &dir).unwrap();
        write(&record, &dir).unwrap();
        assert_eq!(read(dir.join("run.json")).unwrap(), record);
        assert_eq!(std::fs::read_to_string(dir.join("report.html")).unwrap(), render(&record));
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2, "no temporary file is left");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let ordinary = dir.join("ordinary");
            std::fs::write(&ordinary, "").unwrap();
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode(&dir.join("report.html")), mode(&ordinary));
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_null() {
        let mut record = scored(&[f64::NAN, f64::INFINITY]);
        record.wall_seconds = f64::NAN;
        let json = serde_json::to_string(&record).unwrap();
        assert_eq!(json.matches("null").count(), 4, "two scores, the time, no sizes: {json}");
        let back: RunRecord = serde_json::from_str(&json).unwrap();
        assert!(back.wall_seconds.is_nan() && back.stages.iter().all(|s| s.scores[1].1.is_nan()));
        assert_eq!(serde_json::to_string(&back).unwrap(), json);
    }

    #[test]
    fn records_of_other_versions_are_read() {
        let old: RunRecord =
            serde_json::from_str(r#"{"title": "m", "later": [1], "stages": [{"name": "dense"}]}"#).unwrap();
        assert_eq!((old.title.as_str(), old.stages.len(), old.sizes), ("m", 1, None));
    }

    #[test]
    fn errors_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.json");
        assert!(matches!(read(&path), Err(Error::Io { path: p, .. }) if p == path));
        std::fs::write(&path, "{\n\"title\": 3}").unwrap();
        assert!(matches!(read(&path), Err(Error::Line { path: p, line: 2, .. }) if p == path));
        // A file where the folder should be.
        assert!(matches!(write(&RunRecord::default(), &path), Err(Error::Io { path: p, .. }) if p == path));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\n\"title\": 3}");
    }
}
