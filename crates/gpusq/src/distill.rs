//! The mixed loss (paper, equations 6 and 7, algorithm 1):
//! `L = alpha * hard + beta * soft + gamma * feature`.

use gpusq_tensor::ops::add::{accumulate, add};
use gpusq_tensor::ops::cross_entropy::cross_entropy;
use gpusq_tensor::ops::kl_divergence::kl_divergence;
use gpusq_tensor::ops::mse::mse;
use gpusq_tensor::ops::select::select_column;
use gpusq_tensor::ops::weighted_sum::weighted_sum;
use gpusq_tensor::{Device, Flags, Tape, Tensor, Var};

use crate::forward::{Output, TapSet, Taps, Tokens};

/// Weights of the loss terms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    /// Weight of the hard loss: labels, or the teacher's argmax where there are none.
    pub alpha: f32,
    /// Weight of the soft loss: KL(teacher || student) of the logits.
    pub beta: f32,
    /// Weight of the feature loss: mean squared errors of block outputs and of the final projection.
    pub gamma: f32,
    /// Temperature of the soft loss.
    pub temperature: f32,
    /// The feature loss counts attention outputs too.
    pub attention_features: bool,
}

impl Mix {
    /// Labels only: no teacher.
    pub const HARD: Mix =
        Mix { alpha: 1.0, beta: 0.0, gamma: 0.0, temperature: 1.0, attention_features: false };

    /// The taps that student and teacher must keep for this mix.
    pub fn taps(&self) -> TapSet {
        let features = self.gamma != 0.0;
        TapSet { blocks: features, attention: features && self.attention_features, linears: false }
    }
}

/// What a batch's outputs should be.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// One class per sequence, -100 for none.
    Classes(Vec<i32>),
    /// One number per sequence.
    Values(Vec<f32>),
    /// First and last token of each answer.
    Spans {
        /// Positions of the first token.
        start: Vec<i32>,
        /// Positions of the last token.
        end: Vec<i32>,
    },
    /// One token per position, -100 for none; already shifted so that position `i` holds what it predicts.
    Tokens(Vec<i32>),
}

impl Targets {
    /// How many predictions the hard loss is a mean over; with a teacher, missing labels are filled.
    fn predictions(&self, taught: bool) -> usize {
        let labelled = |l: &[i32]| l.iter().filter(|&&l| l >= 0).count();
        match self {
            Targets::Classes(l) if !taught => labelled(l),
            Targets::Spans { start, .. } if !taught => labelled(start),
            Targets::Classes(l) | Targets::Spans { start: l, .. } => l.len(),
            Targets::Values(v) => v.len(),
            Targets::Tokens(l) => labelled(l),
        }
    }
}

/// How much of a batch a part of it is. Each term of the loss is a mean, over predictions, tokens or sequences; a part's
/// mean counts as much as it has of these, so that the losses of a batch's parts sum to the loss of the batch, and their
/// gradients to its gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    sequences: f32,
    predictions: f32,
    tokens: f32,
}

impl Share {
    /// All of it.
    pub const WHOLE: Share = Share { sequences: 1.0, predictions: 1.0, tokens: 1.0 };
    /// Nothing of it: a loss of 0, with gradients of 0.
    pub const NOTHING: Share = Share { sequences: 0.0, predictions: 0.0, tokens: 0.0 };

    /// The share that `part` has of `whole`, each with its tokens and its targets.
    pub fn new(part: (&Tokens, &Targets), whole: (&Tokens, &Targets), taught: bool) -> Share {
        let share = |part: usize, whole: usize| part as f32 / whole.max(1) as f32;
        Share {
            sequences: share(part.0.batch, whole.0.batch),
            predictions: share(part.1.predictions(taught), whole.1.predictions(taught)),
            tokens: share(part.0.unpadded(), whole.0.unpadded()),
        }
    }
}

/// A loss with its unweighted terms, on the model's device.
pub struct Loss {
    /// The weighted sum, to differentiate.
    pub total: Var,
    hard: Option<Tensor>,
    soft: Option<Tensor>,
    feature: Option<Tensor>,
}

impl Loss {
    /// The values, to be summed over the parts of a batch.
    pub fn sums(self) -> Sums {
        Sums { total: self.total.value().clone(), rest: [self.hard, self.soft, self.feature] }
    }

    /// The values. Waits for a GPU.
    pub fn terms(self) -> Terms {
        self.sums().terms()
    }
}

/// Values of a loss and of its terms on a device.
pub struct Sums {
    total: Tensor,
    rest: [Option<Tensor>; 3],
}

