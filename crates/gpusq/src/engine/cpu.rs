//! The engine on a CPU.
//!
//! It interprets the same [`TransformerSpec`] as the training forward and calls the same kernels for all
//! that is not a linear map, so its answers are the fake-quantised forward's bit for bit: equal INT8 codes
//! give equal 32-bit sums, which are scaled by the same f32 operations. (The dense weights must be equal
//! too: see [`Model::packed`].) Weights are expanded and reordered once, when they are loaded: no CPU has
//! a sparse dot product.

use gpusq_tensor::ops::activation::{self, Activation};
use gpusq_tensor::ops::attention::{self, Attention, Half};
use gpusq_tensor::ops::embedding::{self, Rows};
use gpusq_tensor::ops::rotary::{self, RotaryTable};
use gpusq_tensor::ops::{add, gated, int8_linear, layer_norm, linear, rms_norm, select};
use gpusq_tensor::{DType, Tensor};

use crate::inputs::{Tokens, attention_of, position_rows};
use crate::model::Model;
use crate::sparsity::Pattern;
use crate::spec::{Head, Norm, NormOrder, Positions, Stack, TransformerSpec};
use crate::{Error, Result};

use super::Codes;
use super::site::Site;
use super::weights::Weights;

/// A packed model in the layout of this CPU's kernels.
pub(super) struct Encoder {
    spec: TransformerSpec,
    stack: Stack,
    pattern: Option<Pattern>,
    embed: Embedding,
    blocks: Vec<Block>,
    final_norm: Option<Normal>,
    project_out: Option<Tensor>,
    head_dense: Option<(Site, Activation)>,
    head_out: Option<Site>,
    /// The last block computes only what the classifier reads.
    first_only: bool,
}

struct Embedding {
    word: Tensor,
    position: Option<Tensor>,
    types: Option<Tensor>,
    norm: Option<Normal>,
    project_in: Option<Tensor>,
}

struct Block {
    attention_norm: Normal,
    /// Query, key, value.
    qkv: Site,
    attention_out: Site,
    ffn_norm: Normal,
    /// The gate, if there is one, and the first projection.
    ffn_in: Site,
    ffn_out: Site,
}

/// A normalisation with its weights.
struct Normal {
    kind: Norm,
    gain: Tensor,
    bias: Option<Tensor>,
}

impl Normal {
    fn load(w: &Weights, name: &str, kind: Norm) -> Result<Self> {
        let gain = w.dense(&format!("{name}.weight"))?;
        let bias = match kind {
            Norm::Layer { .. } => Some(w.dense(&format!("{name}.bias"))?),
            Norm::Rms { .. } => None,
        };
        Ok(Normal { kind, gain, bias })
    }

    fn apply(&self, x: &Tensor, residual: Option<&Tensor>) -> Tensor {
        self.of(x, residual, false)
    }

    /// `half`: what is summed is rounded to f16 first.
    fn of(&self, x: &Tensor, residual: Option<&Tensor>, half: bool) -> Tensor {
        match (self.kind, &self.bias) {
            (Norm::Layer { eps }, Some(bias)) => layer_norm::apply(x, residual, &self.gain, bias, eps, half),
            (Norm::Layer { eps } | Norm::Rms { eps }, _) => match residual {
                Some(r) => rms_norm::apply(&add::apply(x, r), &self.gain, eps),
                None => rms_norm::apply(x, &self.gain, eps),
            },
        }
    }
}

