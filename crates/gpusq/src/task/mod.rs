//! Tasks: reading a data set, turning its text into token ids, and scoring what a model outputs for it.
//!
//! Each task keeps its reader, the head it needs and its metric in one file; [`TASKS`] lists them.
//! [`Task::load`] gives a [`Dataset`], whose [`Dataset::score`] turns a model's outputs into [`Scores`].
//! Nothing here knows what model is trained or how.

pub mod glue;
pub mod squad;
pub mod synthetic;
pub mod tokenize;

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Serialize, Serializer};

pub use tokenize::Tokenizer;

use crate::{Error, Result};

/// Every task, in the order help and reports list them.
pub const TASKS: &[Task] = &[
    glue::SST2,
    glue::COLA,
    glue::MRPC,
    glue::STSB,
    glue::RTE,
    glue::QQP,
    glue::QNLI,
    glue::MNLI,
    squad::SQUAD,
];

/// A task: what its data is, what head a model needs for it, and how it is read and scored.
pub struct Task {
    /// What the user types: lower-case letters and digits.
    pub name: &'static str,
    /// One line for help: the input, the question asked about it and the metrics.
    pub about: &'static str,
    /// The head a model needs.
    pub head: HeadKind,
    /// Class names in class order; empty unless the head is [`HeadKind::Classes`].
    pub labels: &'static [&'static str],
    /// Names of the metrics [`Dataset::score`] reports; the first is the main one, by which two models are
    /// compared.
    pub metrics: &'static [&'static str],
    /// Longest input, in tokens with special tokens, that published results for this task use.
    pub max_len: usize,
    /// Reads the data.
    pub(crate) reader: &'static dyn Reader,
}

/// Reads one task's files.
pub(crate) trait Reader: Sync {
    /// As [`Task::texts`].
    fn texts(&self) -> usize;

    /// As [`Task::load`]; `task` is the entry of [`TASKS`] that names this reader.
    fn load(
        &self,
        task: &'static Task,
        data: &Path,
        split: Split,
        tokenizer: &Tokenizer,
        max_len: usize,
    ) -> Result<Dataset>;
}

impl Task {
    /// Texts of an input: 1, or 2 for a pair.
    pub fn texts(&self) -> usize {
        self.reader.texts()
    }

    /// Reads and tokenises one split.
    ///
    /// `data` is the folder that holds the task's files, or for GLUE the folder that holds the task's
    /// folder; for SQuAD it may also be one JSON file. `max_len` is the longest example in tokens, special
    /// tokens included: longer text is truncated (GLUE) or read in overlapping windows (SQuAD).
    ///
    /// # Errors
    /// A missing, empty or malformed file, with its name and the line, column or JSON path; a `max_len` that
    /// leaves no room for text.
    pub fn load(
        &'static self,
        data: &Path,
        split: Split,
        tokenizer: &Tokenizer,
        max_len: usize,
    ) -> Result<Dataset> {
        let dataset = self.reader.load(self, data, split, tokenizer, max_len)?;
        Ok(Dataset { max_length: Some(max_len), ..dataset })
    }
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Task({})", self.name)
    }
}

/// The task called `name`. Case, `-` and `_` do not matter, so GLUE's folder names work too (`SST-2`).
///
/// # Errors
/// [`Error::Config`] that names the nearest task and lists all of them.
pub fn task(name: &str) -> Result<&'static Task> {
    let wanted: String =
        name.chars().filter(|c| !matches!(c, '-' | '_')).flat_map(char::to_lowercase).collect();
    TASKS.iter().find(|t| t.name == wanted).ok_or_else(|| {
        let near = TASKS.iter().map(|t| t.name).min_by_key(|n| strsim::damerau_levenshtein(n, &wanted));
        let all: Vec<_> = TASKS.iter().map(|t| t.name).collect();
        Error::Config(format!(
            "there is no task `{name}`; did you mean `{}`? Tasks: {}",
            near.unwrap_or_default(),
            all.join(", ")
        ))
    })
}

/// The kind of head a task needs on top of the encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadKind {
    /// One logit per class, for the whole input.
    Classes(usize),
    /// One number for the whole input.
    Value,
    /// A start logit and an end logit for each token.
    Span,
}

/// Part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// The part to train on.
    Train,
    /// The labelled part to evaluate on.
    Dev,
}

impl FromStr for Split {
    type Err = Error;

