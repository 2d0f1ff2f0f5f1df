//! SQuAD 1.1: the answer to a question is a span of a paragraph.
//!
//! Windows and labels follow HuggingFace's `run_qa.py` (question first, 128 tokens of overlap, the 20 best
//! starts and ends of each window, answers of up to 30 tokens); the metric is `evaluate-v1.1.py`.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Deserialize;
use unicode_categories::UnicodeCategories;

use super::tokenize::Pieces;
use super::{Dataset, Example, HeadKind, Reader, Scores, Split, Target, Task, Tokenizer};
use crate::{Error, Result};

/// SQuAD 1.1, and any file in its format.
pub const SQUAD: Task = Task {
    name: "squad",
    about: "the span of a paragraph that answers a question (SQuAD 1.1); F1, exact match",
    head: HeadKind::Span,
    labels: &[],
    metrics: &["f1", "exact_match"],
    max_len: 384,
    reader: &Squad,
};

/// Tokens that neighbouring windows of a context share (`doc_stride` of `run_qa.py`).
const OVERLAP: usize = 128;
/// Starts and ends tried in each window (`n_best_size`).
const BEST: usize = 20;
/// Longest answer in tokens (`max_answer_length`).
const LONGEST: usize = 30;

struct Squad;

#[derive(Deserialize)]
struct File {
    data: Vec<Article>,
}

#[derive(Deserialize)]
struct Article {
    paragraphs: Vec<Paragraph>,
}

#[derive(Deserialize)]
struct Paragraph {
    context: String,
    qas: Vec<Asked>,
}

#[derive(Deserialize)]
struct Asked {
    id: String,
    question: String,
    answers: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    text: String,
    /// In Unicode code points from the start of the context.
    answer_start: usize,
}

/// What scoring keeps of a paragraph.
struct Context {
    text: String,
    /// Byte range of each token in `text`.
    spans: Vec<Range<usize>>,
}

/// What scoring keeps of a question.
struct Question {
    context: usize,
    golds: Vec<String>,
    windows: Vec<Window>,
}

/// The part of a context that one example holds.
#[derive(Clone, Debug, PartialEq)]
struct Window {
    /// Place of its first context token in the example's ids.
    at: usize,
    /// Its tokens among the context's.
    tokens: Range<usize>,
}

impl Reader for Squad {
    fn load(
        &self,
        task: &'static Task,
        data: &Path,
        split: Split,
        tokenizer: &Tokenizer,
        max_len: usize,
    ) -> Result<Dataset> {
        let path = find(data, split)?;
        let paragraphs = read(&path)?;
        // Fails here rather than in each paragraph, and before any work.
        tokenizer.room(true, max_len)?;
        let parts: Vec<_> = paragraphs
            .into_par_iter()
            .map(|p| prepare(&path, p, tokenizer, max_len))
            .collect::<Vec<Result<_>>>();
        let (mut contexts, mut questions, mut examples) = (Vec::new(), Vec::new(), Vec::new());
        for part in parts {
            let (context, asked) = part?;
            for (golds, windows, inputs) in asked {
                questions.push(Question { context: contexts.len(), golds, windows });
                examples.extend(inputs);
            }
            contexts.push(context);
        }
        if questions.is_empty() {
            return Err(Error::file(&path, "has no questions; get the file again"));
        }
        let scorer = move |_: &[Example], outputs: &[Vec<f32>]| score(&contexts, &questions, outputs);
        Ok(Dataset::new(task.name, split, task.head, examples, scorer))
    }
}

/// The split's file in `data`, or `data` itself if it is a file.
fn find(data: &Path, split: Split) -> Result<PathBuf> {
    if data.is_file() {
        return Ok(data.to_path_buf());
    }
    let name = format!("{split}-v1.1.json");
    let path = data.join(&name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::file(
        data,
        format!("{name} is not here; give the folder that holds it, or a file in its format"),
    ))
}

fn read(path: &Path) -> Result<Vec<Paragraph>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    if bytes.trim_ascii().is_empty() {
        return Err(Error::file(path, "is empty; get the file again"));
    }
    let mut json = serde_json::Deserializer::from_slice(&bytes);
    let file: File = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        Error::file(path, format!("not in SQuAD 1.1's format: at `{}`: {}", e.path(), e.inner()))
    })?;
    json.end().map_err(|e| Error::file(path, format!("not in SQuAD 1.1's format: {e}")))?;
    Ok(file.data.into_iter().flat_map(|a| a.paragraphs).collect())
}

