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

use super::tokenize::{Encoded, Pieces};
use super::{Dataset, Example, HeadKind, Reader, Scores, Split, Target, Task, Tokenizer};
use crate::{Error, Result, textfile};

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
    /// The question and the context.
    fn texts(&self) -> usize {
        2
    }

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
        let count = questions.len();
        let scorer = move |_: &[Example], outputs: &[Vec<f32>]| score(&contexts, &questions, outputs);
        Ok(Dataset { count, ..Dataset::new(task.name, split, task.head, examples, scorer) })
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
    let bytes = textfile::bytes(path)?;
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

/// A question about a text, in the windows that a model reads.
pub struct Reading {
    context: Context,
    windows: Vec<Window>,
    /// One for each window.
    pub examples: Vec<Example>,
    /// Tokens of the question that had no room.
    pub dropped: usize,
}

/// The best answer to a [`Reading`].
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Bytes of the context.
    pub span: Range<usize>,
    /// Probability of its start among the starts of its window's context, times that of its end.
    pub probability: f32,
}

impl Reading {
    /// Tokenises a question and its context; windows have at most `max_len` tokens.
    ///
    /// # Errors
    /// A `max_len` without room for text, and text that the tokenizer cannot express.
    pub fn new(tokenizer: &Tokenizer, question: &str, context: &str, max_len: usize) -> Result<Reading> {
        let (context, ids) = tokenised(tokenizer, context.to_string())?;
        let (windows, dropped) = in_windows(tokenizer, question, &ids, max_len)?;
        let (windows, encoded): (Vec<_>, Vec<_>) = windows.into_iter().unzip();
        let example = |e: Encoded| Example { ids: e.ids, types: e.types, target: Target::None };
        Ok(Reading { context, windows, examples: encoded.into_iter().map(example).collect(), dropped })
    }

    /// The answer that the logits of [`Reading::examples`] give, as [`Dataset::score`] takes them; `None` where the
    /// context has no tokens.
    pub fn answer(&self, outputs: &[Vec<f32>]) -> Option<Found> {
        let best = best(&self.windows, outputs)?;
        let window = &self.windows[best.window];
        let (starts, ends) = outputs[best.window].split_at(outputs[best.window].len() / 2);
        let probability = |logits: &[f32], at: usize| {
            let here = &logits[window.at..window.at + window.tokens.len()];
            let at = here[at - window.tokens.start];
            1.0 / here.iter().map(|x| (x - at).exp()).sum::<f32>()
        };
        let span = self.context.spans[best.start].start..self.context.spans[best.end].end;
        let probability = probability(starts, best.start) * probability(ends, best.end);
        Some(Found { span, probability })
    }
}

/// A text with its tokens.
fn tokenised(tokenizer: &Tokenizer, text: String) -> Result<(Context, Vec<u32>)> {
    let Pieces { ids, mut spans } = tokenizer.pieces(&text)?;
    keep_accents(&text, &mut spans);
    Ok((Context { text, spans }, ids))
}

/// A question with each window of a context's tokens `ids`, and how many of the question's tokens had no room.
fn in_windows(
    tokenizer: &Tokenizer,
    question: &str,
    ids: &[u32],
    max_len: usize,
) -> Result<(Vec<(Window, Encoded)>, usize)> {
    // `run_qa.py` drops the white space that some questions begin with.
    let question = tokenizer.pieces(question.trim_start())?.ids;
    let room = tokenizer.room(true, max_len)?;
    // No published question is that long; without a limit one could leave its context no room.
    let dropped = question.len().saturating_sub(room / 2);
    let question = &question[..question.len() - dropped];
    let window = |tokens: Range<usize>| {
        let encoded = tokenizer.join(question, Some(&ids[tokens.clone()]));
        (Window { at: encoded.second.start, tokens }, encoded)
    };
    Ok((windows(ids.len(), room - question.len()).into_iter().map(window).collect(), dropped))
}

type Prepared = (Vec<String>, Vec<Window>, Vec<Example>);

