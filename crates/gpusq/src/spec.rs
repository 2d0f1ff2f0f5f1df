//! One transformer with options: everything the forward pass and the engine need to know about a model.
//!
//! A specification also names every weight the model has. Names are built here and nowhere else.

use std::ops::Range;

use gpusq_tensor::ops::activation::Activation;

/// A transformer: an encoder, a decoder, or both, and what stands on top.
#[derive(Clone, Debug, PartialEq)]
pub struct TransformerSpec {
    /// Entries of the word embedding.
    pub vocab: usize,
    /// Width of the word embedding.
    pub embed_width: usize,
    /// Bidirectional stack over the input.
    pub encoder: Option<Stack>,
    /// Causal stack over the input (decoder-only) or over the target (with an encoder).
    pub decoder: Option<Stack>,
    /// What makes outputs of the last hidden states.
    pub head: Head,
    /// Ids with a meaning of their own.
    pub tokens: SpecialTokens,
}

/// Token ids with a meaning; absent where a model has none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SpecialTokens {
    /// Padding.
    pub pad: Option<u32>,
    /// Begin of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// First decoder input of an encoder-decoder.
    pub decoder_start: Option<u32>,
}

/// A stack of identical transformer blocks with its embeddings.
#[derive(Clone, Debug, PartialEq)]
pub struct Stack {
    /// Blocks.
    pub layers: usize,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; fewer than `heads` for grouped-query attention.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Inner width of the feed-forward.
    pub ffn: usize,
    /// Its activation (of the gate where `gated`).
    pub activation: Activation,
    /// Feed-forward is `out(silu(gate(x)) * in(x))`.
    pub gated: bool,
    /// Query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// The other projections of a block have a bias.
    pub bias: bool,
    /// Normalisation.
    pub norm: Norm,
    /// Where a block normalises.
    pub order: NormOrder,
    /// A normalisation after the last block.
    pub final_norm: bool,
    /// A query sees itself and earlier positions only.
    pub causal: bool,
    /// Blocks attend to the encoder's output between self-attention and feed-forward.
    pub cross: bool,
    /// What comes before the first block.
    pub embed: Embed,
    /// Probabilities of dropout in training.
    pub dropout: Dropout,
}

/// Kind of normalisation, with the constant added to the variance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// Mean and variance; gain and bias.
    Layer {
        /// Added to the variance.
        eps: f32,
    },
    /// Root mean square; gain only.
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
}

/// Where a block normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormOrder {
    /// Before each sub-layer: `x + f(norm(x))`.
    Pre,
    /// After each residual sum: `norm(x + f(x))`.
    Post,
}

/// A stack's input embeddings.
#[derive(Clone, Debug, PartialEq)]
pub struct Embed {
    /// Factor of the word embedding.
    pub scale: f32,
    /// How positions enter.
    pub positions: Positions,
    /// Entries of the token-type table; 0 without one.
    pub types: usize,
    /// A normalisation after the sum.
    pub norm: bool,
    /// Linear maps between the embedding's and the hidden width, before the first and after the last block.
    pub projected: bool,
}

/// How positions enter a stack.
#[derive(Clone, Debug, PartialEq)]
pub enum Positions {
    /// A learned table of `entries` rows.
    Learned {
        /// Rows.
        entries: usize,
        /// Which row a token takes.
        numbering: Numbering,
    },
    /// Rotation of queries and keys by `position * frequency[i]`.
    Rotary {
        /// One angle per position for each pair of elements of a head.
        frequency: Vec<f64>,
        /// Longest sequence the model was made for.
        limit: usize,
    },
}

/// Which row of the position table a token takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbering {
    /// Index in the sequence plus an offset.
    Index {
        /// Row of the first token.
        offset: usize,
    },
    /// Count of unpadded tokens before it plus an offset; padding takes row `offset - 1`.
    Unpadded {
        /// Row of the first unpadded token.
        offset: usize,
    },
}

/// Probabilities of dropout in training.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropout {
    /// Of embeddings and of each sub-layer's output.
    pub hidden: f32,
    /// Of attention weights.
    pub attention: f32,
    /// Before the classifier.
    pub head: f32,
}

