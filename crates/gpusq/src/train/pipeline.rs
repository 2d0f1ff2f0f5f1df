//! A model over several processes, each with a section of its blocks: the parts of a batch go through them one after the
//! other, forward and back.
//!
//! The order is 1F1B (Narayanan et al. 2019 and 2021): a process first computes as many parts forward as there are
//! processes after it, then one part backward after each part forward. So it never holds the activations of more parts
//! than there are processes from it on, and all have the same weights for the whole of a step.

use std::collections::BTreeMap;

use gpusq_tensor::{Tape, Tensor, Var};

use super::batch::MicroBatch;
use super::fit::{Gradients, Stepper, Summed};
use crate::Result;
use crate::distill::{Loss, Sums, loss, section_loss};
use crate::forward::{Bound, Output, forward_section};
use crate::model::Model;
use crate::spec::Section;

/// What a process does with a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Forward(usize),
    Backward(usize),
}

/// What the process with section `index` of `of` does with `parts` parts.
fn schedule(index: usize, of: usize, parts: usize) -> Vec<Action> {
    let ahead = (of - 1 - index).min(parts);
    let first = (0..ahead).map(Action::Forward);
    let both = (ahead..parts).flat_map(|i| [Action::Forward(i), Action::Backward(i - ahead)]);
    let last = (parts - ahead..parts).map(Action::Backward);
    first.chain(both).chain(last).collect()
}

/// A part that was computed forward.
struct Begun {
    tape: Tape,
    bound: Bound,
    /// What it was computed from, if another process made that.
    before: Option<Var>,
    output: Var,
    loss: Option<Loss>,
}

