//! The GLUE tasks in the benchmark's own file layout, and their metrics.
//!
//! Files are tab-separated with a header row (CoLA has none) and *no quoting*: a quotation mark is a
//! character of the sentence. A byte order mark and Windows line ends are accepted.

use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Dataset, Example, HeadKind, Reader, Scores, Split, Target, Task, Tokenizer};
use crate::{Error, Result};

/// SST-2: is a film review's sentence positive or negative?
pub const SST2: Task = Task {
    name: "sst2",
    about: "sentiment of a sentence from a film review; accuracy",
    head: HeadKind::Classes(2),
    labels: &["negative", "positive"],
    metrics: &["accuracy"],
    max_len: 128,
    reader: &Layout {
        folder: "SST-2",
        train: &[("train.tsv", "")],
        dev: &[("dev.tsv", "")],
        columns: Columns::Named { text: &["sentence"], label: "label" },
        label: Label::Digit,
        skips_cut_rows: false,
        metrics: &[Metric::Accuracy],
    },
};

/// CoLA: is a sentence grammatically acceptable?
pub const COLA: Task = Task {
    name: "cola",
    about: "grammatical acceptability of a sentence; Matthews correlation, accuracy",
    head: HeadKind::Classes(2),
    labels: &["unacceptable", "acceptable"],
    metrics: &["matthews", "accuracy"],
    max_len: 128,
    reader: &Layout {
        folder: "CoLA",
        train: &[("train.tsv", "")],
        dev: &[("dev.tsv", "")],
        columns: Columns::Placed { count: 4, text: &[3], label: 1 },
        label: Label::Digit,
        skips_cut_rows: false,
        metrics: &[Metric::Matthews, Metric::Accuracy],
    },
};

/// MRPC: do two news sentences say the same?
pub const MRPC: Task = Task {
    name: "mrpc",
    about: "whether two sentences from the news are paraphrases; accuracy, F1",
    head: HeadKind::Classes(2),
    labels: &["not_equivalent", "equivalent"],
    metrics: &["accuracy", "f1"],
    max_len: 128,
    reader: &Layout {
        folder: "MRPC",
        train: &[("train.tsv", "")],
        dev: &[("dev.tsv", "")],
        columns: Columns::Named { text: &["#1 String", "#2 String"], label: "Quality" },
        label: Label::Digit,
        skips_cut_rows: false,
        metrics: &[Metric::Accuracy, Metric::F1],
    },
};

/// STS-B: how similar are two sentences, from 0 to 5?
pub const STSB: Task = Task {
    name: "stsb",
    about: "similarity of two sentences from 0 to 5; Pearson and Spearman correlation",
    head: HeadKind::Value,
    labels: &[],
    metrics: &["pearson", "spearman"],
    max_len: 128,
    reader: &Layout {
        folder: "STS-B",
        train: &[("train.tsv", "")],
        dev: &[("dev.tsv", "")],
        columns: Columns::Named { text: &["sentence1", "sentence2"], label: "score" },
        label: Label::Score,
        skips_cut_rows: false,
        metrics: &[Metric::Pearson, Metric::Spearman],
    },
};

/// RTE: does a text entail a hypothesis?
pub const RTE: Task = Task {
    name: "rte",
    about: "whether a text entails a hypothesis, small; accuracy",
    head: HeadKind::Classes(2),
    labels: &["entailment", "not_entailment"],
    metrics: &["accuracy"],
    max_len: 128,
    reader: &Layout {
        folder: "RTE",
        train: &[("train.tsv", "")],
        dev: &[("dev.tsv", "")],
        columns: Columns::Named { text: &["sentence1", "sentence2"], label: "label" },
        label: Label::Name,
        skips_cut_rows: false,
        metrics: &[Metric::Accuracy],
    },
};

/// QQP: do two questions ask the same?
pub const QQP: Task = Task {
    name: "qqp",
    about: "whether two Quora questions ask the same; accuracy, F1",
    head: HeadKind::Classes(2),
    labels: &["not_duplicate", "duplicate"],
    metrics: &["accuracy", "f1"],
    max_len: 128,
    reader: &Layout {
        folder: "QQP",
        train: &[("train.tsv", "")],
        dev: &[("dev.tsv", "")],
        columns: Columns::Named { text: &["question1", "question2"], label: "is_duplicate" },
        label: Label::Digit,
        // A handful of rows of the published training file end before the second question.
        skips_cut_rows: true,
        metrics: &[Metric::Accuracy, Metric::F1],
    },
};

