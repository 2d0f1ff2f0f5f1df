//! BERT (Devlin et al. 2019): post-norm encoder, learned positions, token types, optional pooler.

use gpusq_tensor::ops::activation::Activation;

use super::{Arch, Classes, Config, Entry, Layout, pairs};
use crate::Result;
use crate::spec::*;

pub(super) const ARCH: Arch = Arch {
    name: "bert",
    doc: "BERT and its fine-tuned, distilled or shrunken forms (MiniLM, TinyBERT)",
    spec,
    tensors,
    prefix: "bert.",
    classes: Classes {
        body: "BertModel",
        classify: "BertForSequenceClassification",
        span: "BertForQuestionAnswering",
        language_model: "",
    },
    classifier: Some(Activation::Tanh),
};

/// The encoder that BERT and RoBERTa share.
pub(super) fn encoder(c: &Config, numbering: Numbering) -> Result<Stack> {
    let hidden = c.size("hidden_size")?;
    let (heads, head_dim) = c.heads("num_attention_heads", hidden)?;
    let kind = c.get("position_embedding_type").and_then(|v| v.as_str()).unwrap_or("absolute");
    if kind != "absolute" {
        return Err(c.error(format!("position_embedding_type `{kind}` is not supported; only `absolute` is")));
    }
    let hidden_dropout = c.probability_or("hidden_dropout_prob", 0.1)?;
    Ok(Stack {
        layers: c.count("num_hidden_layers")?,
        hidden,
        heads,
        kv_heads: heads,
        head_dim,
        ffn: c.size("intermediate_size")?,
        activation: c.activation("hidden_act", "gelu")?,
        gated: false,
        qkv_bias: true,
        bias: true,
        norm: Norm::Layer { eps: c.epsilon_or("layer_norm_eps", 1e-12)? },
        order: NormOrder::Post,
        final_norm: false,
        causal: false,
        cross: false,
        embed: Embed {
            scale: 1.0,
            positions: Positions::Learned { entries: c.size("max_position_embeddings")?, numbering },
            types: c.size_or("type_vocab_size", 2)?,
            norm: true,
            projected: false,
        },
        dropout: Dropout {
            hidden: hidden_dropout,
            attention: c.probability_or("attention_probs_dropout_prob", 0.1)?,
            head: c.probability_or("classifier_dropout", hidden_dropout as f64)?,
        },
    })
}

fn spec(c: &Config) -> Result<TransformerSpec> {
    let vocab = c.size("vocab_size")?;
    let encoder = encoder(c, Numbering::Index { offset: 0 })?;
    Ok(TransformerSpec {
        vocab,
        embed_width: encoder.hidden,
        encoder: Some(encoder),
        decoder: None,
        head: c.head(&ARCH.classes, ARCH.classifier, None)?,
        tokens: SpecialTokens { pad: c.token("pad_token_id"), ..Default::default() },
    })
}

/// The tensors of the encoder that BERT and RoBERTa share, under `prefix`.
pub(super) fn encoder_tensors(s: &Stack, prefix: &str) -> Vec<Entry> {
    let e = |name: &str| format!("{prefix}embeddings.{name}");
    let mut out = vec![
        Entry::new("embed.word", e("word_embeddings.weight"), Layout::Same),
        Entry::new("encoder.embed.position", e("position_embeddings.weight"), Layout::Same),
        Entry::new("encoder.embed.type", e("token_type_embeddings.weight"), Layout::Same),
    ];
    pairs(&mut out, "encoder.embed.norm".into(), e("LayerNorm"), Layout::Same, true);
    for i in 0..s.layers {
        for (ours, theirs) in [
            ("attn.q", "attention.self.query"),
            ("attn.k", "attention.self.key"),
            ("attn.v", "attention.self.value"),
            ("attn.o", "attention.output.dense"),
            ("attn.norm", "attention.output.LayerNorm"),
            ("ffn.in", "intermediate.dense"),
            ("ffn.out", "output.dense"),
            ("ffn.norm", "output.LayerNorm"),
        ] {
            let theirs = format!("{prefix}encoder.layer.{i}.{theirs}");
            pairs(&mut out, format!("encoder.{i}.{ours}"), theirs, Layout::Same, true);
        }
    }
    out
}

fn tensors(spec: &TransformerSpec) -> Vec<Entry> {
    let mut out = encoder_tensors(spec.last_stack(), ARCH.prefix);
    match spec.head {
        Head::Classify { .. } => {
            pairs(&mut out, "head.dense".into(), "bert.pooler.dense".into(), Layout::Same, true);
            pairs(&mut out, "head.out".into(), "classifier".into(), Layout::Same, true);
        }
        Head::Span => pairs(&mut out, "head.out".into(), "qa_outputs".into(), Layout::Same, true),
        // The pooler of a bare body, for the classifier a task may add.
        Head::None => pairs(&mut out, "head.dense".into(), "bert.pooler.dense".into(), Layout::Same, true),
        Head::LanguageModel { .. } => {}
    }
    out
}