impl Sums {
    /// The weighted sum of the terms.
    pub fn total(&self) -> &Tensor {
        &self.total
    }

    /// Every value there is.
    pub fn values(&mut self) -> impl Iterator<Item = &mut Tensor> {
        std::iter::once(&mut self.total).chain(self.rest.iter_mut().flatten())
    }

    /// No loss, on `device`.
    pub fn nothing(device: Device) -> Sums {
        Sums { total: Tensor::zeros_on(device, &[1]), rest: [None, None, None] }
    }

    /// The same values, with a 0 for each term that is not used: processes that have different terms sum them then.
    pub fn with_all_terms(mut self) -> Sums {
        let device = self.total.device();
        for term in &mut self.rest {
            term.get_or_insert_with(|| Tensor::zeros_on(device, &[1]));
        }
        self
    }

    /// Adds those of another part of the batch.
    pub fn add(&mut self, mut other: Sums) {
        self.values().zip(other.values()).for_each(|(sum, x)| accumulate(sum, x));
    }

    /// The values. Waits for a GPU.
    pub fn terms(&self) -> Terms {
        self.terms_beside(&self.total).0
    }

    /// The values, and that of another tensor of one element. Waits for a GPU, once.
    pub fn terms_beside(&self, other: &Tensor) -> (Terms, f32) {
        let there: Vec<&Tensor> =
            [&self.total, other].into_iter().chain(self.rest.iter().flatten()).collect();
        let mut items = Tensor::items(&there).into_iter();
        let mut next = || items.next().expect("one for each");
        let (total, other) = (next(), next());
        let [hard, soft, feature] = self.rest.each_ref().map(|term| term.as_ref().map_or(0.0, |_| next()));
        (Terms { total, hard, soft, feature }, other)
    }
}

/// Values of the loss and its unweighted terms; a term that is not used is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Terms {
    /// `alpha * hard + beta * soft + gamma * feature`.
    pub total: f32,
    /// Cross-entropy (or squared error of a regression).
    pub hard: f32,
    /// KL divergence (or squared error against the teacher of a regression).
    pub soft: f32,
    /// Sum of mean squared errors of the features.
    pub feature: f32,
}

/// Logits as rows of predictions over classes: `[batch, classes]`, the two `[batch, length]` of spans, or
/// `[tokens, vocab]`.
fn predictions(tape: &Tape, logits: &Var, targets: &Targets, tokens: &Tokens) -> Vec<Var> {
    match targets {
        Targets::Spans { .. } => {
            let shaped = tape.reshape(logits, &[tokens.batch, tokens.length, 2]);
            let columns = [select_column(tape, &shaped, 0), select_column(tape, &shaped, 1)];
            let Some(mask) = &tokens.mask else { return columns.to_vec() };
            // Padding is no answer: far below every logit it has no share in a softmax, whatever a
            // sequence's neighbours in the batch are.
            let far = mask.iter().map(|&m| if m { 0.0 } else { -1e9 }).collect();
            let far = Tensor::from_f32(far, &[tokens.batch, tokens.length]);
            let far = tape.constant(far.to(logits.value().device()));
            columns.iter().map(|c| add(tape, c, &far)).collect()
        }
        _ => vec![logits.clone()],
    }
}

/// The mean hard loss of `logits` (shape of the head) against `targets`.
pub fn hard_loss(tape: &Tape, logits: &Var, targets: &Targets, tokens: &Tokens) -> Var {
    let p = predictions(tape, logits, targets, tokens);
    match targets {
        Targets::Classes(labels) | Targets::Tokens(labels) => cross_entropy(tape, &p[0], labels),
        Targets::Values(values) => {
            let values = Tensor::from_f32(values.clone(), p[0].shape()).to(p[0].value().device());
            mse(tape, &p[0], &values, None)
        }
        Targets::Spans { start, end } => {
            let (s, e) = (cross_entropy(tape, &p[0], start), cross_entropy(tape, &p[1], end));
            weighted_sum(tape, &[(0.5, s), (0.5, e)])
        }
    }
}

