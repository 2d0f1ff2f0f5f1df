//! The weights of a network on a GPU, and what is launched for a pass through it.

use std::collections::HashMap;

use gpusq_tensor::cuda::Gpu;
use gpusq_tensor::ops::codes::Codes;
use gpusq_tensor::ops::norm_codes::{self, Lookup, embed_norm};
use gpusq_tensor::ops::select::first_rows;
use gpusq_tensor::ops::sparse_linear::{Epilogue, Store, Weight};
use gpusq_tensor::ops::varlen_attention::{self, Qkv, attention};
use gpusq_tensor::{Device, Tensor};

use super::buffers::{Bucket, Buffers, FirstRows};
use super::maps::{Choice, Final, Joined, Map, Normed, States, Step, Way, unsupported};
use crate::engine::Products;
use crate::engine::plan::{Place, Row};
use crate::engine::weights::Weights;
use crate::model::Model;
use crate::spec::{Head, Norm, NormOrder, Positions, Stack};
use crate::{Error, Result};

/// Weights, and what is done with them.
pub(super) struct Network {
    pub(super) word: Tensor,
    /// Factor of the word embedding.
    pub(super) scale: f32,
    pub(super) position: Tensor,
    pub(super) types: Option<Tensor>,
    pub(super) norm: Normal,
    pub(super) blocks: Vec<Block>,
    pub(super) head: HeadMaps,
    pub(super) hidden: usize,
    pub(super) inner: usize,
    pub(super) attention: varlen_attention::Attention,
}

pub(super) struct Block {
    /// Step size of the block's input, which queries, keys and values share; `None` where maps read f16.
    pub(super) step: Option<f32>,
    /// Queries, keys and values in one product.
    pub(super) qkv: Map,
    /// Step sizes of queries, keys and values, if they are codes.
    pub(super) qkv_steps: Option<[f32; 3]>,
    pub(super) out_step: Option<f32>,
    pub(super) out: Normed,
    pub(super) inner_step: Option<f32>,
    pub(super) ffn_in: Map,
    pub(super) ffn_out: Normed,
}

#[expect(clippy::large_enum_variant, reason = "there are few, and each lives as long as the model")]
pub(super) enum HeadMaps {
    /// The hidden states themselves.
    None,
    /// One map of every token.
    Tokens { step: Option<f32>, out: Final },
    /// Of the first token of each sequence, perhaps through a dense layer.
    First { step: Option<f32>, dense: Option<Map>, out: Final },
}

/// The kernels of a graph: of what is computed for every token, and of what for first tokens only.
#[derive(Default)]
pub(super) struct Choices {
    pub(super) tokens: HashMap<Place, Choice>,
    pub(super) first: HashMap<Place, Choice>,
}

pub(super) struct Normal {
    pub(super) gain: Tensor,
    pub(super) bias: Tensor,
    pub(super) eps: f32,
}

impl Normal {
    pub(super) fn load(w: &Weights, gpu: Gpu, name: &str, norm: Norm) -> Result<Normal> {
        let Norm::Layer { eps } = norm else { return Err(unsupported("root mean square norms")) };
        let part = |part: &str| Ok::<_, Error>(w.dense(&format!("{name}.{part}"))?.to(Device::Cuda(gpu)));
        Ok(Normal { gain: part("weight")?, bias: part("bias")?, eps })
    }

    pub(super) fn of(&self) -> norm_codes::Norm<'_> {
        norm_codes::Norm::Layer { gain: &self.gain, bias: &self.bias, eps: self.eps }
    }
}