impl Stepper<'_> {
    /// What `section` has of the loss of all `parts` and of its gradients, for step `step`.
    pub(super) fn through_pipeline(
        &self,
        section: &Section,
        student: &Model,
        parts: &[MicroBatch],
        step: usize,
    ) -> Result<(Sums, Gradients)> {
        let (compute, group) = (self.how.compute, self.how.group);
        let hidden = self.spec.last_stack().hidden;
        let shape = |i: usize| [parts[i].batch.inputs.tokens.ids.len(), hidden];
        let (before, after) = (section.index.wrapping_sub(1), section.index + 1);
        let mut begun: BTreeMap<usize, Begun> = BTreeMap::new();
        let mut summed = Summed::default();
        // What was made last goes out together with what comes in next.
        let mut outgoing: Vec<(usize, Tensor)> = Vec::new();
        let actions = schedule(section.index, section.of, parts.len());
        for action in actions.into_iter().map(Some).chain([None]) {
            let (from, shape, count) = match action {
                // Of the student, and of the teacher.
                Some(Action::Forward(i)) if !section.is_first() => {
                    (before, shape(i), 1 + usize::from(self.teacher.is_some()))
                }
                Some(Action::Backward(i)) if !section.is_last() => (after, shape(i), 1),
                _ => (0, [0, 0], 0),
            };
            let wanted = vec![(from, &shape[..]); count];
            let sent: Vec<(usize, &Tensor)> = outgoing.iter().map(|(rank, t)| (*rank, t)).collect();
            let received = group.exchange(&sent, &wanted, compute.device, compute.element)?;
            outgoing.clear();
            match action {
                Some(Action::Forward(i)) => {
                    let (part, made) = self.forward_part(section, student, &parts[i], step, received);
                    begun.insert(i, part);
                    outgoing.extend(made.into_iter().map(|t| (after, t)));
                }
                Some(Action::Backward(i)) => {
                    let part = begun.remove(&i).expect("a part goes forward before it goes back");
                    let grad = self.backward_part(part, received.into_iter().next(), &mut summed);
                    outgoing.extend(grad.map(|g| (before, g)));
                }
                None => {}
            }
        }
        let losses = summed.losses.expect("a batch has parts");
        Ok((losses.with_all_terms(), summed.gradients))
    }

    /// Computes `part` forward, from what the section before made of it, and gives what the section after needs.
    fn forward_part(
        &self,
        section: &Section,
        student: &Model,
        part: &MicroBatch,
        step: usize,
        received: Vec<Tensor>,
    ) -> (Begun, Vec<Tensor>) {
        let (how, inputs, taps) = (self.how, &part.batch.inputs, self.how.mix.taps());
        let tape = self.tape(part, step);
        let mut received = received.into_iter();
        let before = received.next().map(|t| tape.leaf(t));
        let of_teacher = received.next().map(|t| self.quiet.constant(t));
        let taught = self.teacher.as_ref().map(|(t, bound)| {
            let (spec, attention) = (&t.spec, t.attention);
            forward_section(&self.quiet, spec, bound, attention, inputs, taps, section, of_teacher.as_ref())
        });
        let bound = Bound::new(&tape, &student.params, self.gradient, how.compute);
        let mine = forward_section(
            &tape,
            &self.spec,
            &bound,
            student.attention,
            inputs,
            taps,
            section,
            before.as_ref(),
        );
        let (output, tokens) = (mine.output.clone(), &inputs.tokens);
        if !section.is_last() {
            let theirs = taught.as_ref().map(|t| &t.taps);
            let loss = section_loss(&tape, &how.mix, &mine.taps, theirs, tokens, part.share);
            let made = std::iter::once(&mine).chain(&taught).map(|p| p.output.value().clone()).collect();
            return (Begun { tape, bound, before, output, loss }, made);
        }
        let outputs = |p: crate::forward::Passed| Output { logits: p.output, taps: p.taps };
        let taught = taught.map(outputs);
        let targets = &part.batch.targets;
        let l = loss(&tape, &how.mix, &outputs(mine), taught.as_ref(), targets, tokens, part.share);
        (Begun { tape, bound, before, output, loss: Some(l) }, Vec::new())
    }

    /// Computes a part back, from the gradient `outer` of its output unless this is the last section, adds loss and
    /// gradients to `summed` and gives the gradient of what the section before made.
    fn backward_part(&self, part: Begun, outer: Option<Tensor>, summed: &mut Summed) -> Option<Tensor> {
        let Begun { tape, bound, before, output, loss } = part;
        let total = loss.as_ref().map(|l| l.total.clone());
        let mut grads = tape.backward_with(total.as_ref(), outer.map(|g| (&output, g)), &mut |_, _| {});
        let grad = before.map(|x| grads.take(&x).expect("every section's output has a part in the loss"));
        let sums = loss.map_or_else(|| Sums::nothing(self.how.compute.device), Loss::sums);
        summed.add_losses(sums);
        summed.add(bound.gradients(&mut grads, ""));
        grad
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch;

    /// What is sent to and received from whom between two actions.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct Exchange {
        sends: Vec<(usize, Action)>,
        receipts: Vec<(usize, Action)>,
    }

    fn exchanges(index: usize, of: usize, parts: usize) -> Vec<Exchange> {
        let actions = schedule(index, of, parts);
        let mut all = vec![Exchange::default(); actions.len() + 1];
        for (k, action) in actions.into_iter().enumerate() {
            match action {
                Action::Forward(_) => {
                    all[k].receipts.extend((index > 0).then(|| (index - 1, action)));
                    all[k + 1].sends.extend((index + 1 < of).then_some((index + 1, action)));
                }
                Action::Backward(_) => {
                    all[k].receipts.extend((index + 1 < of).then_some((index + 1, action)));
                    all[k + 1].sends.extend((index > 0).then(|| (index - 1, action)));
                }
            }
        }
        all
    }

    /// Of one model of a kind, the sections have every weight and step size between them, none twice.
    #[test]
    fn every_weight_is_in_one_section() {
        let spec = |text: &str| {
            let config = arch::Config::parse(std::path::Path::new("config.json"), text).unwrap();
            (arch::find(&config).unwrap().spec)(&config).unwrap()
        };
        let bert = r#"{"model_type":"bert","architectures":["BertForSequenceClassification"],"vocab_size":24,
            "hidden_size":32,"num_hidden_layers":11,"num_attention_heads":4,"intermediate_size":64,
            "max_position_embeddings":16,"num_labels":2}"#;
        let gpt2 = r#"{"model_type":"gpt2","architectures":["GPT2LMHeadModel"],"vocab_size":24,"n_embd":32,
            "n_layer":11,"n_head":4,"n_positions":16,"tie_word_embeddings":false}"#;
        for text in [bert, gpt2] {
            let spec = spec(text);
            let linears = spec.linears();
            let steps = linears.iter().flat_map(|l| [l.input_scale(), l.output_scale()]);
            let names: Vec<String> = spec.weights().into_iter().map(|(name, _)| name).chain(steps).collect();
            for n in 1..=11 {
                let sections = spec.sections(n).unwrap();
                for name in &names {
                    let owners = sections.iter().filter(|s| s.owns(name)).count();
                    assert_eq!(owners, 1, "{name} of {n}");
                }
                let first = |name: &str| sections[0].owns(name);
                let last = |name: &str| sections[n - 1].owns(name);
                assert!(first("embed.word") && last("head.out.weight") && last("head.out.input_scale"));
                let sizes: Vec<usize> = sections.iter().map(|s| s.blocks.len()).collect();
                assert!(sizes.iter().sum::<usize>() == 11 && sizes.iter().all(|s| s.abs_diff(11 / n) <= 1));
            }
            assert!(spec.sections(12).unwrap_err().contains("has 11"));
        }
        let tied = spec(&gpt2.replace("false", "true")).sections(2).unwrap_err();
        assert!(tied.contains("word embedding"), "{tied}");
        let bart = r#"{"model_type":"bart","architectures":["BartForConditionalGeneration"],"vocab_size":24,"d_model":32,
            "encoder_layers":2,"encoder_attention_heads":4,"encoder_ffn_dim":64,"decoder_layers":2,
            "decoder_attention_heads":4,"decoder_ffn_dim":64,"max_position_embeddings":16}"#;
        let both = spec(bart).sections(2).unwrap_err();
        assert!(both.contains("an encoder and a decoder"), "{both}");
    }

    #[test]
    fn every_part_goes_forward_then_back_and_few_wait() {
        for of in 1..=6 {
            for parts in 1..=12 {
                for index in 0..of {
                    let (mut done, mut waiting, mut most) = (Vec::new(), 0, 0);
                    for action in schedule(index, of, parts) {
                        match action {
                            Action::Forward(_) => waiting += 1,
                            Action::Backward(i) => {
                                assert!(done.contains(&Action::Forward(i)));
                                waiting -= 1;
                            }
                        }
                        most = most.max(waiting);
                        done.push(action);
                    }
                    assert_eq!((done.len(), waiting, most), (2 * parts, 0, (of - index).min(parts)));
                }
            }
        }
    }

    /// With nothing kept between processes: a send ends when it is received, and an exchange when all of it ended. A
    /// process has one exchange at a time.
    #[test]
    fn no_process_waits_for_one_that_waits_for_it() {
        for of in 2..=6 {
            for parts in 1..=12 {
                let mut left: Vec<std::collections::VecDeque<Exchange>> =
                    (0..of).map(|i| exchanges(i, of, parts).into()).collect();
                while left.iter().any(|l| !l.is_empty()) {
                    let before = left.clone();
                    for rank in 0..of {
                        for other in 0..of {
                            let (Some(a), Some(b)) = (left[rank].front(), left[other].front()) else {
                                continue;
                            };
                            let send = a.sends.iter().position(|s| s.0 == other);
                            let receipt = b.receipts.iter().position(|r| r.0 == rank);
                            if let (Some(s), Some(r)) = (send, receipt) {
                                let sent = left[rank][0].sends.remove(s).1;
                                let received = left[other][0].receipts.remove(r).1;
                                assert_eq!(sent, received, "{rank} to {other}");
                            }
                        }
                    }
                    for l in &mut left {
                        while l.front() == Some(&Exchange::default()) {
                            l.pop_front();
                        }
                    }
                    assert!(left != before, "{of} processes with {parts} parts wait for each other");
                }
            }
        }
    }
}