type Prepared = (Vec<String>, Vec<Window>, Vec<Example>);

/// Tokenises a paragraph once and makes the windows of each of its questions.
fn prepare(
    path: &Path,
    paragraph: Paragraph,
    tokenizer: &Tokenizer,
    max_len: usize,
) -> Result<(Context, Vec<Prepared>)> {
    let text = paragraph.context;
    let Pieces { ids, mut spans } = tokenizer.pieces(&text)?;
    keep_accents(&text, &mut spans);
    let mut prepared = Vec::with_capacity(paragraph.qas.len());
    for asked in paragraph.qas {
        let answers = asked
            .answers
            .iter()
            .map(|answer| place(&text, answer))
            .collect::<std::result::Result<Vec<_>, String>>()
            .map_err(|m| Error::file(path, format!("question {}: {m}", asked.id)))?;
        let Some(answer) = answers.first() else {
            let message = format!(
                "question {} has no answer; SQuAD 1.1 has one for every question (SQuAD 2.0 is another task)",
                asked.id
            );
            return Err(Error::file(path, message));
        };
        let answer = covering(&spans, answer);
        // `run_qa.py` drops the white space that some questions begin with.
        let question = tokenizer.pieces(asked.question.trim_start())?.ids;
        let room = tokenizer.room(true, max_len)?;
        // No published question is that long; without a limit one could leave its context no room.
        let question = &question[..question.len().min(room / 2)];
        let mut examples = Vec::new();
        let mut in_context = Vec::new();
        for tokens in windows(ids.len(), room - question.len()) {
            let encoded = tokenizer.join(question, Some(&ids[tokens.clone()]));
            let at = encoded.second.start;
            let target = match &answer {
                Some(a) if tokens.start <= a.start && a.end <= tokens.end => Target::Span {
                    start: (at + a.start - tokens.start) as u32,
                    end: (at + a.end - 1 - tokens.start) as u32,
                },
                _ => Target::Span { start: 0, end: 0 },
            };
            examples.push(Example { ids: encoded.ids, types: encoded.types, target });
            in_context.push(Window { at, tokens });
        }
        let golds = asked.answers.into_iter().map(|a| a.text).collect();
        prepared.push((golds, in_context, examples));
    }
    Ok((Context { text, spans }, prepared))
}

/// Extends each token over the combining marks behind it. A lower-casing tokenizer drops them, and without
/// them an answer cut out of the text would lose its last accent.
fn keep_accents(text: &str, spans: &mut [Range<usize>]) {
    for i in 0..spans.len() {
        let next = spans.get(i + 1).map_or(text.len(), |s| s.start);
        let end = spans[i].end;
        if end < next {
            let marks = text[end..next].chars().take_while(|c| c.is_mark_nonspacing());
            spans[i].end += marks.map(char::len_utf8).sum::<usize>();
        }
    }
}

/// Byte range of an answer in its context, checked against the answer's text.
fn place(context: &str, answer: &Answer) -> std::result::Result<Range<usize>, String> {
    let start = context.char_indices().map(|(i, _)| i).chain([context.len()]).nth(answer.answer_start);
    match start {
        Some(start) if context[start..].starts_with(&answer.text) => Ok(start..start + answer.text.len()),
        _ => {
            let found: String =
                context.chars().skip(answer.answer_start).take(answer.text.chars().count()).collect();
            Err(format!(
                "the answer `{}` is not at character {} of the context, where `{found}` is; repair or remove \
                 the question",
                answer.text, answer.answer_start
            ))
        }
    }
}

/// The fewest tokens that cover `answer`; `None` if no token touches it.
fn covering(spans: &[Range<usize>], answer: &Range<usize>) -> Option<Range<usize>> {
    let touches = |s: &Range<usize>| s.start < answer.end && answer.start < s.end;
    let first = spans.iter().position(touches)?;
    let last = spans.iter().rposition(touches)?;
    Some(first..last + 1)
}

/// Windows of at most `room` tokens over a context of `len`, [`OVERLAP`] shared between neighbours, or half
/// a window where that is less.
fn windows(len: usize, room: usize) -> Vec<Range<usize>> {
    let step = room - OVERLAP.min(room / 2);
    let mut all = Vec::new();
    let mut start = 0;
    loop {
        let end = len.min(start + room);
        all.push(start..end);
        if end == len {
            return all;
        }
        start += step;
    }
}