impl Network {
    pub(super) fn load(gpu: Gpu, model: &Model, stack: &Stack, products: Products) -> Result<Network> {
        let device = Device::Cuda(gpu);
        let e = &stack.embed;
        for (present, what) in [
            (stack.order == NormOrder::Pre || stack.final_norm, "norms before their sub-layers"),
            (stack.gated, "gated feed-forwards"),
            (stack.causal, "causal attention"),
            (stack.kv_heads != stack.heads || stack.heads * stack.head_dim != stack.hidden, "grouped heads"),
            (e.projected, "projected embeddings"),
            (!e.norm, "embeddings that are not normalised"),
            (!matches!(e.positions, Positions::Learned { .. }), "rotary positions"),
        ] {
            if present {
                return Err(unsupported(what));
            }
        }
        let w = Weights::new(&model.spec, &model.params);
        let table = |name: &str| Ok::<_, Error>(w.dense(name)?.to_f16().to(device));
        let normal = |name: &str| Normal::load(&w, gpu, name, stack.norm);
        let joined = |input: &str| Joined::new(gpu, &w.readers(input)?);
        let half = |input: &str, function| Map::half(gpu, &w.readers(input)?, products, function);
        let integer = w.readers("encoder.0.attn")?.step.is_some() && products != Products::DenseF16;
        let block = |i: usize| -> Result<Block> {
            let at = |part: &str| format!("encoder.{i}.{part}");
            let norms = (normal(&at("attn.norm"))?, normal(&at("ffn.norm"))?);
            let normed =
                |(map, pair): (Map, Option<Vec<f32>>), norm| Normed { map, pair: pair.map(|p| p[0]), norm };
            if !integer {
                return Ok(Block {
                    step: None,
                    qkv: half(&at("attn"), None)?,
                    qkv_steps: None,
                    out_step: None,
                    out: normed((half(&at("attn.o"), None)?, None), norms.0),
                    inner_step: None,
                    ffn_in: half(&at("ffn"), Some(stack.activation))?,
                    ffn_out: normed((half(&at("ffn.out"), None)?, None), norms.1),
                });
            }
            let qkv = joined(&at("attn"))?;
            let out = joined(&at("attn.o"))?;
            let ffn_in = joined(&at("ffn"))?;
            let ffn_out = joined(&at("ffn.out"))?;
            let (step, out_step, inner_step) = (Some(qkv.step), Some(out.step), Some(ffn_in.step));
            let (qkv, steps) = qkv.stored_by_pairs(gpu);
            let inner = ffn_out.step;
            Ok(Block {
                step,
                qkv,
                qkv_steps: steps.map(|s| s.try_into().expect("an attention has three projections")),
                out_step,
                out: normed(out.stored_by_pairs(gpu), norms.0),
                inner_step,
                ffn_in: ffn_in.activated(gpu, stack.activation, inner),
                ffn_out: normed(ffn_out.stored_by_pairs(gpu), norms.1),
            })
        };
        let blocks = (0..stack.layers).map(block).collect::<Result<Vec<_>>>()?;
        let kinds = |b: &Block| [b.qkv_steps.is_some(), b.out.pair.is_some(), b.ffn_out.pair.is_some()];
        if blocks.iter().any(|b| kinds(b) != kinds(&blocks[0])) {
            return Err(unsupported("quantised outputs in some blocks only"));
        }
        let head = match &model.spec.head {
            Head::None => HeadMaps::None,
            Head::Span if integer => {
                let out = joined("head.out")?;
                HeadMaps::Tokens { step: Some(out.step), out: out.last(gpu) }
            }
            Head::Span => {
                HeadMaps::Tokens { step: None, out: Final::half(gpu, &w.readers("head.out")?, products)? }
            }
            Head::Classify { dense, .. } if integer => {
                let out = joined("head.out")?;
                match dense {
                    None => HeadMaps::First { step: Some(out.step), dense: None, out: out.last(gpu) },
                    Some(function) => {
                        let first = joined("head.dense")?;
                        let step = Some(first.step);
                        let dense = Some(first.activated(gpu, *function, out.step));
                        HeadMaps::First { step, dense, out: out.last(gpu) }
                    }
                }
            }
            Head::Classify { dense, .. } => {
                let dense = dense.map(|f| half("head.dense", Some(f))).transpose()?;
                HeadMaps::First {
                    step: None,
                    dense,
                    out: Final::half(gpu, &w.readers("head.out")?, products)?,
                }
            }
            Head::LanguageModel { .. } => unreachable!("refused when the engine was asked for"),
        };
        Ok(Network {
            word: table("embed.word")?,
            scale: e.scale,
            position: table("encoder.embed.position")?,
            types: (e.types > 0).then(|| table("encoder.embed.type")).transpose()?,
            norm: normal("encoder.embed.norm")?,
            blocks,
            head,
            hidden: stack.hidden,
            inner: stack.ffn,
            attention: varlen_attention::Attention {
                heads: stack.heads,
                scale: 1.0 / (stack.head_dim as f32).sqrt(),
                pattern: model.attention.map(|p| (p.keep, p.of)),
            },
        })
    }

    /// Whether a classifier has two maps.
    pub(super) fn dense_head(&self) -> bool {
        matches!(self.head, HeadMaps::First { dense: Some(_), .. })
    }

