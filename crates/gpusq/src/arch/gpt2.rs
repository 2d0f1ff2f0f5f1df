//! GPT-2 (Radford et al. 2019): pre-norm decoder, learned positions, fused QKV stored `[in, 3 * out]`.

use super::{Arch, Classes, Config, Entry, Layout, pairs};
use crate::Result;
use crate::spec::*;

pub(super) const ARCH: Arch = Arch {
    name: "gpt2",
    doc: "GPT-2",
    spec,
    tensors,
    prefix: "transformer.",
    classes: Classes { body: "GPT2Model", classify: "", span: "", language_model: "GPT2LMHeadModel" },
    classifier: None,
};

fn spec(c: &Config) -> Result<TransformerSpec> {
    let (vocab, hidden) = (c.size("vocab_size")?, c.size("n_embd")?);
    let (heads, head_dim) = c.heads("n_head", hidden)?;
    c.refuse("scale_attn_by_inverse_layer_idx", true)?;
    c.refuse("scale_attn_weights", false)?;
    c.refuse("add_cross_attention", true)?;
    let entries = if c.get("n_positions").is_some() { c.size("n_positions")? } else { c.size("n_ctx")? };
    let decoder = Stack {
        layers: c.count("n_layer")?,
        hidden,
        heads,
        kv_heads: heads,
        head_dim,
        ffn: c.size_or("n_inner", 4 * hidden)?,
        activation: c.activation("activation_function", "gelu_new")?,
        gated: false,
        qkv_bias: true,
        bias: true,
        norm: Norm::Layer { eps: c.epsilon_or("layer_norm_epsilon", 1e-5)? },
        order: NormOrder::Pre,
        final_norm: true,
        causal: true,
        cross: false,
        embed: Embed {
            scale: 1.0,
            positions: Positions::Learned { entries, numbering: Numbering::Index { offset: 0 } },
            types: 0,
            norm: false,
            projected: false,
        },
        dropout: Dropout {
            hidden: c.probability_or("resid_pdrop", 0.1)?,
            attention: c.probability_or("attn_pdrop", 0.1)?,
            head: 0.0,
        },
    };
    let tied = c.flag_or("tie_word_embeddings", true)?;
    Ok(TransformerSpec {
        vocab,
        embed_width: hidden,
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
    let mut out = vec![
        Entry::new("embed.word", "transformer.wte.weight", Layout::Same),
        Entry::new("decoder.embed.position", "transformer.wpe.weight", Layout::Same),
    ];
    for i in 0..spec.last_stack().layers {
        let (ours, theirs) = (format!("decoder.{i}"), format!("transformer.h.{i}"));
        for (part, name) in ["q", "k", "v"].into_iter().enumerate() {
            let layout = Layout::Part { part, parts: 3 };
            pairs(&mut out, format!("{ours}.attn.{name}"), format!("{theirs}.attn.c_attn"), layout, true);
        }
        for (a, b) in [("attn.o", "attn.c_proj"), ("ffn.in", "mlp.c_fc"), ("ffn.out", "mlp.c_proj")] {
            pairs(&mut out, format!("{ours}.{a}"), format!("{theirs}.{b}"), Layout::Transposed, true);
        }
        for (a, b) in [("attn.norm", "ln_1"), ("ffn.norm", "ln_2")] {
            pairs(&mut out, format!("{ours}.{a}"), format!("{theirs}.{b}"), Layout::Same, true);
        }
    }
    pairs(&mut out, "decoder.norm".into(), "transformer.ln_f".into(), Layout::Same, true);
    if let Head::LanguageModel { tied: false, .. } = spec.head {
        pairs(&mut out, "head.out".into(), "lm_head".into(), Layout::Same, false);
    }
    out
}