impl Encoder {
    /// Reorders INT8 weights for this CPU, expands f16 ones to f32.
    pub(super) fn load(model: &Model, stack: &Stack) -> Result<Encoder> {
        let (spec, stack) = (model.spec.clone(), stack.clone());
        let w = Weights::new(&spec, &model.params);
        let site = |input: &str| w.readers(input).map(Site::new);
        let optional = |wanted: bool, name: &str| wanted.then(|| w.dense(name)).transpose();
        let e = &stack.embed;
        let embed = Embedding {
            word: w.dense("embed.word")?,
            position: optional(matches!(e.positions, Positions::Learned { .. }), "encoder.embed.position")?,
            types: optional(e.types > 0, "encoder.embed.type")?,
            norm: e.norm.then(|| Normal::load(&w, "encoder.embed.norm", stack.norm)).transpose()?,
            project_in: optional(e.projected, "encoder.embed.project_in.weight")?,
        };
        let block = |i: usize| -> Result<Block> {
            let at = |part: &str| format!("encoder.{i}.{part}");
            Ok(Block {
                attention_norm: Normal::load(&w, &at("attn.norm"), stack.norm)?,
                qkv: site(&at("attn"))?,
                attention_out: site(&at("attn.o"))?,
                ffn_norm: Normal::load(&w, &at("ffn.norm"), stack.norm)?,
                ffn_in: site(&at("ffn"))?,
                ffn_out: site(&at("ffn.out"))?,
            })
        };
        let blocks = (0..stack.layers).map(block).collect::<Result<Vec<_>>>()?;
        let final_norm =
            stack.final_norm.then(|| Normal::load(&w, "encoder.norm", stack.norm)).transpose()?;
        let project_out = optional(e.projected, "encoder.project_out.weight")?;
        let (head_dense, head_out) = match &spec.head {
            Head::None => (None, None),
            Head::Span => (None, Some(site("head.out")?)),
            Head::Classify { dense, .. } => {
                let dense = dense.map(|f| Ok::<_, Error>((site("head.dense")?, f))).transpose()?;
                (dense, Some(site("head.out")?))
            }
            Head::LanguageModel { .. } => unreachable!("refused when the engine was asked for"),
        };
        // Rows are independent after the last attention. Integer products of fewer rows are the same; of f32
        // products that would depend on how the library sums.
        let first_only = matches!(spec.head, Head::Classify { .. })
            && project_out.is_none()
            && blocks
                .last()
                .is_some_and(|b| [&b.attention_out, &b.ffn_in, &b.ffn_out].iter().all(|s| s.integer()));
        Ok(Encoder {
            stack,
            pattern: model.attention,
            embed,
            blocks,
            final_norm,
            project_out,
            head_dense,
            head_out,
            first_only,
            spec,
        })
    }

    /// The head's output for tokens that fit the model, and in `taps` the codes on the way.
    pub(super) fn run(&self, tokens: &Tokens, taps: Option<&mut Codes>) -> Tensor {
        let mut pass = Pass { encoder: self, codes: Vec::new(), taps };
        // Entering the thread pool once is cheaper than once for each operation.
        rayon::scope(|_| {
            let hidden = pass.stack(tokens);
            pass.head(hidden, tokens)
        })
    }
}

/// One run.
struct Pass<'a> {
    encoder: &'a Encoder,
    /// Codes of the current input, kept for their memory.
    codes: Vec<i8>,
    taps: Option<&'a mut Codes>,
}

