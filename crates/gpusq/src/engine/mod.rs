//! The CPU engine: packed encoder models from tokens to logits, without a tape.
//!
//! It interprets the same [`TransformerSpec`] as the training forward and calls the same kernels for all
//! that is not a linear map, so its answers are the fake-quantised forward's bit for bit: equal INT8 codes
//! give equal 32-bit sums, which are scaled by the same f32 operations. (The dense weights must be equal
//! too: see [`Model::packed`].) Weights are expanded and reordered once, when they are loaded: no CPU has
//! a sparse dot product.

mod site;

use std::collections::BTreeMap;

use gpusq_tensor::ops::activation::{self, Activation};
use gpusq_tensor::ops::attention::{self, Attention};
use gpusq_tensor::ops::embedding::{self, Rows};
use gpusq_tensor::ops::rotary::{self, RotaryTable};
use gpusq_tensor::ops::{add, gated, int8_linear, layer_norm, linear, rms_norm, select};
use gpusq_tensor::{DType, Tensor};

use crate::inputs::{Inputs, Tokens, attention_of, position_rows};
use crate::model::Model;
use crate::sparsity::Pattern;
use crate::spec::{Head, Norm, NormOrder, Positions, Stack, TransformerSpec};
use crate::{Error, Result};

use site::{Site, Weights};

/// INT8 codes by the name of the linear maps' input ([`crate::spec::Linear::input`]), i8 `[rows, width]`.
pub type Codes = BTreeMap<String, Tensor>;

/// A packed model, ready to run. It may serve any number of threads at once.
pub struct Engine {
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
        match (self.kind, &self.bias) {
            (Norm::Layer { eps }, Some(bias)) => layer_norm::apply(x, residual, &self.gain, bias, eps),
            (Norm::Layer { eps } | Norm::Rms { eps }, _) => match residual {
                Some(r) => rms_norm::apply(&add::apply(x, r), &self.gain, eps),
                None => rms_norm::apply(x, &self.gain, eps),
            },
        }
    }
}

impl Engine {
    /// Prepares a packed encoder model: reorders INT8 weights for this CPU, expands f16 ones to f32.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a model that is not packed or has a decoder, an attention pattern that
    /// cannot be run, and weights that are missing or do not fit the specification.
    pub fn load(model: &Model) -> Result<Engine> {
        if !model.stage.packed() {
            let message =
                format!("the engine runs packed models, and this one is {}; pack it", model.stage.title());
            return Err(Error::Mismatch(message));
        }
        let spec = model.spec.clone();
        let (Some(stack), None) = (spec.encoder.clone(), &spec.decoder) else {
            let message = "the engine runs encoders; this model has a decoder, and generation comes later";
            return Err(Error::Mismatch(message.into()));
        };
        if let Some(p) = model.attention.filter(|p| !attention::allowed(p.keep, p.of)) {
            let message = format!("attention pattern {p}: keep must be below of, a power of two up to 256");
            return Err(Error::Mismatch(message));
        }
        let w = Weights::new(&spec, &model.params);
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
                qkv: w.site(&at("attn"))?,
                attention_out: w.site(&at("attn.o"))?,
                ffn_norm: Normal::load(&w, &at("ffn.norm"), stack.norm)?,
                ffn_in: w.site(&at("ffn"))?,
                ffn_out: w.site(&at("ffn.out"))?,
            })
        };
        let blocks = (0..stack.layers).map(block).collect::<Result<Vec<_>>>()?;
        let final_norm =
            stack.final_norm.then(|| Normal::load(&w, "encoder.norm", stack.norm)).transpose()?;
        let project_out = optional(e.projected, "encoder.project_out.weight")?;
        let (head_dense, head_out) = match &spec.head {
            Head::None => (None, None),
            Head::Span => (None, Some(w.site("head.out")?)),
            Head::Classify { dense, .. } => {
                let dense = dense.map(|f| Ok::<_, Error>((w.site("head.dense")?, f))).transpose()?;
                (dense, Some(w.site("head.out")?))
            }
            Head::LanguageModel { .. } => {
                let message = "the engine runs classifiers and span heads; this model has a language model's";
                return Err(Error::Mismatch(message.into()));
            }
        };
        // Rows are independent after the last attention. Integer products of fewer rows are the same; of f32
        // products that would depend on how the library sums.
        let first_only = matches!(spec.head, Head::Classify { .. })
            && project_out.is_none()
            && blocks
                .last()
                .is_some_and(|b| [&b.attention_out, &b.ffn_in, &b.ffn_out].iter().all(|s| s.integer()));
        Ok(Engine {
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

    /// The head's output: f32 `[batch, outputs]` of a classifier, `[batch * length, 2]` (start and end) of a
    /// span head, and the last hidden states `[batch * length, hidden]` without a head.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for inputs that do not fit the model: none at all, lists of other lengths than
    /// `batch * length`, sequences that are too long, ids outside a table.
    pub fn run(&self, inputs: &Inputs) -> Result<Tensor> {
        self.pass(inputs, None)
    }

    /// [`Engine::run`], and the INT8 codes that every quantised linear map read. Where the head reads the
    /// first token of each sequence only, the last block's codes after attention are of these rows.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn run_tapped(&self, inputs: &Inputs) -> Result<(Tensor, Codes)> {
        let mut codes = Codes::new();
        let logits = self.pass(inputs, Some(&mut codes))?;
        Ok((logits, codes))
    }

    fn pass(&self, inputs: &Inputs, taps: Option<&mut Codes>) -> Result<Tensor> {
        if inputs.target.is_some() {
            return Err(Error::Mismatch("an encoder has no target tokens".into()));
        }
        self.check(&inputs.tokens)?;
        let tokens = &inputs.tokens;
        let mut pass = Pass { engine: self, codes: Vec::new(), taps };
        // Entering the thread pool once is cheaper than once for each operation.
        Ok(rayon::scope(|_| {
            let hidden = pass.stack(tokens);
            pass.head(hidden, tokens)
        }))
    }

    fn check(&self, t: &Tokens) -> Result<()> {
        let fail = |message: String| Err(Error::Mismatch(message));
        if t.batch == 0 || t.length == 0 {
            return fail(format!("there are no tokens in a batch of {} x {}", t.batch, t.length));
        }
        if t.length > self.spec.max_length() {
            return fail(format!(
                "sequences of {} tokens for a model of at most {}; truncate them",
                t.length,
                self.spec.max_length()
            ));
        }
        let Some(count) = t.batch.checked_mul(t.length).filter(|&n| n == t.ids.len()) else {
            return fail(format!("{} token ids for a batch of {} x {}", t.ids.len(), t.batch, t.length));
        };
        if let Some(id) = t.ids.iter().find(|&&id| id as usize >= self.spec.vocab) {
            return fail(format!(
                "token id {id} for a vocabulary of {}; is this the model's tokenizer?",
                self.spec.vocab
            ));
        }
        let types = self.stack.embed.types;
        if types > 0 && !t.types.is_empty() {
            if t.types.len() != count {
                return fail(format!("{} token types for {count} tokens", t.types.len()));
            }
            if let Some(id) = t.types.iter().find(|&&id| id as usize >= types) {
                return fail(format!("token type {id} for a model of {types}"));
            }
        }
        match &t.mask {
            Some(m) if m.len() != count => fail(format!("a mask of {} for {count} tokens", m.len())),
            _ => Ok(()),
        }
    }
}