/// Tokenises a paragraph once and makes the windows of each of its questions.
fn prepare(
    path: &Path,
    paragraph: Paragraph,
    tokenizer: &Tokenizer,
    max_len: usize,
) -> Result<(Context, Vec<Prepared>)> {
    let (context, ids) = tokenised(tokenizer, paragraph.context)?;
    let Context { text, spans } = &context;
    let mut prepared = Vec::with_capacity(paragraph.qas.len());
    for asked in paragraph.qas {
        let answers = asked
            .answers
            .iter()
            .map(|answer| place(text, answer))
            .collect::<std::result::Result<Vec<_>, String>>()
            .map_err(|m| Error::file(path, format!("question {}: {m}", asked.id)))?;
        let Some(answer) = answers.first() else {
            let message = format!(
                "question {} has no answer; SQuAD 1.1 has one for every question (SQuAD 2.0 is another task)",
                asked.id
            );
            return Err(Error::file(path, message));
        };
        let answer = covering(spans, answer);
        let mut examples = Vec::new();
        let mut in_context = Vec::new();
        for (window, encoded) in in_windows(tokenizer, &asked.question, &ids, max_len)?.0 {
            let Window { at, ref tokens } = window;
            let target = match &answer {
                Some(a) if tokens.start <= a.start && a.end <= tokens.end => Target::Span {
                    start: (at + a.start - tokens.start) as u32,
                    end: (at + a.end - 1 - tokens.start) as u32,
                },
                _ => Target::Span { start: 0, end: 0 },
            };
            examples.push(Example { ids: encoded.ids, types: encoded.types, target });
            in_context.push(window);
        }
        let golds = asked.answers.into_iter().map(|a| a.text).collect();
        prepared.push((golds, in_context, examples));
    }
    Ok((context, prepared))
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

/// The text of the best answer over all windows of a question; empty if there is none.
fn answer<'a>(context: &'a Context, windows: &[Window], outputs: &[Vec<f32>]) -> &'a str {
    best(windows, outputs).map_or("", |b| {
        let (start, end) = (context.spans[b.start].start, context.spans[b.end].end);
        context.text.get(start..end).unwrap_or_default()
    })
}

/// First and last token of an answer among the context's, and the window it was found in.
struct Best {
    score: f32,
    window: usize,
    start: usize,
    end: usize,
}

/// The best answer over all windows of a question: the span of context tokens with the largest sum of start
/// and end logit, among each window's [`BEST`] starts and ends, at most [`LONGEST`] tokens long.
fn best(windows: &[Window], outputs: &[Vec<f32>]) -> Option<Best> {
    let mut best: Option<Best> = None;
    for (i, (window, logits)) in windows.iter().zip(outputs).enumerate() {
        let (starts, ends) = logits.split_at(logits.len() / 2);
        let here = window.at..window.at + window.tokens.len();
        let (starts, ends) = (&starts[here.clone()], &ends[here]);
        let last = top(ends);
        for s in top(starts) {
            for &e in &last {
                let score = starts[s] + ends[e];
                let fits = s <= e && e - s < LONGEST && !score.is_nan();
                if fits && best.as_ref().is_none_or(|b| score > b.score) {
                    let (start, end) = (window.tokens.start + s, window.tokens.start + e);
                    best = Some(Best { score, window: i, start, end });
                }
            }
        }
    }
    best
}