impl Pass<'_> {
    /// What the maps of `site` make of `x`.
    fn site(&mut self, site: &Site, x: &Tensor) -> Vec<Tensor> {
        if let Some(scale) = site.scale() {
            self.codes.resize(x.len(), 0);
            int8_linear::quantize(x.f32(), scale, &mut self.codes);
            if let Some(taps) = &mut self.taps {
                taps.insert(site.input().to_string(), Tensor::from_i8(self.codes.clone(), x.shape()));
            }
        }
        site.apply(x, &self.codes)
    }

    /// What the only map of `site` makes of `x`.
    fn single(&mut self, site: &Site, x: &Tensor) -> Tensor {
        let mut outputs = self.site(site, x);
        assert_eq!(outputs.len(), 1, "one map reads `{}`", site.input());
        outputs.swap_remove(0)
    }

    fn embed(&self, tokens: &Tokens) -> Tensor {
        let (e, how) = (&self.encoder.embed, &self.encoder.stack.embed);
        let positions = match &how.positions {
            Positions::Learned { numbering, .. } => {
                position_rows(tokens, *numbering, self.encoder.spec.tokens.pad)
            }
            Positions::Rotary { .. } => Vec::new(),
        };
        let zeros = if tokens.types.is_empty() { vec![0; tokens.ids.len()] } else { Vec::new() };
        let types = if tokens.types.is_empty() { &zeros } else { &tokens.types };
        let word = Rows { table: &e.word, ids: &tokens.ids, factor: how.scale };
        let rest = [(&e.position, &positions), (&e.types, types)];
        let rest = rest
            .into_iter()
            .filter_map(|(table, ids)| table.as_ref().map(|table| Rows { table, ids, factor: 1.0 }));
        let sum = match &e.project_in {
            None => embedding::apply(&[word].into_iter().chain(rest).collect::<Vec<_>>(), DType::F32),
            // Positions are as wide as the hidden states, so they join after the projection.
            Some(project) => {
                let x = linear::apply(&embedding::apply(&[word], DType::F32), project, None);
                let rest: Vec<Rows> = rest.collect();
                if rest.is_empty() { x } else { add::apply(&x, &embedding::apply(&rest, DType::F32)) }
            }
        };
        match &e.norm {
            Some(norm) => norm.apply(&sum, None),
            None => sum,
        }
    }

    /// Last hidden states, of the first tokens only if that is what [`Encoder::first_only`] says.
    fn stack(&mut self, tokens: &Tokens) -> Tensor {
        let encoder = self.encoder;
        let s = &encoder.stack;
        let rotation = match &s.embed.positions {
            Positions::Rotary { frequency, .. } => {
                let positions = (0..tokens.ids.len()).map(|t| (t % tokens.length) as u32).collect();
                Some((RotaryTable::new(tokens.length, frequency), positions))
            }
            Positions::Learned { .. } => None,
        };
        // Dropout is training's, and would limit the size of a batch.
        let how = Attention { dropout: 0.0, ..attention_of(s, tokens, tokens, s.causal, encoder.pattern) };
        let first = encoder.first_only.then(|| first_tokens(tokens));
        let mut x = self.embed(tokens);
        for (i, block) in encoder.blocks.iter().enumerate() {
            let rows = first.as_deref().filter(|_| i + 1 == encoder.blocks.len());
            x = self.block(block, x, &how, rotation.as_ref(), rows);
        }
        if let Some(norm) = &encoder.final_norm {
            x = norm.apply(&x, None);
        }
        match &encoder.project_out {
            Some(w) => linear::apply(&x, w, None),
            None => x,
        }
    }

    /// One block; of its result only `rows`, if they are given.
    fn block(
        &mut self,
        b: &Block,
        mut x: Tensor,
        how: &Attention,
        rotation: Option<&(RotaryTable, Vec<u32>)>,
        rows: Option<&[u32]>,
    ) -> Tensor {
        let s = &self.encoder.stack;
        let qkv = match s.order {
            NormOrder::Pre => self.site(&b.qkv, &b.attention_norm.apply(&x, None)),
            NormOrder::Post => self.site(&b.qkv, &x),
        };
        let [mut q, mut k, v] = <[Tensor; 3]>::try_from(qkv).expect("an attention has three projections");
        if let Some((table, positions)) = rotation {
            q = rotary::apply(&q, positions, table);
            k = rotary::apply(&k, positions, table);
        }
        // What rotation makes of codes is none.
        let half = || Half { steps: b.qkv.output_steps().filter(|_| rotation.is_none()) };
        let how = &Attention { half: b.attention_out.integer().then(half), ..how.clone() };
        let mut y = attention::apply(&q, &k, &v, how);
        if let Some(rows) = rows {
            (x, y) = (select::apply(&x, rows), select::apply(&y, rows));
        }
        let y = self.single(&b.attention_out, &y);
        x = join(s.order, &b.attention_norm, &x, &y, b.attention_out.integer());
        let inner = match s.order {
            NormOrder::Pre => self.site(&b.ffn_in, &b.ffn_norm.apply(&x, None)),
            NormOrder::Post => self.site(&b.ffn_in, &x),
        };
        let y = match &inner[..] {
            [gate, up] => self.single(&b.ffn_out, &gated::apply(gate, up)),
            [inner] => self.single(&b.ffn_out, &activation::apply(inner, s.activation)),
            _ => unreachable!("a feed-forward begins with one or two projections"),
        };
        join(s.order, &b.ffn_norm, &x, &y, b.ffn_out.integer())
    }

    fn head(&mut self, hidden: Tensor, tokens: &Tokens) -> Tensor {
        let encoder = self.encoder;
        let Some(out) = &encoder.head_out else { return hidden };
        let mut x = hidden;
        if matches!(encoder.spec.head, Head::Classify { .. }) && !encoder.first_only {
            x = select::apply(&x, &first_tokens(tokens));
        }
        match &encoder.head_dense {
            Some((dense, function)) => {
                let x = self.single(dense, &x);
                self.single(out, &activation::apply(&x, *function))
            }
            None => self.single(out, &x),
        }
    }
}

/// Row of each sequence's first token.
fn first_tokens(tokens: &Tokens) -> Vec<u32> {
    (0..tokens.batch).map(|b| (b * tokens.length) as u32).collect()
}

/// The residual connection around a sub-layer that made `y` of `x`; before a norm both are rounded to f16 if `half`.
fn join(order: NormOrder, norm: &Normal, x: &Tensor, y: &Tensor, half: bool) -> Tensor {
    match order {
        NormOrder::Pre => add::apply(x, y),
        NormOrder::Post => norm.of(y, Some(x), half),
    }
}