/// What makes outputs of the last hidden states.
#[derive(Clone, Debug, PartialEq)]
pub enum Head {
    /// Nothing: hidden states are the output.
    None,
    /// First token, an optional dense layer, a projection: `[batch, outputs]`.
    Classify {
        /// Classes, or 1 for regression.
        outputs: usize,
        /// Activation of the dense layer before the projection.
        dense: Option<Activation>,
    },
    /// Start and end logits of each token: `[batch, length, 2]`.
    Span,
    /// Logits over the vocabulary of each token: `[batch, length, vocab]`.
    LanguageModel {
        /// The projection is the word embedding.
        tied: bool,
        /// A bias on the logits.
        bias: bool,
    },
}

/// The role of a linear map, which decides what a configuration may switch for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Attention output projection.
    AttentionOut,
    /// First feed-forward projection (and the gate).
    FeedForwardIn,
    /// Second feed-forward projection.
    FeedForwardOut,
    /// Projections of the head.
    Head,
}

/// One linear map of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// `name.weight` `[rows, cols]` and, if `bias`, `name.bias` `[rows]`.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Whether there is a bias.
    pub bias: bool,
    /// Name of its input; maps that read the same tensor share it, and with it one activation scale.
    pub input: String,
    /// Role in the block.
    pub role: Role,
}

/// Whether the weight called `name` is an activation's step size.
pub fn is_step_size(name: &str) -> bool {
    name.ends_with(".input_scale") || name.ends_with(".output_scale")
}

impl Linear {
    /// Name of the step size of its input.
    pub fn input_scale(&self) -> String {
        format!("{}.input_scale", self.input)
    }

    /// Name of the step size of its output.
    pub fn output_scale(&self) -> String {
        format!("{}.output_scale", self.name)
    }
}

/// What one process of a pipeline holds and computes: some blocks of the only stack, with the embeddings if they are the
/// first ones, and with the head if they are the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Which of the sections it is.
    pub index: usize,
    /// Sections of the model.
    pub of: usize,
    /// Its blocks.
    pub blocks: Range<usize>,
}

impl Section {
    /// Whether it begins with the embeddings.
    pub fn is_first(&self) -> bool {
        self.index == 0
    }

    /// Whether it ends with the head.
    pub fn is_last(&self) -> bool {
        self.index + 1 == self.of
    }

    /// Whether the weight called `name`, or the step size, is one of its own.
    pub fn owns(&self, name: &str) -> bool {
        let part = name.split_once('.').map_or(name, |(_, part)| part);
        match part.split('.').next().map(str::parse::<usize>) {
            Some(Ok(block)) => self.blocks.contains(&block),
            _ if name.starts_with("embed.") || part.starts_with("embed.") => self.is_first(),
            // The last norm and projection of the stack, and the head.
            _ => self.is_last(),
        }
    }
}

impl TransformerSpec {
    /// The model in `n` sections, each with as many blocks as the next or one less; or why that cannot be.
    pub fn sections(&self, n: usize) -> Result<Vec<Section>, String> {
        let stacks: Vec<&Stack> = self.stacks().map(|(_, stack)| stack).collect();
        let [stack] = stacks[..] else {
            return Err(
                "only models with one stack can be split, and this one has an encoder and a decoder".into()
            );
        };
        if let Head::LanguageModel { tied: true, .. } = self.head {
            let message = "the head of this language model is its word embedding, which the first process of a pipeline \
                           holds and the last one needs";
            return Err(message.into());
        }
        if n == 0 || n > stack.layers {
            return Err(format!("each process needs a block, and the model has {}", stack.layers));
        }
        let blocks = |i: usize| i * stack.layers / n..(i + 1) * stack.layers / n;
        Ok((0..n).map(|index| Section { index, of: n, blocks: blocks(index) }).collect())
    }

    /// The stacks by name.
    pub fn stacks(&self) -> impl Iterator<Item = (&'static str, &Stack)> {
        let encoder = self.encoder.iter().map(|s| ("encoder", s));
        encoder.chain(self.decoder.iter().map(|s| ("decoder", s)))
    }

    /// The stack whose hidden states the head reads.
    pub fn last_stack(&self) -> &Stack {
        self.decoder.as_ref().or(self.encoder.as_ref()).expect("a transformer has a stack")
    }

    /// Longest input.
    pub fn max_length(&self) -> usize {
        let stack = self.encoder.as_ref().or(self.decoder.as_ref()).expect("a transformer has a stack");
        match &stack.embed.positions {
            Positions::Learned { entries, numbering } => match numbering {
                Numbering::Index { offset } | Numbering::Unpadded { offset } => entries - offset,
            },
            Positions::Rotary { limit, .. } => *limit,
        }
    }