/// QNLI: does a sentence hold the answer to a question?
pub const QNLI: Task = Task {
    name: "qnli",
    about: "whether a sentence answers a question; accuracy",
    head: HeadKind::Classes(2),
    labels: &["entailment", "not_entailment"],
    metrics: &["accuracy"],
    max_len: 128,
    reader: &Layout {
        folder: "QNLI",
        train: &[("train.tsv", "")],
        dev: &[("dev.tsv", "")],
        columns: Columns::Named { text: &["question", "sentence"], label: "label" },
        label: Label::Name,
        skips_cut_rows: false,
        metrics: &[Metric::Accuracy],
    },
};

/// MNLI: does a premise entail a hypothesis, contradict it or neither? Its development set has a part in the
/// training set's genres and one in others; both are loaded, and scored as `accuracy_m` and `accuracy_mm`.
pub const MNLI: Task = Task {
    name: "mnli",
    about: "entailment, neutral or contradiction between two sentences; accuracy, matched and mismatched",
    head: HeadKind::Classes(3),
    labels: &["entailment", "neutral", "contradiction"],
    metrics: &["accuracy"],
    max_len: 128,
    reader: &Layout {
        folder: "MNLI",
        train: &[("train.tsv", "")],
        dev: &[("dev_matched.tsv", "_m"), ("dev_mismatched.tsv", "_mm")],
        columns: Columns::Named { text: &["sentence1", "sentence2"], label: "gold_label" },
        label: Label::Name,
        skips_cut_rows: false,
        metrics: &[Metric::Accuracy],
    },
};

/// How one GLUE task lays out its files.
struct Layout {
    /// The task's folder in the GLUE folder.
    folder: &'static str,
    /// Files of the training split, each with what its metrics' names end in.
    train: &'static [(&'static str, &'static str)],
    /// The same for the development split.
    dev: &'static [(&'static str, &'static str)],
    columns: Columns,
    label: Label,
    /// Whether rows that end before the last text are left out, with a note, instead of being an error.
    skips_cut_rows: bool,
    metrics: &'static [Metric],
}

/// Where texts and label are in a row.
enum Columns {
    /// Under these names in the header row.
    Named { text: &'static [&'static str], label: &'static str },
    /// In these places of `count`, counted from 0; there is no header row.
    Placed { count: usize, text: &'static [usize], label: usize },
}

/// How a file spells its labels.
enum Label {
    /// The class's number.
    Digit,
    /// The class's name.
    Name,
    /// A number from 0 to 5.
    Score,
}

/// One example before tokenisation.
struct Row {
    texts: Vec<String>,
    target: Target,
}

impl Reader for Layout {
    fn texts(&self) -> usize {
        match self.columns {
            Columns::Named { text, .. } => text.len(),
            Columns::Placed { text, .. } => text.len(),
        }
    }

    fn load(
        &self,
        task: &'static Task,
        data: &Path,
        split: Split,
        tokenizer: &Tokenizer,
        max_len: usize,
    ) -> Result<Dataset> {
        let files = match split {
            Split::Train => self.train,
            Split::Dev => self.dev,
        };
        let folder = self.find(data, files[0].0)?;
        let (mut examples, mut notes) = (Vec::new(), Vec::new());
        let mut groups: Vec<(Range<usize>, &'static str)> = Vec::new();
        for &(file, suffix) in files {
            let path = folder.join(file);
            let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
            let rows = self.rows(task, &path, &bytes, &mut notes)?;
            let start = examples.len();
            examples.par_extend(
                rows.into_par_iter()
                    .map(|row| {
                        let second = row.texts.get(1).map(String::as_str);
                        let encoded = tokenizer.encode(&row.texts[0], second, max_len)?;
                        Ok(Example { ids: encoded.ids, types: encoded.types, target: row.target })
                    })
                    .collect::<Result<Vec<_>>>()?,
            );
            groups.push((start..examples.len(), suffix));
        }
        let metrics = self.metrics;
        let mut dataset = Dataset::new(task.name, split, task.head, examples, move |examples, outputs| {
            let scores = groups.iter().flat_map(|(part, suffix)| {
                let (examples, outputs) = (&examples[part.clone()], &outputs[part.clone()]);
                metrics.iter().map(move |m| (format!("{}{suffix}", m.name()), m.score(examples, outputs)))
            });
            Scores(scores.collect())
        });
        dataset.notes = notes;
        Ok(dataset)
    }
}

impl Layout {
    /// The folder that holds `file`: `data` itself, or the task's folder in it.
    fn find(&self, data: &Path, file: &str) -> Result<PathBuf> {
        let inner = data.join(self.folder);
        [data.to_path_buf(), inner].into_iter().find(|d| d.join(file).is_file()).ok_or_else(|| {
            let message = format!(
                "neither {file} nor {}/{file} is here; give the folder that holds them (GLUE's download has one \
                 folder a task)",
                self.folder
            );
            Error::file(data, message)
        })
    }