/// One run.
struct Pass<'a> {
    engine: &'a Engine,
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
        let (e, how) = (&self.engine.embed, &self.engine.stack.embed);
        let positions = match &how.positions {
            Positions::Learned { numbering, .. } => {
                position_rows(tokens, *numbering, self.engine.spec.tokens.pad)
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

    /// Last hidden states, of the first tokens only if that is what [`Engine::first_only`] says.
    fn stack(&mut self, tokens: &Tokens) -> Tensor {
        let engine = self.engine;
        let s = &engine.stack;
        let rotation = match &s.embed.positions {
            Positions::Rotary { frequency, .. } => {
                let positions = (0..tokens.ids.len()).map(|t| (t % tokens.length) as u32).collect();
                Some((RotaryTable::new(tokens.length, frequency), positions))
            }
            Positions::Learned { .. } => None,
        };
        // Dropout is training's, and would limit the size of a batch.
        let how = Attention { dropout: 0.0, ..attention_of(s, tokens, tokens, s.causal, engine.pattern) };
        let first = engine.first_only.then(|| first_tokens(tokens));
        let mut x = self.embed(tokens);
        for (i, block) in engine.blocks.iter().enumerate() {
            let rows = first.as_deref().filter(|_| i + 1 == engine.blocks.len());
            x = self.block(block, x, &how, rotation.as_ref(), rows);
        }
        if let Some(norm) = &engine.final_norm {
            x = norm.apply(&x, None);
        }
        match &engine.project_out {
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
        let s = &self.engine.stack;
        let qkv = match s.order {
            NormOrder::Pre => self.site(&b.qkv, &b.attention_norm.apply(&x, None)),
            NormOrder::Post => self.site(&b.qkv, &x),
        };
        let [mut q, mut k, v] = <[Tensor; 3]>::try_from(qkv).expect("an attention has three projections");
        if let Some((table, positions)) = rotation {
            q = rotary::apply(&q, positions, table);
            k = rotary::apply(&k, positions, table);
        }
        let mut y = attention::apply(&q, &k, &v, how);
        if let Some(rows) = rows {
            (x, y) = (select::apply(&x, rows), select::apply(&y, rows));
        }
        let y = self.single(&b.attention_out, &y);
        x = join(s.order, &b.attention_norm, &x, &y);
        let inner = match s.order {
            NormOrder::Pre => self.site(&b.ffn_in, &b.ffn_norm.apply(&x, None)),
            NormOrder::Post => self.site(&b.ffn_in, &x),
        };
        let y = match &inner[..] {
            [gate, up] => self.single(&b.ffn_out, &gated::apply(gate, up)),
            [inner] => self.single(&b.ffn_out, &activation::apply(inner, s.activation)),
            _ => unreachable!("a feed-forward begins with one or two projections"),
        };
        join(s.order, &b.ffn_norm, &x, &y)
    }

    fn head(&mut self, hidden: Tensor, tokens: &Tokens) -> Tensor {
        let engine = self.engine;
        let Some(out) = &engine.head_out else { return hidden };
        let mut x = hidden;
        if matches!(engine.spec.head, Head::Classify { .. }) && !engine.first_only {
            x = select::apply(&x, &first_tokens(tokens));
        }
        match &engine.head_dense {
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

/// The residual connection around a sub-layer that made `y` of `x`.
fn join(order: NormOrder, norm: &Normal, x: &Tensor, y: &Tensor) -> Tensor {
    match order {
        NormOrder::Pre => add::apply(x, y),
        NormOrder::Post => norm.apply(y, Some(x)),
    }
}