    /// `train`, or `dev` or `validation`.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "train" => Ok(Split::Train),
            "dev" | "validation" => Ok(Split::Dev),
            _ => Err(Error::Config(format!("there is no split `{text}`; use train or dev"))),
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Split::Train => "train",
            Split::Dev => "dev",
        })
    }
}

/// What a model should output for one example.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// A class, counted from 0 in the order of [`Task::labels`].
    Class(u32),
    /// A number, in the task's own unit (STS-B: similarity from 0 to 5).
    Value(f32),
    /// First and last token of the answer, as positions in [`Example::ids`]. Both are 0, the place of the
    /// classification token, where the answer is not among the tokens.
    Span {
        /// First token.
        start: u32,
        /// Last token, inclusive.
        end: u32,
    },
    /// Unknown.
    None,
}

/// One model input.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Token ids with special tokens, no padding.
    pub ids: Vec<u32>,
    /// Segment of each token (0 or 1), as long as `ids`; all 0 for tokenizers without segments.
    pub types: Vec<u32>,
    /// What a model should output for it.
    pub target: Target,
}

type Scorer = dyn Fn(&[Example], &[Vec<f32>]) -> Scores + Send + Sync;

/// One split of a task, tokenised, with what is needed to score a model on it.
#[derive(Clone)]
pub struct Dataset {
    /// Name of the task.
    pub name: &'static str,
    /// Which part of the data this is.
    pub split: Split,
    /// Head a model needs for it.
    pub head: HeadKind,
    /// Model inputs in file order. For SQuAD one question gives as many as its context has windows. Scoring
    /// relies on their number and order: train on a copy to drop or shuffle some.
    pub examples: Vec<Example>,
    /// What people count: the questions of SQuAD, the examples of other tasks.
    pub count: usize,
    /// Tokens that [`Task::load`] was told to keep examples within; `None` for other data.
    pub max_length: Option<usize>,
    /// What the user should know about the data, such as skipped rows; one sentence each.
    pub notes: Vec<String>,
    scorer: Arc<Scorer>,
}

impl Dataset {
    /// A data set whose outputs `scorer` scores; it is given the examples and, in the same order, the
    /// outputs, already checked as [`Dataset::score`] says.
    pub fn new(
        name: &'static str,
        split: Split,
        head: HeadKind,
        examples: Vec<Example>,
        scorer: impl Fn(&[Example], &[Vec<f32>]) -> Scores + Send + Sync + 'static,
    ) -> Self {
        let count = examples.len();
        Dataset {
            name,
            split,
            head,
            examples,
            count,
            max_length: None,
            notes: Vec::new(),
            scorer: Arc::new(scorer),
        }
    }

    /// Scores a model. `outputs[i]` are the logits of `examples[i]`, flat: for [`HeadKind::Classes`] one per
    /// class, for [`HeadKind::Value`] one, for [`HeadKind::Span`] a start logit for each of its tokens and
    /// then an end logit for each. A logit that is not a number never counts as right.
    ///
    /// Panics if the number of outputs or the length of one is wrong, a mistake of the caller.
    pub fn score(&self, outputs: &[Vec<f32>]) -> Scores {
        assert_eq!(outputs.len(), self.examples.len(), "one output for each example");
        for (i, (output, example)) in outputs.iter().zip(&self.examples).enumerate() {
            let expected = match self.head {
                HeadKind::Classes(n) => n,
                HeadKind::Value => 1,
                HeadKind::Span => 2 * example.ids.len(),
            };
            assert_eq!(output.len(), expected, "logits of example {i}");
        }
        (self.scorer)(&self.examples, outputs)
    }
}

/// Whether a classifier that gave `outputs` put all examples into one class, though they are of several. Its
/// score is then that of no model at all.
pub fn one_class(data: &Dataset, outputs: &[Vec<f32>]) -> bool {
    let class = |row: &Vec<f32>| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)));
    matches!(data.head, HeadKind::Classes(_))
        && outputs.windows(2).all(|w| class(&w[0]) == class(&w[1]))
        && data.examples.windows(2).any(|w| w[0].target != w[1].target)
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dataset({} {}, {} examples)", self.name, self.split, self.examples.len())
    }
}

/// Metrics by name, the main one first, in the units GLUE's and SQuAD's tables use: accuracy, F1 and exact
/// match in percent, Matthews, Pearson and Spearman coefficients times 100. As JSON, an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores(pub Vec<(String, f64)>);