    /// Splits a file into rows and checks each.
    fn rows(&self, task: &Task, path: &Path, bytes: &[u8], notes: &mut Vec<String>) -> Result<Vec<Row>> {
        let mut lines = text_lines(path, bytes)?;
        let (count, text, label, header) = match self.columns {
            Columns::Placed { count, text, label } => (count, text.to_vec(), label, 0),
            Columns::Named { text, label } => {
                let names: Vec<&str> = lines.remove(0).split('\t').collect();
                let place = |wanted: &str| {
                    names.iter().position(|n| *n == wanted).ok_or_else(|| {
                        let found = names.join("`, `");
                        let message = format!(
                            "no column `{wanted}`; {} needs it in the header row, which has `{found}`",
                            task.name
                        );
                        Error::line(path, 1, message)
                    })
                };
                let text = text.iter().map(|t| place(t)).collect::<Result<Vec<_>>>()?;
                (names.len(), text, place(label)?, 1)
            }
        };
        let (mut rows, mut cut, mut empty) = (Vec::with_capacity(lines.len()), 0, 0);
        for (i, line) in lines.into_iter().enumerate() {
            let fields: Vec<&str> = line.split('\t').collect();
            let last_text = text.iter().copied().max().unwrap_or(0);
            if self.skips_cut_rows && fields.len() <= last_text.min(label) {
                cut += 1;
                continue;
            }
            let at = |message: String| Error::line(path, 1 + header + i, message);
            if fields.len() != count {
                return Err(at(format!(
                    "expected {count} tab-separated fields, found {}; check that the file is whole and belongs \
                     to {}",
                    fields.len(),
                    task.name
                )));
            }
            let texts: Vec<String> = text.iter().map(|&t| fields[t].to_owned()).collect();
            empty += usize::from(texts.iter().any(|t| t.trim().is_empty()));
            rows.push(Row { texts, target: self.label.parse(task, fields[label]).map_err(at)? });
        }
        if rows.is_empty() {
            return Err(Error::file(path, "has no examples; get the file again"));
        }
        let file = path.display();
        if cut > 0 {
            notes.push(format!("{file}: skipped {cut} rows that end before the second text"));
        }
        if empty > 0 {
            notes.push(format!("{file}: {empty} examples have an empty text"));
        }
        Ok(rows)
    }
}

/// The lines of a text file, without line ends, byte order mark and blank lines at the end; at least one.
fn text_lines<'a>(path: &Path, bytes: &'a [u8]) -> Result<Vec<&'a str>> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let lines = bytes.split(|&b| b == b'\n').enumerate().map(|(i, line)| {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        std::str::from_utf8(line).map_err(|e| {
            let message =
                format!("byte {} is not valid UTF-8; convert the file to UTF-8", e.valid_up_to() + 1);
            Error::line(path, i + 1, message)
        })
    });
    let mut lines = lines.collect::<Result<Vec<_>>>()?;
    while lines.last().is_some_and(|line| line.is_empty()) {
        lines.pop();
    }
    if lines.is_empty() {
        return Err(Error::file(path, "is empty; get the file again"));
    }
    Ok(lines)
}