/// Mean F1 and exact match over questions, in percent.
fn score(contexts: &[Context], questions: &[Question], outputs: &[Vec<f32>]) -> Scores {
    let first: Vec<usize> = questions
        .iter()
        .scan(0, |next, q| {
            *next += q.windows.len();
            Some(*next - q.windows.len())
        })
        .collect();
    let per_question: Vec<(f64, f64)> = questions
        .par_iter()
        .zip(first)
        .map(|(q, first)| {
            let text = answer(&contexts[q.context], &q.windows, &outputs[first..first + q.windows.len()]);
            (f1(text, &q.golds), exact_match(text, &q.golds))
        })
        .collect();
    let mean = |sum: f64| 100.0 * sum / questions.len() as f64;
    Scores(vec![
        ("f1".into(), mean(per_question.iter().map(|s| s.0).sum())),
        ("exact_match".into(), mean(per_question.iter().map(|s| s.1).sum())),
    ])
}

/// The best answer over all windows of a question: the span of context tokens with the largest sum of start
/// and end logit, among each window's [`BEST`] starts and ends, at most [`LONGEST`] tokens long. Empty if
/// there is none.
fn answer<'a>(context: &'a Context, windows: &[Window], outputs: &[Vec<f32>]) -> &'a str {
    let mut best: Option<(f32, usize, usize)> = None;
    for (window, logits) in windows.iter().zip(outputs) {
        let (starts, ends) = logits.split_at(logits.len() / 2);
        let here = window.at..window.at + window.tokens.len();
        let (starts, ends) = (&starts[here.clone()], &ends[here]);
        let last = top(ends);
        for s in top(starts) {
            for &e in &last {
                let score = starts[s] + ends[e];
                let fits = s <= e && e - s < LONGEST && !score.is_nan();
                if fits && best.is_none_or(|b| score > b.0) {
                    best = Some((score, window.tokens.start + s, window.tokens.start + e));
                }
            }
        }
    }
    best.map_or("", |(_, s, e)| {
        let (start, end) = (context.spans[s].start, context.spans[e].end);
        context.text.get(start..end).unwrap_or_default()
    })
}

/// Places of the [`BEST`] largest logits, largest first, equal ones in their order; none that is not a number.
fn top(logits: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).filter(|&i| !logits[i].is_nan()).collect();
    let by = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if order.len() > BEST {
        order.select_nth_unstable_by(BEST, by);
        order.truncate(BEST);
    }
    order.sort_unstable_by(by);
    order
}

/// An answer as `evaluate-v1.1.py` compares it: lower case, without ASCII punctuation, without the words
/// a, an and the, and with single spaces.
pub fn normalize(text: &str) -> String {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    // Python's `\b` lies between a letter, number or `_` and anything else; its `split` also takes the four
    // ASCII separators as white space.
    let in_word = |c: char| c.is_letter() || c.is_number();
    let is_space = |c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c);
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|c| !in_word(c)).unwrap_or(rest.len());
        if word == 0 {
            kept.push(if is_space(first) { ' ' } else { first });
            rest = &rest[first.len_utf8()..];
        } else {
            kept.push_str(if matches!(&rest[..word], "a" | "an" | "the") { " " } else { &rest[..word] });
            rest = &rest[word..];
        }
    }
    kept.split(' ').filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ")
}

/// 1 if the normalised prediction equals one of the normalised answers, else 0 (`exact_match_score`).
pub fn exact_match(predicted: &str, golds: &[String]) -> f64 {
    let predicted = normalize(predicted);
    f64::from(u8::from(golds.iter().any(|g| normalize(g) == predicted)))
}

/// The largest F1, from 0 to 1, between the words of the normalised prediction and those of one of the
/// answers, counted with multiplicity; 0 where they share no word, so also for two empty ones (`f1_score`).
pub fn f1(predicted: &str, golds: &[String]) -> f64 {
    let predicted = normalize(predicted);
    golds.iter().map(|g| word_f1(&predicted, &normalize(g))).fold(0.0, f64::max)
}

fn word_f1(predicted: &str, gold: &str) -> f64 {
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in gold.split_whitespace() {
        *left.entry(word).or_default() += 1;
    }
    let mut shared = 0;
    for word in predicted.split_whitespace() {
        if let Some(n) = left.get_mut(word).filter(|n| **n > 0) {
            *n -= 1;
            shared += 1;
        }
    }
    if shared == 0 {
        return 0.0;
    }
    let precision = f64::from(shared) / predicted.split_whitespace().count() as f64;
    let recall = f64::from(shared) / gold.split_whitespace().count() as f64;
    2.0 * precision * recall / (precision + recall)
}