impl Scores {
    /// The main metric. Panics if there are none, which no data set gives.
    pub fn main(&self) -> f64 {
        self.0[0].1
    }

    /// The metric called `name`.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }
}

impl fmt::Display for Scores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (name, value)) in self.0.iter().enumerate() {
            write!(f, "{}{name} {value:.2}", if i > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

impl Serialize for Scores {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::PathBuf;

    use super::*;

    /// A folder of the data kept beside the project; without it the test says what it skips.
    pub(super) fn shared(folder: &str) -> Option<PathBuf> {
        let root = std::env::var_os("GPUSQ_SHARED_DIR").map_or_else(
            || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared")),
            PathBuf::from,
        );
        let path = root.join(folder);
        if !path.is_dir() {
            println!("skipped: no {}; set GPUSQ_SHARED_DIR", path.display());
            return None;
        }
        Some(path)
    }

    /// The folder of a downloaded all-MiniLM-L6-v2; without it the test says what it skips.
    pub(super) fn minilm() -> Option<PathBuf> {
        let dir = std::env::var_os("GPUSQ_MINILM_DIR").map(PathBuf::from);
        if dir.is_none() {
            println!("skipped: set GPUSQ_MINILM_DIR to a folder with all-MiniLM-L6-v2");
        }
        dir
    }

    /// A WordPiece tokenizer that knows a few words.
    pub(super) fn tiny() -> Tokenizer {
        let vocab = [
            "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "\"", "a", "b", "##s", "sat",
            ".", "who", "?", "cafe", "noir", "\u{6c34}", "\u{706b}", "in", "was", "1", "##9", "##5", "##0",
        ];
        Tokenizer::word_piece(&vocab).unwrap()
    }

    #[test]
    fn every_task_is_named_once_and_documented() {
        let mut names = HashSet::new();
        for t in TASKS {
            assert!(names.insert(t.name), "{} twice", t.name);
            assert!(t.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()), "{}", t.name);
            assert!(t.about.contains(';'), "{}: input; metrics", t.name);
            assert!(!t.metrics.is_empty() && t.max_len > 0, "{}", t.name);
            let classes = if let HeadKind::Classes(n) = t.head { n } else { 0 };
            assert_eq!(t.labels.len(), classes, "{}", t.name);
            assert_eq!(task(t.name).unwrap().name, t.name);
        }
        assert_eq!(names.len(), 9);
    }

    #[test]
    fn tasks_are_found_by_glue_names_and_unknown_ones_name_the_nearest() {
        assert_eq!(task("SST-2").unwrap().name, "sst2");
        assert_eq!(task("STS-B").unwrap().name, "stsb");
        let error = task("sts2").unwrap_err().to_string();
        assert!(error.contains("there is no task `sts2`; did you mean `sst2`?"), "{error}");
        assert!(TASKS.iter().all(|t| error.contains(t.name)), "{error}");
    }

    #[test]
    fn splits_parse() {
        assert_eq!("train".parse::<Split>().unwrap(), Split::Train);
        assert_eq!("validation".parse::<Split>().unwrap(), Split::Dev);
        assert_eq!(Split::Dev.to_string().parse::<Split>().unwrap(), Split::Dev);
        let error = "test".parse::<Split>().unwrap_err().to_string();
        assert!(error.contains("use train or dev"), "{error}");
    }

    #[test]
    fn scores_print_and_serialise_in_order() {
        let scores = Scores(vec![("f1".into(), 90.125), ("exact_match".into(), 80.0)]);
        assert_eq!(scores.to_string(), "f1 90.12, exact_match 80.00");
        assert_eq!(serde_json::to_string(&scores).unwrap(), r#"{"f1":90.125,"exact_match":80.0}"#);
        assert_eq!((scores.main(), scores.get("exact_match"), scores.get("x")), (90.125, Some(80.0), None));
    }

    #[test]
    #[should_panic(expected = "logits of example 0")]
    fn outputs_of_another_width_are_a_mistake_of_the_caller() {
        let example = Example { ids: vec![1, 2], types: vec![0, 0], target: Target::None };
        let dataset = Dataset::new("x", Split::Dev, HeadKind::Span, vec![example], |_, _| Scores(Vec::new()));
        dataset.score(&[vec![0.0; 3]]);
    }
}
