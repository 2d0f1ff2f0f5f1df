//! RoBERTa (Liu et al. 2019): BERT's encoder, positions counted over unpadded tokens, its own classifier.

use gpusq_tensor::ops::activation::Activation;

use super::bert::{encoder, encoder_tensors};
use super::{Arch, Classes, Config, Entry, Layout, pairs};
use crate::Result;
use crate::spec::*;

pub(super) const ARCH: Arch = Arch {
    name: "roberta",
    doc: "RoBERTa",
    spec,
    tensors,
    prefix: "roberta.",
    classes: Classes {
        body: "RobertaModel",
        classify: "RobertaForSequenceClassification",
        span: "RobertaForQuestionAnswering",
        language_model: "",
    },
    classifier: Some(Activation::Tanh),
};

fn spec(c: &Config) -> Result<TransformerSpec> {
    let vocab = c.size("vocab_size")?;
    let pad = c.token("pad_token_id").unwrap_or(1);
    let encoder = encoder(c, Numbering::Unpadded { offset: pad as usize + 1 })?;
    if c.size("max_position_embeddings")? <= pad as usize + 1 {
        return Err(c.error("`max_position_embeddings` leaves no position after pad_token_id"));
    }
    Ok(TransformerSpec {
        vocab,
        embed_width: encoder.hidden,
        encoder: Some(encoder),
        decoder: None,
        head: c.head(&ARCH.classes, ARCH.classifier, None)?,
        tokens: SpecialTokens {
            pad: Some(pad),
            bos: c.token("bos_token_id"),
            eos: c.token("eos_token_id"),
            decoder_start: None,
        },
    })
}

fn tensors(spec: &TransformerSpec) -> Vec<Entry> {
    let mut out = encoder_tensors(spec.last_stack(), ARCH.prefix);
    match spec.head {
        Head::Classify { .. } => {
            pairs(&mut out, "head.dense".into(), "classifier.dense".into(), Layout::Same, true);
            pairs(&mut out, "head.out".into(), "classifier.out_proj".into(), Layout::Same, true);
        }
        Head::Span => pairs(&mut out, "head.out".into(), "qa_outputs".into(), Layout::Same, true),
        Head::None | Head::LanguageModel { .. } => {}
    }
    out
}
