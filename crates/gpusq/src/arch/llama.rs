//! Llama (Touvron et al. 2023): pre-norm decoder with RMS norm, rotary positions, gated feed-forward and
//! grouped key/value heads.

use super::{Arch, Classes, Config, Entry, Layout, pairs};
use crate::Result;
use crate::spec::*;

pub(super) const ARCH: Arch = Arch {
    name: "llama",
    doc: "Llama and models of its shape (SmolLM2, TinyLlama)",
    spec,
    tensors,
    prefix: "model.",
    classes: Classes { body: "LlamaModel", classify: "", span: "", language_model: "LlamaForCausalLM" },
    classifier: None,
};

/// Angles per position, scaled as `rope_parameters` (or the older `rope_scaling`) asks.
fn frequencies(c: &Config, head_dim: usize) -> Result<Vec<f64>> {
    let rope = c.get("rope_parameters").or_else(|| c.get("rope_scaling"));
    let number = |key: &str| rope.and_then(|r| r.get(key)).and_then(|v| v.as_f64());
    let need = |key: &str| {
        let v = number(key).filter(|v| *v > 0.0);
        v.ok_or_else(|| c.error(format!("rope parameter `{key}` is missing or not a positive number")))
    };
    let theta = number("rope_theta").map_or_else(|| c.float_or("rope_theta", 10_000.0), Ok)?;
    let mut frequency: Vec<f64> =
        (0..head_dim / 2).map(|i| theta.powf(-(2.0 * i as f64) / head_dim as f64)).collect();
    let kind = rope.and_then(|r| r.get("rope_type").or_else(|| r.get("type"))).and_then(|v| v.as_str());
    match kind.unwrap_or("default") {
        "default" => {}
        "linear" => {
            let factor = need("factor")?;
            frequency.iter_mut().for_each(|f| *f /= factor);
        }
        "llama3" => {
            // Long wavelengths are slowed by `factor`, short ones kept, those between are blended.
            let (factor, low, high) = (need("factor")?, need("low_freq_factor")?, need("high_freq_factor")?);
            let trained = need("original_max_position_embeddings")?;
            for f in &mut frequency {
                let wavelength = 2.0 * std::f64::consts::PI / *f;
                let blend = ((trained / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                *f = (1.0 - blend) * *f / factor + blend * *f;
            }
        }
        other => {
            return Err(
                c.error(format!("rope_type `{other}` is not supported; supported: default, linear, llama3"))
            );
        }
    }
    Ok(frequency)
}

fn spec(c: &Config) -> Result<TransformerSpec> {
    let (vocab, hidden) = (c.size("vocab_size")?, c.size("hidden_size")?);
    let heads = c.size("num_attention_heads")?;
    let head_dim = if c.get("head_dim").is_some() {
        c.size("head_dim")?
    } else {
        c.heads("num_attention_heads", hidden)?.1
    };
    let kv_heads = c.size_or("num_key_value_heads", heads)?;
    if heads % kv_heads != 0 {
        return Err(c.error(format!(
            "`num_key_value_heads` {kv_heads} does not divide `num_attention_heads` {heads}"
        )));
    }
    if head_dim % 2 != 0 {
        return Err(c.error(format!("head width {head_dim} is odd; rotary positions turn pairs")));
    }
    c.refuse("mlp_bias", true)?;
    c.refuse("attention_bias", true)?;
    let decoder = Stack {
        layers: c.count("num_hidden_layers")?,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn: c.size("intermediate_size")?,
        activation: c.activation("hidden_act", "silu")?,
        gated: true,
        qkv_bias: false,
        bias: false,
        norm: Norm::Rms { eps: c.epsilon_or("rms_norm_eps", 1e-6)? },
        order: NormOrder::Pre,
        final_norm: true,
        causal: true,
        cross: false,
        embed: Embed {
            scale: 1.0,
            positions: Positions::Rotary {
                frequency: frequencies(c, head_dim)?,
                limit: c.size_or("max_position_embeddings", 2048)?,
            },
            types: 0,
            norm: false,
            projected: false,
        },
        dropout: Dropout { hidden: 0.0, attention: c.probability_or("attention_dropout", 0.0)?, head: 0.0 },
    };
    if decoder.activation != gpusq_tensor::ops::activation::Activation::Silu {
        return Err(c.wrong("hidden_act", "silu"));
    }
    let tied = c.flag_or("tie_word_embeddings", false)?;
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
    let mut out = vec![Entry::new("embed.word", "model.embed_tokens.weight", Layout::Same)];
    for i in 0..spec.last_stack().layers {
        for (ours, theirs) in [
            ("attn.q", "self_attn.q_proj"),
            ("attn.k", "self_attn.k_proj"),
            ("attn.v", "self_attn.v_proj"),
            ("attn.o", "self_attn.o_proj"),
            ("attn.norm", "input_layernorm"),
            ("ffn.gate", "mlp.gate_proj"),
            ("ffn.in", "mlp.up_proj"),
            ("ffn.out", "mlp.down_proj"),
            ("ffn.norm", "post_attention_layernorm"),
        ] {
            let theirs = format!("model.layers.{i}.{theirs}");
            pairs(&mut out, format!("decoder.{i}.{ours}"), theirs, Layout::Same, false);
        }
    }
    pairs(&mut out, "decoder.norm".into(), "model.norm".into(), Layout::Same, false);
    if let Head::LanguageModel { tied: false, .. } = spec.head {
        pairs(&mut out, "head.out".into(), "lm_head".into(), Layout::Same, false);
    }
    out
}
