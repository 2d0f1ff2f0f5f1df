//! What a packed model says about texts: labels, values, answers or embeddings.

use std::ops::Range;

use gpusq_tensor::Device;

use crate::arch::labels;
use crate::engine::Engine;
use crate::evaluate::{Failure, not_finite, outputs};
use crate::model::Model;
use crate::spec::Head;
use crate::task::squad::Reading;
use crate::task::{Example, HeadKind, Target, Task, Tokenizer, task};
use crate::{Error, Result};

/// A packed model with its tokenizer. It may serve any number of threads at once.
pub struct Predictor {
    engine: Engine,
    tokenizer: Tokenizer,
    head: Option<HeadKind>,
    /// What it was trained on, if that is known here.
    task: Option<&'static Task>,
    labels: Vec<String>,
    max_length: usize,
    /// Rows of the model's table of tokens.
    vocabulary: usize,
}

/// One input, tokenised.
pub struct Prepared {
    examples: Vec<Example>,
    /// Where an answer is looked for.
    reading: Option<Reading>,
    dropped: usize,
}

impl Prepared {
    /// Tokens at the end that the model does not read, because the text, or the question, is longer than it takes. The contexts
    /// of questions are read whole, in windows.
    pub fn dropped(&self) -> usize {
        self.dropped
    }
}

/// What the model says about one input.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// A classifier's probability of each of [`Predictor::labels`].
    Classes(Vec<f32>),
    /// A regression's value.
    Value(f32),
    /// Where in the context the answer stands.
    Span {
        /// Bytes of the context; empty where the context has no tokens.
        span: Range<usize>,
        /// Probability of its first token times that of its last one, in their window.
        probability: f32,
    },
    /// Mean of the last hidden states over the input's tokens, of length 1 (as sentence-transformers does for MiniLM).
    Embedding(Vec<f32>),
}

impl Predictor {
    /// Prepares a packed model for `device`. Inputs are cut to `max_length` tokens, or to what the model was trained
    /// with, as far as it takes so many; contexts of questions are read in windows of that length.
    ///
    /// # Errors
    /// As [`Engine::load`]; a tokenizer that does not fit the model; a length that the model does not take.
    pub fn new(
        model: &Model,
        tokenizer: Tokenizer,
        device: Device,
        max_length: Option<usize>,
    ) -> Result<Predictor> {
        let (limit, vocabulary) = (model.spec.max_length(), model.spec.vocab);
        if let Some(asked) = max_length.filter(|n| *n > limit) {
            let message = format!(
                "a length of {asked} was asked for and the model takes {limit} tokens; use at most {limit}"
            );
            return Err(Error::Mismatch(message));
        }
        if tokenizer.vocab_size() > vocabulary {
            return Err(Error::Mismatch(format!(
                "the tokenizer has {} entries and the model's vocabulary {vocabulary}; use the tokenizer the model was \
                 trained with",
                tokenizer.vocab_size()
            )));
        }
        let head = match &model.spec.head {
            Head::Classify { outputs: 1, .. } => Some(HeadKind::Value),
            Head::Classify { outputs, .. } => Some(HeadKind::Classes(*outputs)),
            Head::Span => Some(HeadKind::Span),
            Head::None | Head::LanguageModel { .. } => None,
        };
        let mut labels = labels(&model.config);
        if let Some(HeadKind::Classes(n)) = head
            && labels.len() != n
        {
            labels = (0..n).map(|i| format!("LABEL_{i}")).collect();
        }
        Ok(Predictor {
            engine: Engine::load(model, device)?,
            tokenizer,
            head,
            task: model.task.as_deref().and_then(|name| task(name).ok()),
            labels,
            vocabulary,
            max_length: max_length.or(model.max_length).unwrap_or(limit).min(limit),
        })
    }

    /// What is odd about the tokenizer, if anything is: one of another model often has fewer entries. A few rows more than
    /// entries are padding.
    pub fn note(&self) -> Option<String> {
        const PADDING: usize = 128;
        let entries = self.tokenizer.vocab_size();
        (entries + PADDING < self.vocabulary).then(|| {
            format!(
                "the tokenizer has {entries} entries and the model's vocabulary {}; is it the model's own?",
                self.vocabulary
            )
        })
    }

    /// What runs the model.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The head; `None` for a model without one, which gives embeddings.
    pub fn head(&self) -> Option<HeadKind> {
        self.head
    }