    /// Every linear map inside the blocks and the head, in the order of the forward pass. The tied
    /// projection of a language model is not among them: it is the word embedding until it is untied.
    pub fn linears(&self) -> Vec<Linear> {
        let mut out = Vec::new();
        let mut push = |name: String, rows, cols, bias, input: String, role| {
            out.push(Linear { name, rows, cols, bias, input, role });
        };
        for (stack_name, s) in self.stacks() {
            let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
            let source = self.encoder.as_ref().map_or(s.hidden, |e| e.hidden);
            for i in 0..s.layers {
                let at = |part: &str| format!("{stack_name}.{i}.{part}");
                let mut attention = |kind: &str, q_input: &str, kv_input: &str, width: usize| {
                    push(at(&format!("{kind}.q")), q, s.hidden, s.qkv_bias, at(q_input), Role::Query);
                    push(at(&format!("{kind}.k")), kv, width, s.qkv_bias, at(kv_input), Role::Key);
                    push(at(&format!("{kind}.v")), kv, width, s.qkv_bias, at(kv_input), Role::Value);
                    let o = at(&format!("{kind}.o"));
                    push(o.clone(), s.hidden, q, s.bias, o, Role::AttentionOut);
                };
                attention("attn", "attn", "attn", s.hidden);
                if s.cross {
                    attention("cross", "cross.q", "cross.kv", source);
                }
                if s.gated {
                    push(at("ffn.gate"), s.ffn, s.hidden, s.bias, at("ffn"), Role::FeedForwardIn);
                }
                push(at("ffn.in"), s.ffn, s.hidden, s.bias, at("ffn"), Role::FeedForwardIn);
                push(at("ffn.out"), s.hidden, s.ffn, s.bias, at("ffn.out"), Role::FeedForwardOut);
            }
        }
        let hidden = self.last_stack().hidden;
        let mut head = |name: &str, rows, cols, bias| {
            push(name.to_string(), rows, cols, bias, name.to_string(), Role::Head);
        };
        match &self.head {
            Head::None | Head::LanguageModel { tied: true, .. } => {}
            Head::Classify { outputs, dense } => {
                if dense.is_some() {
                    head("head.dense", hidden, hidden, true);
                }
                head("head.out", *outputs, hidden, true);
            }
            Head::Span => head("head.out", 2, hidden, true),
            Head::LanguageModel { tied: false, bias } => {
                head("head.out", self.vocab, self.embed_width, *bias)
            }
        }
        out
    }

    /// Every weight the model has, with its shape, in no particular order.
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        let mut out = vec![("embed.word".to_string(), vec![self.vocab, self.embed_width])];
        for l in self.linears() {
            out.push((format!("{}.weight", l.name), vec![l.rows, l.cols]));
            if l.bias {
                out.push((format!("{}.bias", l.name), vec![l.rows]));
            }
        }
        if let Head::LanguageModel { tied: true, bias: true } = self.head {
            out.push(("head.out.bias".into(), vec![self.vocab]));
        }
        for (name, s) in self.stacks() {
            let mut norm = |at: String| {
                out.push((format!("{at}.weight"), vec![s.hidden]));
                if let Norm::Layer { .. } = s.norm {
                    out.push((format!("{at}.bias"), vec![s.hidden]));
                }
            };
            for i in 0..s.layers {
                norm(format!("{name}.{i}.attn.norm"));
                if s.cross {
                    norm(format!("{name}.{i}.cross.norm"));
                }
                norm(format!("{name}.{i}.ffn.norm"));
            }
            if s.final_norm {
                norm(format!("{name}.norm"));
            }
            if s.embed.norm {
                norm(format!("{name}.embed.norm"));
            }
            if s.embed.projected {
                out.push((format!("{name}.embed.project_in.weight"), vec![s.hidden, self.embed_width]));
                out.push((format!("{name}.project_out.weight"), vec![self.embed_width, s.hidden]));
            }
            if let Positions::Learned { entries, .. } = s.embed.positions {
                out.push((format!("{name}.embed.position"), vec![entries, s.hidden]));
            }
            if s.embed.types > 0 {
                out.push((format!("{name}.embed.type"), vec![s.embed.types, s.hidden]));
            }
        }
        out
    }
}
