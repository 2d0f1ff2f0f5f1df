//! BART (Lewis et al. 2020): post-norm encoder and decoder that share the word embedding, learned
//! positions offset by two, a normalisation after the embeddings.

use super::{Arch, Classes, Config, Entry, Layout, pairs};
use crate::Result;
use crate::spec::*;

pub(super) const ARCH: Arch = Arch {
    name: "bart",
    doc: "BART",
    spec,
    tensors,
    prefix: "model.",
    classes: Classes {
        body: "BartModel",
        classify: "",
        span: "",
        language_model: "BartForConditionalGeneration",
    },
    classifier: None,
};

/// Rows of the position table before the first position's.
const OFFSET: usize = 2;

fn stack(c: &Config, name: &str, hidden: usize) -> Result<Stack> {
    let (heads, head_dim) = c.heads(&format!("{name}_attention_heads"), hidden)?;
    let decoder = name == "decoder";
    Ok(Stack {
        layers: c.count(&format!("{name}_layers"))?,
        hidden,
        heads,
        kv_heads: heads,
        head_dim,
        ffn: c.size(&format!("{name}_ffn_dim"))?,
        activation: c.activation("activation_function", "gelu")?,
        gated: false,
        qkv_bias: true,
        bias: true,
        norm: Norm::Layer { eps: 1e-5 },
        order: NormOrder::Post,
        final_norm: false,
        causal: decoder,
        cross: decoder,
        embed: Embed {
            scale: if c.flag_or("scale_embedding", false)? { (hidden as f32).sqrt() } else { 1.0 },
            positions: Positions::Learned {
                entries: c.size("max_position_embeddings")? + OFFSET,
                numbering: Numbering::Index { offset: OFFSET },
            },
            types: 0,
            norm: true,
            projected: false,
        },
        dropout: Dropout {
            hidden: c.probability_or("dropout", 0.1)?,
            attention: c.probability_or("attention_dropout", 0.0)?,
            head: 0.0,
        },
    })
}

fn spec(c: &Config) -> Result<TransformerSpec> {
    let (vocab, hidden) = (c.size("vocab_size")?, c.size("d_model")?);
    c.refuse("tie_word_embeddings", false)?;
    Ok(TransformerSpec {
        vocab,
        embed_width: hidden,
        encoder: Some(stack(c, "encoder", hidden)?),
        decoder: Some(stack(c, "decoder", hidden)?),
        head: c.head(&ARCH.classes, None, Some(Head::LanguageModel { tied: true, bias: true }))?,
        tokens: SpecialTokens {
            pad: c.token("pad_token_id"),
            bos: c.token("bos_token_id"),
            eos: c.token("eos_token_id"),
            decoder_start: c.token("decoder_start_token_id"),
        },
    })
}

fn tensors(spec: &TransformerSpec) -> Vec<Entry> {
    let mut out = vec![Entry::new("embed.word", "model.shared.weight", Layout::Same)];
    for (name, s) in spec.stacks() {
        let at = format!("model.{name}");
        let position = format!("{at}.embed_positions.weight");
        out.push(Entry::new(format!("{name}.embed.position"), position, Layout::Same));
        pairs(
            &mut out,
            format!("{name}.embed.norm"),
            format!("{at}.layernorm_embedding"),
            Layout::Same,
            true,
        );
        for i in 0..s.layers {
            let mut layer = |ours: &str, theirs: &str| {
                let theirs = format!("{at}.layers.{i}.{theirs}");
                pairs(&mut out, format!("{name}.{i}.{ours}"), theirs, Layout::Same, true);
            };
            for (p, theirs) in [("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")] {
                layer(&format!("attn.{p}"), &format!("self_attn.{theirs}"));
                if s.cross {
                    layer(&format!("cross.{p}"), &format!("encoder_attn.{theirs}"));
                }
            }
            layer("attn.norm", "self_attn_layer_norm");
            if s.cross {
                layer("cross.norm", "encoder_attn_layer_norm");
            }
            layer("ffn.in", "fc1");
            layer("ffn.out", "fc2");
            layer("ffn.norm", "final_layer_norm");
        }
    }
    if let Head::LanguageModel { .. } = spec.head {
        out.push(Entry::new("head.out.bias", "final_logits_bias", Layout::Constant));
    }
    out
}