    /// Names of a classifier's outputs, in their order.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// Tokenises a text, or a pair of texts; for a model that answers questions, a question and its context.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a question without a context, for one text where the model was trained on pairs and the other
    /// way round, and for text that the tokenizer cannot express.
    pub fn prepare(&self, text: &str, pair: Option<&str>) -> Result<Prepared> {
        if self.head == Some(HeadKind::Span) {
            let context = pair.ok_or_else(|| {
                Error::Mismatch(
                    "the model answers questions, and there is no context to look for an answer in".into(),
                )
            })?;
            let mut reading = Reading::new(&self.tokenizer, text, context, self.max_length)?;
            let examples = std::mem::take(&mut reading.examples);
            let dropped = reading.dropped;
            return Ok(Prepared { examples, reading: Some(reading), dropped });
        }
        if let Some(task) = self.task
            && (task.texts() == 2) != pair.is_some()
        {
            let [wanted, found] =
                if task.texts() == 2 { ["pairs of texts", "one"] } else { ["one text", "two"] };
            let (name, write) = (task.name, if task.texts() == 2 { "both" } else { "one" });
            return Err(Error::Mismatch(format!(
                "the model was trained on {wanted} ({name}), and this is {found}; give {write}"
            )));
        }
        let encoded = self.tokenizer.encode(text, pair, self.max_length)?;
        let example = Example { ids: encoded.ids, types: encoded.types, target: Target::None };
        Ok(Prepared { examples: vec![example], reading: None, dropped: encoded.dropped })
    }

    /// What the model says about each of `inputs`. They are batched by length, `batch` at a time.
    ///
    /// # Errors
    /// What a GPU meets; outputs that are not finite.
    pub fn answers(&self, inputs: &[Prepared], batch: usize) -> Result<Vec<Answer>> {
        let examples: Vec<Example> = inputs.iter().flat_map(|p| p.examples.iter().cloned()).collect();
        let run = |inputs: &crate::inputs::Inputs| self.engine.run(inputs);
        let results = outputs(&run, &examples, self.head, batch, self.tokenizer.pad_id(), &mut |_| {});
        let results = results.map_err(|e| match e {
            Failure::NotFinite(_) => Error::Mismatch(not_finite("one of the texts")),
            Failure::Run(e) => e,
        })?;
        let mut rest = &results[..];
        let mut answers = Vec::with_capacity(inputs.len());
        for input in inputs {
            let (own, others) = rest.split_at(input.examples.len());
            rest = others;
            answers.push(self.answer(input, own));
        }
        Ok(answers)
    }

    fn answer(&self, input: &Prepared, outputs: &[Vec<f32>]) -> Answer {
        match (self.head, &input.reading) {
            (_, Some(reading)) => match reading.answer(outputs) {
                Some(found) => Answer::Span { span: found.span, probability: found.probability },
                None => Answer::Span { span: 0..0, probability: 0.0 },
            },
            (Some(HeadKind::Classes(_)), _) => Answer::Classes(softmax(&outputs[0])),
            (Some(_), _) => Answer::Value(outputs[0][0]),
            (None, _) => Answer::Embedding(pooled(&outputs[0], input.examples[0].ids.len())),
        }
    }
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|x| (x - most).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.iter().map(|p| p / sum).collect()
}

/// The mean of `tokens` hidden states, scaled to length 1.
fn pooled(hidden: &[f32], tokens: usize) -> Vec<f32> {
    let width = hidden.len() / tokens;
    let mut mean = vec![0.0f64; width];
    for row in hidden.chunks_exact(width) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x));
    }
    let length = mean.iter().map(|m| m * m).sum::<f64>().sqrt().max(f64::from(f32::MIN_POSITIVE));
    mean.iter().map(|m| (m / length) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embeddings_are_means_of_length_one() {
        // Means 3 and 4.
        assert_eq!(pooled(&[2.0, 4.0, 4.0, 4.0], 2), [0.6, 0.8]);
        assert_eq!(pooled(&[0.0, 0.0], 1), [0.0, 0.0]);
    }

    #[test]
    fn probabilities_sum_to_one_however_large_the_logits_are() {
        let p = softmax(&[1000.0, 1000.0, -1000.0]);
        assert_eq!(p, [0.5, 0.5, 0.0]);
    }
}