/// Places of the [`BEST`] largest logits, largest first, equal ones in their order; those that are not a
/// number are left out.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::tests::{minilm, shared, tiny};
    use super::super::{TASKS, task};
    use super::*;

    /// A question's id, its text, and its answers as (text, start).
    type Asking<'a> = (&'a str, &'a str, &'a [(&'a str, usize)]);

    /// A file with one paragraph.
    fn file(context: &str, asked: &[Asking]) -> String {
        let qas: Vec<_> = asked
            .iter()
            .map(|(id, question, answers)| {
                let answers: Vec<_> =
                    answers.iter().map(|(t, s)| json!({"text": t, "answer_start": s})).collect();
                json!({"id": id, "question": question, "answers": answers})
            })
            .collect();
        json!({"version": "1.1", "data": [{"title": "x", "paragraphs": [{"context": context, "qas": qas}]}]})
            .to_string()
    }

    fn load(text: &str, max_len: usize) -> Result<Dataset> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("dev-v1.1.json"), text).unwrap();
        task("squad").unwrap().load(dir.path(), Split::Dev, &tiny(), max_len)
    }

    /// Logits that point at the targets of `dataset`; windows without the answer point nowhere.
    fn right(dataset: &Dataset) -> Vec<Vec<f32>> {
        let output = |e: &Example| {
            let n = e.ids.len();
            let mut logits = vec![0.0; 2 * n];
            if let Target::Span { start, end } = e.target {
                logits[start as usize] = 9.0;
                logits[n + end as usize] = 9.0;
            }
            logits
        };
        dataset.examples.iter().map(output).collect()
    }

    #[test]
    fn question_first_then_the_context_and_the_answer_by_tokens() {
        let text = file("The cats sat. A dog sat.", &[("q1", "  Who sat?", &[("cats", 4), ("A dog", 14)])]);
        let dataset = load(&text, 384).unwrap();
        // [CLS] who sat ? [SEP] the cat ##s sat . a dog sat . [SEP]
        assert_eq!(dataset.examples[0].ids, [2, 14, 12, 15, 3, 5, 6, 11, 12, 13, 9, 7, 12, 13, 3]);
        assert_eq!(dataset.examples[0].types, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
        assert_eq!(dataset.examples[0].target, Target::Span { start: 6, end: 7 });
        let scores = dataset.score(&right(&dataset));
        assert_eq!(scores.0, [("f1".to_owned(), 100.0), ("exact_match".to_owned(), 100.0)]);
        // Pointing at "A dog" is right too, by the second gold.
        let mut other = vec![0.0; 30];
        (other[10], other[15 + 11]) = (9.0, 9.0);
        assert_eq!(dataset.score(&[other]).main(), 100.0);
    }

    #[test]
    fn only_spans_of_context_tokens_count() {
        let text = file("the cats sat", &[("q1", "who?", &[("cat", 4)])]);
        let dataset = load(&text, 384).unwrap();
        // [CLS] who ? [SEP] the cat ##s sat [SEP]: the largest logits lie outside the context, and the best
        // start (sat) comes after the best end (cat).
        let starts = [50.0, 40.0, 0.0, 0.0, 1.0, 3.0, 0.0, 4.0, 60.0];
        let ends = [50.0, 40.0, 0.0, 0.0, 0.0, 4.0, 3.0, 1.0, 60.0];
        let outputs = [[starts, ends].concat()];
        // Best allowed: start cat (3) with end cat (4) = 7, against cat to ##s 6 and sat to sat 5.
        let scores = dataset.score(&outputs);
        assert_eq!((scores.main(), scores.get("exact_match")), (100.0, Some(100.0)));
        // Nothing but NaN: an empty answer, no panic.
        let scores = dataset.score(&[vec![f32::NAN; 18]]);
        assert_eq!((scores.main(), scores.get("exact_match")), (0.0, Some(0.0)));
    }

    #[test]
    fn answers_longer_than_thirty_tokens_are_not_given() {
        let context = ["cat"; 40].join(" ");
        let spans: Vec<_> = (0..40).map(|i| 4 * i..4 * i + 3).collect();
        let context = Context { text: context, spans };
        let window = Window { at: 2, tokens: 0..40 };
        let mut logits = vec![0.0; 2 * 43];
        logits[2] = 5.0;
        logits[43 + 2 + 30] = 5.0;
        // Token 0 to 30 is 31 tokens: the best allowed pair has one of the two logits.
        let found = answer(&context, std::slice::from_ref(&window), &[logits.clone()]);
        assert!(found.split(' ').count() <= 30);
        logits[43 + 2 + 30] = 0.0;
        logits[43 + 2 + 29] = 5.0;
        let found = answer(&context, &[window], &[logits]);
        assert_eq!(found.split(' ').count(), 30);
    }

    #[test]
    fn the_twenty_largest_in_order() {
        let logits: Vec<f32> = (0..50).map(|i| ((i * 7) % 25) as f32).collect();
        let mut all: Vec<usize> = (0..50).collect();
        all.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        assert_eq!(top(&logits), all[..20]);
        assert_eq!(top(&[1.0, f32::NAN, 2.0]), [2, 0]);
        assert!(top(&[]).is_empty());
    }

    #[test]
    fn long_contexts_become_overlapping_windows() {
        // 381 tokens for text, 11 of them the question: windows of 370 that start every 370 - 128.
        assert_eq!(windows(1000, 370), [0..370, 242..612, 484..854, 726..1000]);
        assert_eq!(windows(370, 370), vec![0..370]);
        assert_eq!(windows(0, 370), vec![0..0]);
        assert_eq!(windows(5, 2), [0..2, 1..3, 2..4, 3..5]);
        assert_eq!(windows(3, 1), [0..1, 1..2, 2..3]);

        let mut words = vec!["cat"; 40];
        words[30] = "dog";
        let context = words.join(" ");
        let dataset = load(&file(&context, &[("q1", "who", &[("dog", 120)])]), 24).unwrap();
        // 24 - 3 special - 1 question = 20 a window, every 20 - 10: 0..20, 10..30, 20..40.
        let targets: Vec<_> = dataset.examples.iter().map(|e| e.target).collect();
        let none = Target::Span { start: 0, end: 0 };
        assert_eq!(targets, [none, none, Target::Span { start: 13, end: 13 }]);
        assert_eq!(dataset.examples[2].ids[13], 7);
        assert_eq!(dataset.score(&right(&dataset)).main(), 100.0);
    }

    #[test]
    fn offsets_count_code_points() {
        // Before the answer: a combining accent, an emoji, a flag of two code points, CJK without spaces.
        let context = "cafe\u{301} \u{1f600}\u{1f1eb}\u{1f1f7} \u{6c34}\u{706b} the cat";
        let chars: Vec<char> = context.chars().collect();
        let at = |text: &str| {
            let wanted: Vec<char> = text.chars().collect();
            (0..chars.len()).find(|&i| chars[i..].starts_with(&wanted)).unwrap()
        };
        for (answer, expected) in [
            ("cat", vec![6]),
            ("\u{706b}", vec![19]),
            ("\u{6c34}\u{706b} the", vec![18, 19, 5]),
            ("cafe\u{301}", vec![16]),
        ] {
            let dataset = load(&file(context, &[("q1", "who?", &[(answer, at(answer))])]), 384).unwrap();
            let example = &dataset.examples[0];
            let Target::Span { start, end } = example.target else { unreachable!() };
            assert_eq!(example.ids[start as usize..=end as usize], expected, "{answer}");
            assert_eq!(dataset.score(&right(&dataset)).get("exact_match"), Some(100.0), "{answer}");
        }
    }

    #[test]
    fn malformed_files_are_refused() {
        let context = "the cat sat";
        let cases = [
            ("".to_owned(), "is empty"),
            ("{\"data\": [".to_owned(), "not in SQuAD 1.1's format: at `data`: EOF"),
            ("{\"data\": []} x".to_owned(), "trailing characters"),
            ("{\"data\": []}".to_owned(), "has no questions"),
            ("{}".to_owned(), "missing field `data`"),
            (
                r#"{"data": [{"paragraphs": [{"context": "a", "qas": []}, {"qas": []}]}]}"#.to_owned(),
                "at `data[0].paragraphs[1]`: missing field `context`",
            ),
            (
                file(context, &[("q1", "who", &[("cat", 4)])])
                    .replace("\"answer_start\":4", "\"answer_start\":-4"),
                "at `data[0].paragraphs[0].qas[0].answers[0].answer_start`: invalid value",
            ),
            (
                file(context, &[("q7", "who", &[("cat", 5)])]),
                "question q7: the answer `cat` is not at character 5 of the context, where `at ` is",
            ),
            (
                file(context, &[("q7", "who", &[("cat", 99)])]),
                "question q7: the answer `cat` is not at character 99",
            ),
            (file(context, &[("q8", "who", &[])]), "question q8 has no answer"),
        ];
        for (text, expected) in cases {
            let found = load(&text, 384).unwrap_err().to_string();
            assert!(found.contains("dev-v1.1.json") && found.contains(expected), "`{expected}`: `{found}`");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        std::fs::write(&path, b"{\"data\": [{\"paragraphs\": [{\"context\": \"\xff\"}]}]}").unwrap();
        let found = read(&path).map(|_| ()).unwrap_err().to_string();
        assert!(
            found.contains("x.json") && found.contains("paragraphs[0].context`: invalid unicode"),
            "{found}"
        );
        let squad = task("squad").unwrap();
        let found = squad.load(dir.path(), Split::Train, &tiny(), 384).unwrap_err().to_string();
        assert!(found.contains("train-v1.1.json is not here"), "{found}");
        let found = load(&file(context, &[("q1", "who", &[("cat", 4)])]), 4).unwrap_err().to_string();
        assert!(found.contains("use at least 5"), "{found}");
    }

    #[test]
    fn answers_are_normalised_as_officially() {
        // Expected values printed by `normalize_answer` of evaluate-v1.1.py.
        let cases = [
            ("The  Cat's an A+ (pet).", "cats pet"),
            ("a-the an", "athe"),
            ("the", ""),
            ("Another anthem, theatre", "another anthem theatre"),
            ("A\u{a0}dog\tthe\ncat", "dog cat"),
            ("the\u{2013}cat", "\u{2013}cat"),
            ("\u{c9}COLE d'\u{c9}t\u{e9}", "\u{e9}cole d\u{e9}t\u{e9}"),
            ("a\u{6c34}", "a\u{6c34}"),
            ("$1,000.50", "100050"),
            ("_the_", ""),
            ("a\u{bd} the\u{1c}an", "a\u{bd}"),
        ];
        for (text, expected) in cases {
            assert_eq!(normalize(text), expected, "{text}");
        }
    }

    #[test]
    fn exact_match_and_f1_by_hand() {
        let golds = |g: &[&str]| g.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        // Articles, case and punctuation do not count.
        assert_eq!(exact_match("the Cat!", &golds(&["A cat"])), 1.0);
        close(f1("the Cat!", &golds(&["A cat"])), 1.0);
        // "big red cat" against "red cat sat": two words shared, 2/3 each way.
        close(f1("big red cat", &golds(&["red cat sat"])), 2.0 / 3.0);
        assert_eq!(exact_match("big red cat", &golds(&["red cat sat"])), 0.0);
        // Repeated words count as often as both have them: shared "cat" once, precision 1/3, recall 1.
        close(f1("cat cat cat", &golds(&["cat"])), 0.5);
        // The best of several golds: 2 * 1 * 0.5 / 1.5 against 1, and an exact one.
        close(f1("cat", &golds(&["red cat", "dog"])), 2.0 / 3.0);
        close(f1("cat", &golds(&["red cat", "Cat."])), 1.0);
        assert_eq!(exact_match("cat", &golds(&["red cat", "Cat."])), 1.0);
        // An empty prediction has no word; one that normalises to nothing equals a gold that does, but the
        // official F1 of two empty answers is 0.
        assert_eq!((f1("", &golds(&["cat"])), exact_match("", &golds(&["cat"]))), (0.0, 0.0));
        assert_eq!((f1("the", &golds(&["a"])), exact_match("the", &golds(&["a"]))), (0.0, 1.0));
    }

    #[test]
    fn real_files_have_the_known_counts() {
        let Some(data) = shared("data/squad") else { return };
        let mut files = vec![(data.clone(), Split::Train, 10822), (data, Split::Dev, 1055)];
        if let Some(shifts) = shared("data/squadshifts") {
            files.push((shifts.join("new_wiki_v1.0.json"), Split::Dev, 7938));
            files.push((shifts.join("reddit_v1.0.json"), Split::Dev, 9803));
        }
        // A model that points at every label scores nearly 100: some answers begin or end within a word, and
        // a few are longer than 30 tokens.
        let tokenizer = minilm().map_or_else(tiny, |dir| Tokenizer::load(&dir).unwrap());
        let squad = TASKS.iter().find(|t| t.name == "squad").unwrap();
        for (path, split, count) in files {
            let questions = read(&find(&path, split).unwrap()).unwrap();
            assert_eq!(questions.iter().map(|p| p.qas.len()).sum::<usize>(), count, "{}", path.display());
            let dataset = squad.load(&path, split, &tokenizer, 384).unwrap();
            assert!(dataset.examples.len() >= count);
            assert!(dataset.examples.iter().all(|e| e.ids.len() <= 384));
            let scores = dataset.score(&right(&dataset));
            println!("{} {split}: {} windows, {scores}", path.display(), dataset.examples.len());
            assert!(scores.get("exact_match").unwrap() > 98.5 && scores.main() > 98.5, "{scores}");
        }
    }

    /// `run_qa.py` lets the tokenizers library cut the windows.
    #[test]
    fn windows_are_those_of_the_tokenizers_library() {
        let (Some(data), Some(dir)) = (shared("data/squad"), minilm()) else { return };
        let mut theirs = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
        theirs.with_padding(None);
        let truncation = tokenizers::TruncationParams {
            max_length: 384,
            strategy: tokenizers::TruncationStrategy::OnlySecond,
            stride: OVERLAP,
            ..Default::default()
        };
        theirs.with_truncation(Some(truncation)).unwrap();
        let mut expected = Vec::new();
        for paragraph in read(&find(&data, Split::Dev).unwrap()).unwrap() {
            for asked in paragraph.qas {
                let text = (asked.question.trim_start(), paragraph.context.as_str());
                let mut encoding = theirs.encode(text, true).unwrap();
                let more = encoding.take_overflowing();
                expected.extend([encoding].into_iter().chain(more).map(|e| e.get_ids().to_vec()));
            }
        }
        let ours =
            task("squad").unwrap().load(&data, Split::Dev, &Tokenizer::load(&dir).unwrap(), 384).unwrap();
        let ours: Vec<_> = ours.examples.into_iter().map(|e| e.ids).collect();
        assert!(ours.len() > 1055, "some context needs two windows");
        assert_eq!(ours, expected);
    }

    proptest! {
        /// Every span label covers the answer's text and nothing of another word, no window is too long, and
        /// some window has the answer if it fits.
        #[test]
        fn labels_cover_the_answer(
            words in prop::collection::vec("the|cats|dog|noir|水火|cafe\u{301}|\u{1f600}|Zürich", 1..60),
            pick in any::<prop::sample::Index>(),
            length in 1usize..4,
            max_len in 16usize..64,
        ) {
            let first = pick.index(words.len());
            let answer = words[first..words.len().min(first + length)].join(" ");
            let start: usize = words[..first].iter().map(|w| w.chars().count() + 1).sum();
            let context = words.join(" ");
            let tokenizer = tiny();
            let paragraph = Paragraph {
                context: context.clone(),
                qas: vec![Asked {
                    id: "q".into(),
                    question: "who was the dog?".into(),
                    answers: vec![Answer { text: answer.clone(), answer_start: start }],
                }],
            };
            let (kept, asked) = prepare(Path::new("x"), paragraph, &tokenizer, max_len).unwrap();
            let (_, windows, examples) = &asked[0];
            let mut found = false;
            for (window, example) in windows.iter().zip(examples) {
                prop_assert!(example.ids.len() <= max_len);
                let Target::Span { start, end } = example.target else { unreachable!() };
                if (start, end) == (0, 0) {
                    continue;
                }
                found = true;
                let token = |i: u32| kept.spans[window.tokens.start + i as usize - window.at].clone();
                prop_assert_eq!(&context[token(start).start..token(end).end], answer.as_str());
            }
            prop_assert!(found, "no window has the answer");
        }
    }
}