    /// The INT8 maps that stand at each place, those for every token or those for first tokens only.
    pub(super) fn steps(&self, first: bool) -> Vec<(Place, Vec<Step<'_>>)> {
        fn plain(map: &Map) -> Option<Step<'_>> {
            map.codes().map(|map| Step { map, normed: None })
        }
        fn normed(normed: &Normed) -> Option<Step<'_>> {
            normed.map.codes().map(|map| Step { map, normed: Some(normed) })
        }
        let last_alone = matches!(self.head, HeadMaps::First { .. });
        let (early, last) =
            self.blocks.split_at(self.blocks.len() - usize::from(last_alone && !self.blocks.is_empty()));
        let after = if first { last } else { early };
        let mut steps: Vec<(Place, Vec<Option<Step>>)> = vec![
            (Place::AttentionOut, after.iter().map(|b| normed(&b.out)).collect()),
            (Place::FfnIn, after.iter().map(|b| plain(&b.ffn_in)).collect()),
            (Place::FfnOut, after.iter().map(|b| normed(&b.ffn_out)).collect()),
        ];
        if !first {
            steps.insert(0, (Place::Qkv, self.blocks.iter().map(|b| plain(&b.qkv)).collect()));
        }
        match &self.head {
            HeadMaps::Tokens { out, .. } if !first => steps.push((Place::HeadOut, vec![plain(&out.map)])),
            HeadMaps::First { dense, out, .. } if first => {
                steps.extend(dense.iter().map(|d| (Place::HeadDense, vec![plain(d)])));
                steps.push((Place::HeadOut, vec![plain(&out.map)]));
            }
            _ => {}
        }
        let codes = steps.into_iter().map(|(place, steps)| (place, steps.into_iter().flatten().collect()));
        codes.filter(|(_, steps): &(_, Vec<_>)| !steps.is_empty()).collect()
    }

    /// What decides about times.
    pub(super) fn shape(&self) -> String {
        let steps = [false, true].map(|first| self.steps(first));
        let one = |(place, steps): &(Place, Vec<Step>)| {
            let map = steps[0].map;
            let Epilogue { bias, output_step, store, .. } = &map.epilogue;
            let function = match store {
                Store::Codes { activation, .. } => format!("{activation:?}"),
                Store::Table { .. } => "table".to_string(),
                _ => String::new(),
            };
            let (w, kind) = (&map.weight, store.dtype());
            let [bias, pair] = [bias, output_step].map(Option::is_some);
            format!("{place:?} {}x{}x{} {kind:?} {function} {bias} {pair}", steps.len(), w.rows(), w.cols())
        };
        steps.iter().flatten().map(one).collect::<Vec<_>>().join("; ")
    }

    /// The likely fastest kernels, for want of a plan.
    pub(super) fn untimed(&self, bucket: Bucket) -> Choices {
        let choose = |first: bool, rows: usize| {
            let likely = |(place, steps): (Place, Vec<Step>)| {
                (place, Choice { way: steps[0].ways(&steps[0].map.weight, rows, 1)[0], sparse: true })
            };
            self.steps(first).into_iter().map(likely).collect()
        };
        Choices { tokens: choose(false, bucket.tokens), first: choose(true, bucket.sequences) }
    }

    /// The kernels that a plan names, with the dense twins they multiply.
    pub(super) fn planned(&self, gpu: Gpu, plan: &[Row], bucket: Bucket) -> Result<Choices> {
        let mut choices = self.untimed(bucket);
        for (first, kept) in [(false, &mut choices.tokens), (true, &mut choices.first)] {
            for (place, steps) in self.steps(first) {
                let Some(row) = plan.iter().find(|r| r.place == place && r.first == first) else { continue };
                if !row.sparse {
                    let new: Vec<_> =
                        steps.iter().map(|s| s.map).filter(|m| m.dense.get().is_none()).collect();
                    // Kept once they are there: a twin without memory would be multiplied by later requests.
                    let twins: Vec<_> = gpu.settled(|| new.iter().map(|m| m.twin(gpu)).collect())?;
                    new.iter().zip(twins).for_each(|(m, twin)| {
                        let _ = m.dense.set(twin);
                    });
                }
                let map = steps[0].map;
                let weight = if row.sparse { Some(&map.weight) } else { map.dense.get() };
                let found = weight.map(|w| steps[0].ways(w, row.tokens, usize::MAX)).unwrap_or_default();
                if let Some(way) = found.into_iter().find(|way| way.to_string() == row.kernel) {
                    kept.insert(place, Choice { way, sparse: row.sparse });
                }
            }
        }
        Ok(choices)
    }

    /// What `choices` launch, to be compiled at once.
    pub(super) fn kernels(&self, choices: &Choices) -> Vec<(Way, &Weight, Step<'_>)> {
        let mut all = Vec::new();
        for (first, chosen) in [(false, &choices.tokens), (true, &choices.first)] {
            for (place, steps) in self.steps(first) {
                if let Some(choice) = chosen.get(&place) {
                    all.push((choice.way, steps[0].map.multiplied(choice), steps[0]));
                }
            }
        }
        all
    }

    /// Asks for everything between the input block and the outputs in `b`.
    pub(super) fn launch(&self, choices: &Choices, b: &mut Buffers) {
        let lookup = |table, ids| Lookup { table, ids };
        embed_norm(
            lookup(&self.word, &b.ids),
            Some(lookup(&self.position, &b.positions)),
            self.types.as_ref().map(|t| lookup(t, &b.types)),
            self.scale,
            Some(self.norm.of()),
            norm_codes::Out {
                hidden: Some(&b.hidden),
                codes: self
                    .blocks
                    .first()
                    .and_then(|block| block.step)
                    .map(|step| Codes { to: &b.codes, step }),
            },
        );
        for (i, block) in self.blocks.iter().enumerate() {
            let x = if block.step.is_some() { &b.codes } else { &b.hidden };
            block.qkv.launch(choices.tokens.get(&Place::Qkv), x, &mut b.qkv);
            let qkv = match block.qkv_steps {
                Some(steps) => Qkv::Codes(&b.qkv, steps),
                None => Qkv::Half(&b.qkv),
            };
            let mixed = match block.out_step {
                Some(step) => varlen_attention::Out::Codes(Codes { to: &b.mixed, step }),
                None => varlen_attention::Out::Half(&b.mixed),
            };
            attention(qkv, &b.segments, self.attention, mixed);
            // The step of what reads the block's output; nothing reads codes of plain hidden states.
            let next = match (self.blocks.get(i + 1), &self.head) {
                (Some(next), _) => next.step,
                (None, HeadMaps::None) => None,
                (None, HeadMaps::Tokens { step, .. } | HeadMaps::First { step, .. }) => *step,
            };
            match b.first.as_mut().filter(|_| i + 1 == self.blocks.len()) {
                // Rows are independent after the last attention.
                Some(f) => {
                    first_rows(&b.hidden, &b.segments, &f.hidden);
                    first_rows(&b.mixed, &b.segments, &f.mixed);
                    let FirstRows { hidden, codes, mixed, added, inner } = f;
                    block.after_attention(&choices.first, mixed, hidden, codes, added, inner, next);
                }
                None => {
                    let Buffers { hidden, codes, mixed, added, inner, .. } = b;
                    block.after_attention(&choices.tokens, mixed, hidden, codes, added, inner, next);
                }
            }
        }
        let last = |codes: &HashMap<Place, Choice>| codes.get(&Place::HeadOut).copied();
        match (&self.head, b.sums.as_mut(), b.first.as_mut()) {
            (HeadMaps::Tokens { step, out }, Some(sums), _) => {
                let x = if step.is_some() { &b.codes } else { &b.hidden };
                out.map.launch(last(&choices.tokens).as_ref(), x, sums);
            }
            (HeadMaps::First { step, dense, out }, Some(sums), Some(f)) => {
                let x = if step.is_some() { &f.codes } else { &f.hidden };
                let x = match dense {
                    Some(dense) => {
                        dense.launch(choices.first.get(&Place::HeadDense), x, &mut f.mixed);
                        &f.mixed
                    }
                    None => x,
                };
                out.map.launch(last(&choices.first).as_ref(), x, sums);
            }
            _ => {}
        }
    }
}

impl Block {
    /// From attention's codes `mixed` and the hidden states to the hidden states after the block, in place, and to their
    /// `codes` of step `next`.
    pub(super) fn after_attention(
        &self,
        choices: &HashMap<Place, Choice>,
        mixed: &Tensor,
        hidden: &Tensor,
        codes: &Tensor,
        added: &mut [Tensor; 2],
        inner: &mut Tensor,
        next: Option<f32>,
    ) {
        let states = |step: Option<f32>| States { hidden, codes: step.map(|step| Codes { to: codes, step }) };
        self.out.launch(choices.get(&Place::AttentionOut), mixed, &mut added[0], states(self.inner_step));
        let x = if self.inner_step.is_some() { codes } else { hidden };
        self.ffn_in.launch(choices.get(&Place::FfnIn), x, inner);
        self.ffn_out.launch(choices.get(&Place::FfnOut), inner, &mut added[1], states(next));
    }
}
