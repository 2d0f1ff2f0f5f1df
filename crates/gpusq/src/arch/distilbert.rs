//! DistilBERT (Sanh et al. 2019): BERT's encoder without token types and pooler.

use gpusq_tensor::ops::activation::Activation;

use super::{Arch, Classes, Config, Entry, Layout, pairs};
use crate::Result;
use crate::spec::*;

pub(super) const ARCH: Arch = Arch {
    name: "distilbert",
    doc: "DistilBERT",
    spec,
    tensors,
    prefix: "distilbert.",
    classes: Classes {
        body: "DistilBertModel",
        classify: "DistilBertForSequenceClassification",
        span: "DistilBertForQuestionAnswering",
        language_model: "",
    },
    classifier: Some(Activation::Relu),
};

fn spec(c: &Config) -> Result<TransformerSpec> {
    let (vocab, hidden) = (c.size("vocab_size")?, c.size("dim")?);
    let (heads, head_dim) = c.heads("n_heads", hidden)?;
    let head = c.head(&ARCH.classes, ARCH.classifier, None)?;
    let head_dropout = match head {
        Head::Span => c.probability_or("qa_dropout", 0.1)?,
        _ => c.probability_or("seq_classif_dropout", 0.2)?,
    };
    let encoder = Stack {
        layers: c.count("n_layers")?,
        hidden,
        heads,
        kv_heads: heads,
        head_dim,
        ffn: c.size("hidden_dim")?,
        activation: c.activation("activation", "gelu")?,
        gated: false,
        qkv_bias: true,
        bias: true,
        norm: Norm::Layer { eps: 1e-12 },
        order: NormOrder::Post,
        final_norm: false,
        causal: false,
        cross: false,
        embed: Embed {
            scale: 1.0,
            positions: Positions::Learned {
                entries: c.size("max_position_embeddings")?,
                numbering: Numbering::Index { offset: 0 },
            },
            types: 0,
            norm: true,
            projected: false,
        },
        dropout: Dropout {
            hidden: c.probability_or("dropout", 0.1)?,
            attention: c.probability_or("attention_dropout", 0.1)?,
            head: head_dropout,
        },
    };
    Ok(TransformerSpec {
        vocab,
        embed_width: hidden,
        encoder: Some(encoder),
        decoder: None,
        head,
        tokens: SpecialTokens { pad: c.token("pad_token_id"), ..Default::default() },
    })
}

fn tensors(spec: &TransformerSpec) -> Vec<Entry> {
    let e = |name: &str| format!("distilbert.embeddings.{name}");
    let mut out = vec![
        Entry::new("embed.word", e("word_embeddings.weight"), Layout::Same),
        Entry::new("encoder.embed.position", e("position_embeddings.weight"), Layout::Same),
    ];
    pairs(&mut out, "encoder.embed.norm".into(), e("LayerNorm"), Layout::Same, true);
    for i in 0..spec.last_stack().layers {
        for (ours, theirs) in [
            ("attn.q", "attention.q_lin"),
            ("attn.k", "attention.k_lin"),
            ("attn.v", "attention.v_lin"),
            ("attn.o", "attention.out_lin"),
            ("attn.norm", "sa_layer_norm"),
            ("ffn.in", "ffn.lin1"),
            ("ffn.out", "ffn.lin2"),
            ("ffn.norm", "output_layer_norm"),
        ] {
            let theirs = format!("distilbert.transformer.layer.{i}.{theirs}");
            pairs(&mut out, format!("encoder.{i}.{ours}"), theirs, Layout::Same, true);
        }
    }
    match spec.head {
        Head::Classify { .. } => {
            pairs(&mut out, "head.dense".into(), "pre_classifier".into(), Layout::Same, true);
            pairs(&mut out, "head.out".into(), "classifier".into(), Layout::Same, true);
        }
        Head::Span => pairs(&mut out, "head.out".into(), "qa_outputs".into(), Layout::Same, true),
        Head::None | Head::LanguageModel { .. } => {}
    }
    out
}