/// `targets` with the teacher's argmax where a label is missing.
fn filled(targets: &Targets, teacher: &[Tensor]) -> Targets {
    let fill = |labels: &[i32], logits: &Tensor| -> Vec<i32> {
        // Only then are the teacher's logits waited for.
        if labels.iter().all(|&l| l >= 0) {
            return labels.to_vec();
        }
        let logits = logits.to(Device::Cpu);
        labels
            .iter()
            .zip(logits.f32().chunks_exact(logits.width()))
            .map(|(&l, row)| if l >= 0 { l } else { argmax(row) as i32 })
            .collect()
    };
    match targets {
        Targets::Classes(l) => Targets::Classes(fill(l, &teacher[0])),
        Targets::Values(v) if v.iter().any(|v| v.is_nan()) => {
            let theirs = teacher[0].to(Device::Cpu);
            let pairs = v.iter().zip(theirs.f32());
            Targets::Values(pairs.map(|(v, t)| if v.is_nan() { *t } else { *v }).collect())
        }
        Targets::Values(v) => Targets::Values(v.clone()),
        Targets::Spans { start, end } => {
            Targets::Spans { start: fill(start, &teacher[0]), end: fill(end, &teacher[1]) }
        }
        // A position without a label is context or padding, not an unlabelled example.
        Targets::Tokens(l) => Targets::Tokens(l.clone()),
    }
}

/// Index of the largest element, the first of equals.
pub fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in row.iter().enumerate() {
        if *v > row[best] {
            best = i;
        }
    }
    best
}

/// The loss of `student` on what is `share` of a batch. Without a teacher only the hard term counts. Padded positions
/// count in no term. `tokens` are those whose positions the outputs have.
pub fn loss(
    tape: &Tape,
    mix: &Mix,
    student: &Output,
    teacher: Option<&Output>,
    targets: &Targets,
    tokens: &Tokens,
    share: Share,
) -> Loss {
    let quiet = Tape::inference();
    let teacher_predictions: Option<Vec<Tensor>> = teacher.map(|t| {
        predictions(&quiet, &t.logits, targets, tokens).into_iter().map(|v| v.value().clone()).collect()
    });
    let targets = match &teacher_predictions {
        Some(t) => &filled(targets, t),
        None => targets,
    };
    let mut weighted = Vec::new();
    let [mut hard_term, mut soft_term, mut feature_term] = [const { None }; 3];
    if mix.alpha != 0.0 || teacher.is_none() {
        let mut hard = hard_loss(tape, &student.logits, targets, tokens);
        if share != Share::WHOLE {
            hard = weighted_sum(tape, &[(share.predictions, hard)]);
        }
        hard_term = Some(hard.value().clone());
        weighted.push((mix.alpha, hard));
    }
    if let (Some(teacher), Some(logits)) = (teacher, teacher_predictions) {
        if mix.beta != 0.0 {
            let mine = predictions(tape, &student.logits, targets, tokens);
            let counts = match targets {
                Targets::Tokens(l) => Some(Flags::from(l.iter().map(|&l| l >= 0).collect::<Vec<bool>>())),
                _ => None,
            };
            let each = share.predictions / mine.len() as f32;
            let parts: Vec<(f32, Var)> = mine
                .iter()
                .zip(&logits)
                .map(|(s, t)| {
                    let term = match targets {
                        // One number has no distribution; its distance to the teacher's stands in.
                        Targets::Values(_) => mse(tape, s, t, None),
                        _ => kl_divergence(tape, s, t, mix.temperature, counts.as_ref()),
                    };
                    (each, term)
                })
                .collect();
            let soft = weighted_sum(tape, &parts);
            soft_term = Some(soft.value().clone());
            weighted.push((mix.beta, soft));
        }
        if mix.gamma != 0.0 {
            let feature = feature_loss(tape, student, teacher, tokens, share);
            feature_term = Some(feature.value().clone());
            weighted.push((mix.gamma, feature));
        }
    }
    let total = weighted_sum(tape, &weighted);
    Loss { total, hard: hard_term, soft: soft_term, feature: feature_term }
}

/// What a section of a model, other than the last, has of the loss: the feature loss of the blocks whose outputs it keeps;
/// `None` if that is nothing. The losses of all sections sum to the model's, except that the last one's is [`loss`].
pub fn section_loss(
    tape: &Tape,
    mix: &Mix,
    student: &Taps,
    teacher: Option<&Taps>,
    tokens: &Tokens,
    share: Share,
) -> Option<Loss> {
    let teacher = teacher.filter(|_| mix.gamma != 0.0)?;
    let parts = block_losses(tape, student, teacher, tokens, share);
    if parts.is_empty() {
        return None;
    }
    let feature = weighted_sum(tape, &parts);
    let term = Some(feature.value().clone());
    Some(Loss { total: weighted_sum(tape, &[(mix.gamma, feature)]), hard: None, soft: None, feature: term })
}

/// Sum over tapped features of their mean squared error, plus that of the final projection.
fn feature_loss(tape: &Tape, student: &Output, teacher: &Output, tokens: &Tokens, share: Share) -> Var {
    let mut parts = block_losses(tape, &student.taps, &teacher.taps, tokens, share);
    parts.push(block_loss(tape, &student.logits, teacher.logits.value(), tokens, share));
    weighted_sum(tape, &parts)
}