impl Label {
    fn parse(&self, task: &Task, text: &str) -> std::result::Result<Target, String> {
        match self {
            Label::Digit => match text.parse::<u32>() {
                Ok(class) if (class as usize) < task.labels.len() => Ok(Target::Class(class)),
                _ => Err(format!("label `{text}` is not a number from 0 to {}", task.labels.len() - 1)),
            },
            Label::Name => match task.labels.iter().position(|l| *l == text) {
                Some(class) => Ok(Target::Class(class as u32)),
                None => Err(format!("label `{text}` is none of {}", task.labels.join(", "))),
            },
            Label::Score => match text.parse::<f32>() {
                Ok(score) if (0.0..=5.0).contains(&score) => Ok(Target::Value(score)),
                _ => Err(format!("score `{text}` is not a number from 0 to 5")),
            },
        }
    }
}

/// A metric of a GLUE task.
#[derive(Clone, Copy)]
enum Metric {
    Accuracy,
    F1,
    Matthews,
    Pearson,
    Spearman,
}

impl Metric {
    fn name(self) -> &'static str {
        match self {
            Metric::Accuracy => "accuracy",
            Metric::F1 => "f1",
            Metric::Matthews => "matthews",
            Metric::Pearson => "pearson",
            Metric::Spearman => "spearman",
        }
    }

    fn score(self, examples: &[Example], outputs: &[Vec<f32>]) -> f64 {
        let classes = || {
            let target = |e: &Example| match e.target {
                Target::Class(c) => c,
                _ => unreachable!("the reader gives classes"),
            };
            let targets: Vec<u32> = examples.iter().map(target).collect();
            (outputs.iter().map(|o| largest(o)).collect::<Vec<_>>(), targets)
        };
        let values = || {
            let target = |e: &Example| match e.target {
                Target::Value(v) => f64::from(v),
                _ => unreachable!("the reader gives values"),
            };
            let targets: Vec<f64> = examples.iter().map(target).collect();
            (outputs.iter().map(|o| f64::from(o[0])).collect::<Vec<_>>(), targets)
        };
        match self {
            Metric::Accuracy | Metric::F1 | Metric::Matthews => {
                let (predicted, targets) = classes();
                match self {
                    Metric::Accuracy => accuracy(&predicted, &targets),
                    Metric::F1 => f1(&predicted, &targets),
                    _ => matthews(&predicted, &targets),
                }
            }
            Metric::Pearson | Metric::Spearman => {
                let (predicted, targets) = values();
                if matches!(self, Metric::Pearson) {
                    pearson(&predicted, &targets)
                } else {
                    spearman(&predicted, &targets)
                }
            }
        }
    }
}

/// The class with the largest logit, the first of equal ones; `None` if a logit is not a number.
pub fn largest(logits: &[f32]) -> Option<u32> {
    if logits.iter().any(|l| l.is_nan()) {
        return None;
    }
    let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
    best.map(|i| i as u32)
}

/// Share of predictions that equal their target, in percent; 0 for no predictions. `None` is never right.
pub fn accuracy(predicted: &[Option<u32>], targets: &[u32]) -> f64 {
    let right = predicted.iter().zip(targets).filter(|(p, t)| **p == Some(**t)).count();
    100.0 * ratio(right as f64, targets.len() as f64)
}

/// F1 of class 1 against the rest, in percent: 2 tp / (2 tp + fp + fn); 0 if that is 0 / 0. `None` counts as
/// a prediction that is not class 1.
pub fn f1(predicted: &[Option<u32>], targets: &[u32]) -> f64 {
    let c = Confusion::of(predicted, targets);
    100.0 * ratio(2.0 * c.tp, 2.0 * c.tp + c.fp + c.missed)
}

/// Matthews correlation of class 1 against the rest, times 100:
/// (tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn)), and 0 where that is 0 / 0, as GLUE's script
/// (scikit-learn) has it. `None` counts as the wrong class.
pub fn matthews(predicted: &[Option<u32>], targets: &[u32]) -> f64 {
    let wrong: Vec<_> = predicted.iter().zip(targets).map(|(p, t)| p.or(Some(u32::from(*t != 1)))).collect();
    let c = Confusion::of(&wrong, targets);
    let scale = (c.tp + c.fp) * (c.tp + c.missed) * (c.tn + c.fp) * (c.tn + c.missed);
    100.0 * ratio(c.tp * c.tn - c.fp * c.missed, scale.sqrt())
}

