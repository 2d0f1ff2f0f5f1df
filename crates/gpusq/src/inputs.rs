//! What a model reads, and what the training forward and the engine both derive from it.

use gpusq_tensor::Flags;
use gpusq_tensor::ops::attention::Attention;

use crate::sparsity::Pattern;
use crate::spec::{Numbering, Stack};

/// Padded sequences of one length.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// Sequences.
    pub batch: usize,
    /// Positions of each, padding included.
    pub length: usize,
    /// Token ids, `[batch * length]`.
    pub ids: Vec<u32>,
    /// Token types, `[batch * length]`; empty where the model has none.
    pub types: Vec<u32>,
    /// False for padding, `[batch * length]`; `None` if nothing is padded.
    pub mask: Option<Vec<bool>>,
}

impl Tokens {
    /// Tokens that are no padding.
    pub fn unpadded(&self) -> usize {
        self.mask.as_ref().map_or(self.ids.len(), |m| m.iter().filter(|&&m| m).count())
    }
}

/// Model inputs: the encoder's (or a decoder-only model's) tokens, and a target's for encoder-decoders.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inputs {
    /// Source tokens.
    pub tokens: Tokens,
    /// Target tokens of an encoder-decoder.
    pub target: Option<Tokens>,
}

/// Rows of the position table for `tokens` under `numbering`.
pub(crate) fn position_rows(tokens: &Tokens, numbering: Numbering, pad: Option<u32>) -> Vec<u32> {
    let mut out = Vec::with_capacity(tokens.ids.len());
    for b in 0..tokens.batch {
        let mut seen = 0;
        for i in 0..tokens.length {
            let at = b * tokens.length + i;
            out.push(match numbering {
                Numbering::Index { offset } => offset + i,
                Numbering::Unpadded { offset } => {
                    let padded = match &tokens.mask {
                        Some(m) => !m[at],
                        None => pad == Some(tokens.ids[at]),
                    };
                    if padded {
                        offset - 1
                    } else {
                        seen += 1;
                        offset + seen - 1
                    }
                }
            } as u32);
        }
    }
    out
}

/// The attention of stack `s` from `queries` to `keys`. Its mask goes to a GPU once: make it once for all layers.
pub(crate) fn attention_of(
    s: &Stack,
    queries: &Tokens,
    keys: &Tokens,
    causal: bool,
    pattern: Option<Pattern>,
) -> Attention {
    Attention {
        batch: queries.batch,
        queries: queries.length,
        keys: keys.length,
        heads: s.heads,
        kv_heads: s.kv_heads,
        scale: 1.0 / (s.head_dim as f32).sqrt(),
        causal,
        key_mask: keys.mask.as_deref().map(Flags::from),
        pattern: pattern.map(|p| (p.keep, p.of)),
        dropout: s.dropout.attention,
        half: None,
    }
}