/// Whether the feature loss counts the tap `name`: embeddings are not a block, and the last hidden states are the last
/// block's output normalised.
pub(crate) fn is_feature(name: &str) -> bool {
    !name.ends_with(".embed") && !name.ends_with(".last")
}

/// The mean squared error of each tapped feature, with its weight in the sum.
fn block_losses(
    tape: &Tape,
    student: &Taps,
    teacher: &Taps,
    tokens: &Tokens,
    share: Share,
) -> Vec<(f32, Var)> {
    let blocks = student.iter().filter(|(name, _)| is_feature(name));
    blocks.map(|(name, mine)| block_loss(tape, mine, teacher[name].value(), tokens, share)).collect()
}

fn block_loss(tape: &Tape, mine: &Var, theirs: &Tensor, tokens: &Tokens, share: Share) -> (f32, Var) {
    // Features of each token of `tokens`, or of each sequence.
    let weight = if theirs.rows() == tokens.ids.len() { share.tokens } else { share.sequences };
    // Positions of a decoder's target and of its source differ; each has its own mask.
    let mask = tokens.mask.as_deref().filter(|m| m.len() == theirs.rows()).map(Flags::from);
    (weight, mse(tape, mine, theirs, mask.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(tape: &Tape, logits: Vec<f32>, shape: &[usize], block: f32) -> Output {
        let logits = tape.leaf(Tensor::from_f32(logits, shape));
        let taps = [("encoder.0".to_string(), tape.leaf(Tensor::full(&[4, 2], block)))];
        Output { logits, taps: taps.into_iter().collect() }
    }

    fn tokens() -> Tokens {
        Tokens {
            batch: 2,
            length: 2,
            ids: vec![0; 4],
            types: vec![],
            mask: Some(vec![true, true, true, false]),
        }
    }

    /// Two examples, two classes, worked by hand.
    #[test]
    fn terms_match_hand_worked_values() {
        let tape = Tape::recording();
        let student = output(&tape, vec![0.0, 0.0, 2.0, 0.0], &[2, 2], 1.0);
        let quiet = Tape::inference();
        let teacher = output(&quiet, vec![2.0, 0.0, 2.0, 0.0], &[2, 2], 3.0);
        let mix = Mix { alpha: 1.0, beta: 10.0, gamma: 1.0, temperature: 2.0, attention_features: false };
        // The second label is missing, so the teacher's argmax, class 0, stands in.
        let l = loss(
            &tape,
            &mix,
            &student,
            Some(&teacher),
            &Targets::Classes(vec![1, -100]),
            &tokens(),
            Share::WHOLE,
        );
        let hard = (2f64.ln() + (1.0 + (-2f64).exp()).ln()) / 2.0;
        // First row: p = softmax(1, 0), q = (1/2, 1/2); second row: equal.
        let p = 1.0 / (1.0 + (-1f64).exp());
        let soft = (p * (p / 0.5).ln() + (1.0 - p) * ((1.0 - p) / 0.5).ln()) / 2.0;
        // Block: (1 - 3)^2 on unpadded rows; logits: one of four differs by 2.
        let feature = 4.0 + 1.0;
        let total = hard + 10.0 * soft + feature;
        assert!((l.total.value().item() as f64 - total).abs() < 1e-5);
        assert!(tape.backward(&l.total).take(&student.logits).is_some());
        let terms = l.terms();
        for (got, want) in [(terms.hard, hard), (terms.soft, soft), (terms.feature, feature)] {
            assert!((got as f64 - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn without_a_teacher_only_labels_count() {
        let tape = Tape::recording();
        let student = output(&tape, vec![1.0, 0.0, 0.0, 1.0], &[2, 2], 0.0);
        let l =
            loss(&tape, &Mix::HARD, &student, None, &Targets::Classes(vec![0, 1]), &tokens(), Share::WHOLE);
        let terms = l.terms();
        assert_eq!((terms.soft, terms.feature), (0.0, 0.0));
        assert_eq!(terms.total, terms.hard);
    }

    #[test]
    fn padding_of_a_batch_changes_no_span_loss() {
        let of = |length: usize, mask: Option<Vec<bool>>, junk: f32| {
            let tape = Tape::recording();
            let mut logits = vec![1.0, 0.5, -0.5, 2.0];
            logits.resize(2 * length, junk);
            let taps = Default::default();
            let student = Output { logits: tape.leaf(Tensor::from_f32(logits.clone(), &[length, 2])), taps };
            logits[0] = 3.0;
            let teacher = Output {
                logits: tape.constant(Tensor::from_f32(logits, &[length, 2])),
                taps: Default::default(),
            };
            let tokens = Tokens { batch: 1, length, ids: vec![0; length], types: vec![], mask };
            let targets = Targets::Spans { start: vec![0], end: vec![1] };
            let mix = Mix { alpha: 1.0, beta: 1.0, gamma: 0.0, temperature: 2.0, attention_features: false };
            loss(&tape, &mix, &student, Some(&teacher), &targets, &tokens, Share::WHOLE).terms()
        };
        let (alone, padded) = (of(2, None, 0.0), of(3, Some(vec![true, true, false]), 7.0));
        assert!(
            (alone.hard - padded.hard).abs() < 1e-6 && (alone.soft - padded.soft).abs() < 1e-6,
            "{alone:?} {padded:?}"
        );
        assert!(alone.soft > 0.0);
    }

    /// Three sequences of different lengths, cut into two and one: each term is the sum of the parts' terms.
    #[test]
    fn losses_of_parts_sum_to_the_loss_of_the_batch() {
        let (length, lengths) = (4, [4, 2, 3]);
        let noise =
            |seed: usize, n: usize| (0..n).map(move |i| ((i * 37 + seed * 11) % 17) as f32 / 7.0 - 1.0);
        let terms = |range: std::ops::Range<usize>, targets: &Targets, width: usize, share: Share| {
            let output = |tape: &Tape, seed: usize| {
                let per = if width == 2 { 2 } else { length * 2 };
                let cut = |n: usize, s: usize| {
                    noise(s, 3 * n).skip(range.start * n).take(range.len() * n).collect::<Vec<f32>>()
                };
                let logits = tape.leaf(Tensor::from_f32(cut(per, seed), &[range.len() * per / 2, 2]));
                let block = Tensor::from_f32(cut(length * 3, seed + 5), &[range.len() * length, 3]);
                Output { logits, taps: [("encoder.0".to_string(), tape.leaf(block))].into() }
            };
            let tape = Tape::recording();
            let (student, teacher) = (output(&tape, 1), output(&Tape::inference(), 2));
            let mix = Mix { alpha: 1.0, beta: 10.0, gamma: 1.0, temperature: 2.0, attention_features: false };
            let tokens = tokens_of(&lengths[range.clone()], length);
            loss(&tape, &mix, &student, Some(&teacher), targets, &tokens, share).terms()
        };
        let classes = [0, -100, 1];
        let spans = [[1, 0, 2], [3, 1, 2]];
        let of = |span: bool, r: std::ops::Range<usize>| match span {
            false => Targets::Classes(classes[r].to_vec()),
            true => Targets::Spans { start: spans[0][r.clone()].to_vec(), end: spans[1][r].to_vec() },
        };
        for span in [false, true] {
            let width = if span { 8 } else { 2 };
            let all = (&tokens_of(&lengths, length), &of(span, 0..3));
            let whole = terms(0..3, all.1, width, Share::WHOLE);
            let mut sum = [0.0; 4];
            for r in [0..2, 2..3] {
                let targets = of(span, r.clone());
                let share = Share::new((&tokens_of(&lengths[r.clone()], length), &targets), all, true);
                let t = terms(r, &targets, width, share);
                sum.iter_mut().zip([t.total, t.hard, t.soft, t.feature]).for_each(|(s, t)| *s += t);
            }
            for (got, want) in sum.iter().zip([whole.total, whole.hard, whole.soft, whole.feature]) {
                assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{sum:?} {whole:?}");
            }
        }
    }

    fn tokens_of(lengths: &[usize], length: usize) -> Tokens {
        let mask = lengths.iter().flat_map(|&n| (0..length).map(move |i| i < n)).collect();
        let batch = lengths.len();
        Tokens { batch, length, ids: vec![0; batch * length], types: vec![], mask: Some(mask) }
    }

    #[test]
    fn spans_average_start_and_end() {
        let tape = Tape::recording();
        // Token rows of (start, end): sequence 0 prefers start 0, end 1.
        let student = output(&tape, vec![5.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0], &[4, 2], 0.0);
        let targets = Targets::Spans { start: vec![0, 1], end: vec![1, 0] };
        let tokens = Tokens { mask: None, ..tokens() };
        let got = hard_loss(&tape, &student.logits, &targets, &tokens).value().item() as f64;
        let sure = (1.0 + (-5f64).exp()).ln();
        assert!((got - (sure + 2f64.ln()) / 2.0).abs() < 1e-6, "{got}");
    }
}