/// Counts of class 1 against the rest.
#[derive(Default)]
struct Confusion {
    tp: f64,
    fp: f64,
    tn: f64,
    /// False negatives.
    missed: f64,
}

impl Confusion {
    fn of(predicted: &[Option<u32>], targets: &[u32]) -> Self {
        let mut c = Confusion::default();
        for (p, t) in predicted.iter().zip(targets) {
            let cell = match (*p == Some(1), *t == 1) {
                (true, true) => &mut c.tp,
                (true, false) => &mut c.fp,
                (false, false) => &mut c.tn,
                (false, true) => &mut c.missed,
            };
            *cell += 1.0;
        }
        c
    }
}

/// Pearson's linear correlation, times 100; 0 where it is undefined (a constant or non-finite series).
pub fn pearson(x: &[f64], y: &[f64]) -> f64 {
    let n = x.len() as f64;
    let mean = |v: &[f64]| v.iter().sum::<f64>() / n;
    let (mx, my) = (mean(x), mean(y));
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (a, b) in x.iter().zip(y) {
        xy += (a - mx) * (b - my);
        xx += (a - mx) * (a - mx);
        yy += (b - my) * (b - my);
    }
    let r = 100.0 * ratio(xy, (xx * yy).sqrt());
    if r.is_finite() { r } else { 0.0 }
}

/// Spearman's rank correlation, times 100: Pearson's of the ranks, equal values sharing their mean rank; 0
/// where it is undefined.
pub fn spearman(x: &[f64], y: &[f64]) -> f64 {
    // A rank would hide that a value is not a number.
    if x.iter().chain(y).any(|v| v.is_nan()) { 0.0 } else { pearson(&ranks(x), &ranks(y)) }
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    for tied in order.chunk_by(|&a, &b| values[a] == values[b]).scan(0, |first, tied| {
        *first += tied.len();
        Some((*first - tied.len(), tied))
    }) {
        let (first, tied) = tied;
        let mean = first as f64 + (tied.len() as f64 + 1.0) / 2.0;
        tied.iter().for_each(|&i| ranks[i] = mean);
    }
    ranks
}

