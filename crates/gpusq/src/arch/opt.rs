//! OPT (Zhang et al. 2022): decoder with learned positions offset by two, either norm order, and an
//! optional projection between embedding and hidden width.

use super::{Arch, Classes, Config, Entry, Layout, pairs};
use crate::Result;
use crate::spec::*;

pub(super) const ARCH: Arch = Arch {
    name: "opt",
    doc: "OPT",
    spec,
    tensors,
    prefix: "model.",
    classes: Classes { body: "OPTModel", classify: "", span: "", language_model: "OPTForCausalLM" },
    classifier: None,
};

/// Rows of the position table before the first position's.
const OFFSET: usize = 2;

fn spec(c: &Config) -> Result<TransformerSpec> {
    let (vocab, hidden) = (c.size("vocab_size")?, c.size("hidden_size")?);
    let (heads, head_dim) = c.heads("num_attention_heads", hidden)?;
    c.refuse("layer_norm_elementwise_affine", false)?;
    let bias = c.flag_or("enable_bias", true)?;
    let pre = c.flag_or("do_layer_norm_before", true)?;
    let embed_width = c.size_or("word_embed_proj_dim", hidden)?;
    let decoder = Stack {
        layers: c.count("num_hidden_layers")?,
        hidden,
        heads,
        kv_heads: heads,
        head_dim,
        ffn: c.size("ffn_dim")?,
        activation: c.activation("activation_function", "relu")?,
        gated: false,
        qkv_bias: bias,
        bias,
        norm: Norm::Layer { eps: 1e-5 },
        order: if pre { NormOrder::Pre } else { NormOrder::Post },
        final_norm: pre && !c.flag_or("_remove_final_layer_norm", false)?,
        causal: true,
        cross: false,
        embed: Embed {
            scale: 1.0,
            positions: Positions::Learned {
                entries: c.size("max_position_embeddings")? + OFFSET,
                numbering: Numbering::Unpadded { offset: OFFSET },
            },
            types: 0,
            norm: false,
            projected: embed_width != hidden,
        },
        dropout: Dropout {
            hidden: c.probability_or("dropout", 0.1)?,
            attention: c.probability_or("attention_dropout", 0.0)?,
            head: 0.0,
        },
    };
    let tied = c.flag_or("tie_word_embeddings", true)?;
    Ok(TransformerSpec {
        vocab,
        embed_width,
        encoder: None,
        decoder: Some(decoder),
        head: c.head(&ARCH.classes, None, Some(Head::LanguageModel { tied, bias: false }))?,
        tokens: SpecialTokens {
            pad: c.token("pad_token_id"),
            bos: c.token("bos_token_id"),
            eos: c.token("eos_token_id"),
            decoder_start: None,
        },
    })
}

fn tensors(spec: &TransformerSpec) -> Vec<Entry> {
    let s = spec.last_stack();
    let mut out = vec![
        Entry::new("embed.word", "model.decoder.embed_tokens.weight", Layout::Same),
        Entry::new("decoder.embed.position", "model.decoder.embed_positions.weight", Layout::Same),
    ];
    if s.embed.projected {
        for (ours, theirs) in
            [("decoder.embed.project_in", "project_in"), ("decoder.project_out", "project_out")]
        {
            pairs(&mut out, ours.into(), format!("model.decoder.{theirs}"), Layout::Same, false);
        }
    }
    for i in 0..s.layers {
        for (ours, theirs, bias) in [
            ("attn.q", "self_attn.q_proj", s.qkv_bias),
            ("attn.k", "self_attn.k_proj", s.qkv_bias),
            ("attn.v", "self_attn.v_proj", s.qkv_bias),
            ("attn.o", "self_attn.out_proj", s.bias),
            ("attn.norm", "self_attn_layer_norm", true),
            ("ffn.in", "fc1", s.bias),
            ("ffn.out", "fc2", s.bias),
            ("ffn.norm", "final_layer_norm", true),
        ] {
            let theirs = format!("model.decoder.layers.{i}.{theirs}");
            pairs(&mut out, format!("decoder.{i}.{ours}"), theirs, Layout::Same, bias);
        }
    }
    if s.final_norm {
        pairs(&mut out, "decoder.norm".into(), "model.decoder.final_layer_norm".into(), Layout::Same, true);
    }
    if let Head::LanguageModel { tied: false, .. } = spec.head {
        pairs(&mut out, "head.out".into(), "lm_head".into(), Layout::Same, false);
    }
    out
}