/// `a / b`, 0 for 0 in the denominator.
fn ratio(a: f64, b: f64) -> f64 {
    if b == 0.0 { 0.0 } else { a / b }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{shared, tiny};
    use super::super::{TASKS, task};
    use super::*;

    /// Writes `files` into a fresh folder.
    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        dir
    }

    fn load(name: &str, bytes: &[u8]) -> Result<Dataset> {
        let dir = folder(&[("train.tsv", bytes)]);
        task(name).unwrap().load(dir.path(), Split::Train, &tiny(), 16)
    }

    /// The error of loading `bytes`, with the folder's random name taken out.
    fn error(name: &str, bytes: &[u8]) -> String {
        let text = load(name, bytes).unwrap_err().to_string();
        text[text.find("train.tsv").unwrap()..].to_owned()
    }

    fn targets(dataset: &Dataset) -> Vec<Target> {
        dataset.examples.iter().map(|e| e.target).collect()
    }

    #[test]
    fn each_layout_is_read() {
        let class = Target::Class;
        let cases: [(&str, &str, Vec<Target>); 8] = [
            ("sst2", "sentence\tlabel\nthe cat \t1\nthe dog\t0\n", vec![class(1), class(0)]),
            ("cola", "gj04\t1\t\tthe cat\ngj04\t0\t*\tcat the\n", vec![class(1), class(0)]),
            (
                "mrpc",
                "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t\" the cat\tthe \" dog\r\n",
                vec![class(1)],
            ),
            (
                "stsb",
                "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tthe cat\tthe dog\t3.800\n",
                vec![Target::Value(3.8)],
            ),
            (
                "rte",
                "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\ta\tb\tentailment\n",
                vec![class(1), class(0)],
            ),
            (
                "qqp",
                "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tthe cat\tthe dog\t0\n",
                vec![class(0)],
            ),
            ("qnli", "index\tquestion\tsentence\tlabel\n0\ta\tb\tentailment\n", vec![class(0)]),
            (
                "mnli",
                "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tcontradiction\n\
                 1\ta\tb\tneutral\tneutral\n2\ta\tb\tneutral\tentailment\n",
                vec![class(2), class(1), class(0)],
            ),
        ];
        for (name, text, expected) in cases {
            let dataset = load(name, text.as_bytes()).unwrap();
            assert_eq!(targets(&dataset), expected, "{name}");
            assert!(dataset.notes.is_empty(), "{name}: {:?}", dataset.notes);
        }
    }

    #[test]
    fn quotation_marks_are_text_and_pairs_have_two_segments() {
        let text = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\t\" the cat\tthe\" dog\n";
        let dataset = load("mrpc", text.as_bytes()).unwrap();
        // [CLS] " the cat [SEP] the " dog [SEP]
        assert_eq!(dataset.examples[0].ids, [2, 8, 5, 6, 3, 5, 8, 7, 3]);
        assert_eq!(dataset.examples[0].types, [0, 0, 0, 0, 0, 1, 1, 1, 1]);
    }

    #[test]
    fn the_folder_above_is_found_too() {
        let dir = folder(&[("CoLA/dev.tsv", b"gj04\t1\t\tthe cat\n")]);
        let cola = task("CoLA").unwrap();
        assert_eq!(cola.load(dir.path(), Split::Dev, &tiny(), 16).unwrap().examples.len(), 1);
        let error = cola.load(dir.path(), Split::Train, &tiny(), 16).unwrap_err().to_string();
        assert!(error.contains("neither train.tsv nor CoLA/train.tsv is here"), "{error}");
    }

    #[test]
    fn mnli_scores_both_parts() {
        let header = "sentence1\tsentence2\tgold_label\n";
        let dir = folder(&[
            ("dev_matched.tsv", format!("{header}a\tb\tentailment\na\tb\tneutral\n").as_bytes()),
            ("dev_mismatched.tsv", format!("{header}a\tb\tcontradiction\n").as_bytes()),
        ]);
        let mnli = task("mnli").unwrap();
        let dataset = mnli.load(dir.path(), Split::Dev, &tiny(), 16).unwrap();
        let entailment = vec![1.0, 0.0, 0.0];
        let contradiction = vec![0.0, 0.0, 1.0];
        // One of two right, then one of one.
        let scores = dataset.score(&[entailment.clone(), entailment, contradiction]);
        assert_eq!(scores.0, [("accuracy_m".to_owned(), 50.0), ("accuracy_mm".to_owned(), 100.0)]);
        std::fs::remove_file(dir.path().join("dev_mismatched.tsv")).unwrap();
        let error = mnli.load(dir.path(), Split::Dev, &tiny(), 16).unwrap_err().to_string();
        assert!(error.contains("dev_mismatched.tsv"), "{error}");
    }

    #[test]
    fn malformed_files_are_refused_by_line() {
        let cases: [(&str, &[u8], &str); 14] = [
            ("sst2", b"", "train.tsv: is empty"),
            ("sst2", b"\n\n", "train.tsv: is empty"),
            ("sst2", b"sentence\tlabel\n", "train.tsv: has no examples"),
            (
                "sst2",
                b"sentence\tlable\na\t1\n",
                "train.tsv:1: no column `label`; sst2 needs it in the header row, which has `sentence`, `lable`",
            ),
            ("sst2", b"sentence\tlabel\na\t1\nb\n", "train.tsv:3: expected 2 tab-separated fields, found 1"),
            ("sst2", b"sentence\tlabel\na\tb\t1\n", "train.tsv:2: expected 2 tab-separated fields, found 3"),
            (
                "sst2",
                b"sentence\tlabel\na\t1\n\nb\t1\n",
                "train.tsv:3: expected 2 tab-separated fields, found 1",
            ),
            ("cola", b"sentence\tlabel\n", "train.tsv:1: expected 4 tab-separated fields, found 2"),
            ("sst2", b"sentence\tlabel\na\t2\n", "train.tsv:2: label `2` is not a number from 0 to 1"),
            ("sst2", b"sentence\tlabel\na\tgood\n", "train.tsv:2: label `good` is not a number from 0 to 1"),
            (
                "rte",
                b"sentence1\tsentence2\tlabel\na\tb\tneutral\n",
                "train.tsv:2: label `neutral` is none of entailment, not_entailment",
            ),
            (
                "stsb",
                b"sentence1\tsentence2\tscore\na\tb\t5.1\n",
                "train.tsv:2: score `5.1` is not a number from 0 to 5",
            ),
            (
                "stsb",
                b"sentence1\tsentence2\tscore\na\tb\tNaN\n",
                "train.tsv:2: score `NaN` is not a number from 0 to 5",
            ),
            ("sst2", b"sentence\tlabel\na\t1\nb\xff\t1\n", "train.tsv:3: byte 2 is not valid UTF-8"),
        ];
        for (name, bytes, expected) in cases {
            let found = error(name, bytes);
            assert!(found.starts_with(expected), "expected `{expected}`, found `{found}`");
        }
    }

    #[test]
    fn qqp_skips_only_rows_without_second_question_and_label() {
        let header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n";
        let dataset = load("qqp", format!("{header}1\t2\t3\ta\n1\t2\t3\ta\tb\t1\n").as_bytes()).unwrap();
        assert_eq!(targets(&dataset), [Target::Class(1)]);
        assert!(dataset.notes[0].contains("skipped 1 rows"), "{:?}", dataset.notes);
        let found = error("qqp", format!("{header}1\t2\t3\ta\tb\n").as_bytes());
        assert!(found.starts_with("train.tsv:2: expected 6 tab-separated fields, found 5"), "{found}");
    }

    #[test]
    fn empty_sentences_are_noted() {
        let dataset = load("sst2", b"sentence\tlabel\n \t1\na\t0\n").unwrap();
        assert_eq!(dataset.examples[0].ids, [2, 3], "[CLS] [SEP]");
        assert!(dataset.notes[0].contains("1 examples have an empty text"), "{:?}", dataset.notes);
    }

    #[test]
    fn a_length_without_room_is_refused() {
        let dir = folder(&[("train.tsv", b"sentence\tlabel\na\t1\n")]);
        let error =
            SST2.reader.load(task("sst2").unwrap(), dir.path(), Split::Train, &tiny(), 2).unwrap_err();
        assert!(error.to_string().contains("use at least 3"), "{error}");
    }

    #[test]
    fn real_files_have_the_known_counts() {
        let Some(glue) = shared("data/glue") else { return };
        // Lines without the header, as `wc -l` counts them.
        let counts = [
            ("sst2", 65849, 1500),
            ("cola", 7551, 1000),
            ("mrpc", 3667, 408),
            ("stsb", 5749, 1500),
            ("rte", 2240, 250),
        ];
        let tokenizer = tiny();
        for (name, train, dev) in counts {
            for (split, count) in [(Split::Train, train), (Split::Dev, dev)] {
                let dataset = task(name).unwrap().load(&glue, split, &tokenizer, 128).unwrap();
                assert_eq!(dataset.examples.len(), count, "{name} {split}");
                assert!(dataset.notes.is_empty(), "{:?}", dataset.notes);
                // A model that is right about everything scores 100 in every metric.
                let outputs: Vec<Vec<f32>> = dataset
                    .examples
                    .iter()
                    .map(|e| match e.target {
                        Target::Class(c) => (0..2).map(|i| f32::from(u8::from(i == c))).collect(),
                        Target::Value(v) => vec![v],
                        _ => unreachable!(),
                    })
                    .collect();
                let scores = dataset.score(&outputs);
                assert!(scores.0.iter().all(|(_, v)| (v - 100.0).abs() < 1e-9), "{name}: {scores}");
                assert_eq!(scores.0[0].0, task(name).unwrap().metrics[0]);
            }
        }
    }

    #[test]
    fn metric_names_agree_with_the_table() {
        let mut checked = 0;
        for task in TASKS.iter().filter(|t| t.head != HeadKind::Span) {
            let text = match task.name {
                "sst2" => "sentence\tlabel\na\t1\n",
                "cola" => "x\t1\t\ta\n",
                "mrpc" => "Quality\t#1 String\t#2 String\n1\ta\tb\n",
                "stsb" => "sentence1\tsentence2\tscore\na\tb\t1\n",
                "rte" => "sentence1\tsentence2\tlabel\na\tb\tentailment\n",
                "qqp" => "question1\tquestion2\tis_duplicate\na\tb\t1\n",
                "qnli" => "question\tsentence\tlabel\na\tb\tentailment\n",
                _ => "sentence1\tsentence2\tgold_label\na\tb\tentailment\n",
            };
            let dataset = load(task.name, text.as_bytes()).unwrap();
            let width = if let HeadKind::Classes(n) = task.head { n } else { 1 };
            let scores = dataset.score(&[vec![0.0; width]]);
            let names: Vec<_> = scores.0.iter().map(|s| s.0.as_str()).collect();
            assert_eq!(names, task.metrics, "{}", task.name);
            checked += 1;
        }
        assert_eq!(checked, 8);
    }

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "found {found}, expected {expected}");
    }

    #[test]
    fn classification_metrics_by_hand() {
        // Predicted 1 1 1 0 0 0 1 0, true 1 1 0 0 0 1 1 1:
        // tp = 3 (places 1, 2, 7), fp = 1 (3), tn = 2 (4, 5), fn = 2 (6, 8).
        let predicted = [1, 1, 1, 0, 0, 0, 1, 0].map(Some);
        let targets = [1, 1, 0, 0, 0, 1, 1, 1];
        // Accuracy (3 + 2) / 8.
        close(accuracy(&predicted, &targets), 62.5);
        // Precision 3/4, recall 3/5: F1 = 2 * 0.45 / 1.35 = 2/3.
        close(f1(&predicted, &targets), 200.0 / 3.0);
        // (3*2 - 1*2) / sqrt(4 * 5 * 3 * 4) = 4 / sqrt(240) = 0.2581988897.
        close(matthews(&predicted, &targets), 400.0 / 240f64.sqrt());
        // All wrong is -1; one class only is 0 / 0, taken as 0.
        close(matthews(&[Some(0), Some(1)], &[1, 0]), -100.0);
        close(matthews(&[Some(1), Some(1)], &[1, 0]), 0.0);
        close(f1(&[Some(0), Some(0)], &[0, 0]), 0.0);
    }

    #[test]
    fn outputs_that_are_not_numbers_are_wrong() {
        assert_eq!(largest(&[0.5, 2.0, 2.0]), Some(1), "the first of equal logits");
        assert_eq!(largest(&[f32::NAN, 2.0]), None);
        close(accuracy(&[None, Some(0)], &[0, 0]), 50.0);
        close(f1(&[None, Some(1)], &[1, 1]), 200.0 / 3.0);
        close(matthews(&[None, None], &[1, 0]), -100.0);
        close(pearson(&[f64::NAN, 1.0, 2.0], &[0.0, 1.0, 2.0]), 0.0);
        close(spearman(&[f64::NAN, 1.0, 2.0], &[0.0, 1.0, 2.0]), 0.0);
    }

    #[test]
    fn correlations_by_hand() {
        // x = 1 2 3 4, y = 2 1 4 5: means 2.5 and 3; sums of products
        // xy = (-1.5)(-1) + (-0.5)(-2) + (0.5)(1) + (1.5)(2) = 6, xx = 5, yy = 1 + 4 + 1 + 4 = 10:
        // r = 6 / sqrt(50) = 0.8485281374. Ranks of y are 2 1 3 4: 1 - 6 * (1 + 1) / (4 * 15) = 0.8.
        let (x, y) = ([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 5.0]);
        close(pearson(&x, &y), 600.0 / 50f64.sqrt());
        close(spearman(&x, &y), 80.0);
        // Ties share their mean rank: 1 2 2 3 has ranks 1 2.5 2.5 4; against 1 2 3 4:
        // xy = 1.5*1.5 + 0 + 0 + 1.5*1.5 = 4.5, xx = 4.5, yy = 5: r = 4.5 / sqrt(22.5).
        close(spearman(&[1.0, 2.0, 2.0, 3.0], &x), 450.0 / 22.5f64.sqrt());
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 3.0, 0.0]), [4.0, 2.0, 4.0, 4.0, 1.0]);
        // Ranks ignore a monotone change, a constant has no correlation.
        close(spearman(&[1.0, 10.0, 100.0], &[1.0, 2.0, 3.0]), 100.0);
        close(pearson(&[1.0, 1.0], &[1.0, 2.0]), 0.0);
        close(pearson(&[-1.0, -2.0, -3.0], &[1.0, 2.0, 3.0]), -100.0);
    }
}
