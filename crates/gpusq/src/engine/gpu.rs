//! The engine on an NVIDIA GPU.
//!
//! Tokens lie one after the other without padding. Between linear maps there are INT8 codes and one f16 stream of
//! hidden states, in memory that is laid out when the model is loaded; what a request launches is one CUDA graph, made
//! when its bucket (so many tokens, so many sequences) is first met. A request copies its tokens into pinned memory,
//! launches the graph and waits.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, OnceLock};

use gpusq_tensor::cuda::{Arena, CudaError, Gpu, Graph, Layout, Pinned, Stream};
use gpusq_tensor::ops::activation::Activation;
use gpusq_tensor::ops::codes::Codes;
use gpusq_tensor::ops::norm_codes::{self, Lookup, add_norm, embed_norm};
use gpusq_tensor::ops::select::first_rows;
use gpusq_tensor::ops::sparse_linear::{Epilogue, Kernel, Store, Weight, kernels, prepare, sparse_linear};
use gpusq_tensor::ops::varlen_attention::{self, Qkv, attention};
use gpusq_tensor::ops::{dense_linear, half_linear, lsq};
use gpusq_tensor::{DType, Device, Segments, Tensor, f16};

use super::Products;
use super::plan::{Place, Plans, Row, Time};
use super::weights::{Readers, Weights};
use crate::format::packed::{unpack_codes, unpack_f32};
use crate::inputs::{Tokens, position_rows};
use crate::model::Model;
use crate::params;
use crate::spec::{Head, Norm, NormOrder, Numbering, Positions, Stack};
use crate::{Error, Result};

/// Tokens of one pass. Larger batches take several: nothing is gained beyond.
const MOST_TOKENS: usize = 1 << 15;
/// Maps of a place that kernels are timed on, one after the other.
const TIMED_MAPS: usize = 2;
/// Kernels of each kind that are timed for a map.
const SPARSE_CANDIDATES: usize = 8;
const DENSE_CANDIDATES: usize = 4;
/// Launches on each of them in a run, and runs, of which the median counts.
const REPEATS: usize = 4;
const RUNS: usize = 7;
/// Graphs that are kept. One takes some hundred kilobytes.
const MOST_GRAPHS: usize = 64;

/// A packed model on a GPU.
pub(super) struct Encoder {
    network: Network,
    context: Mutex<Context>,
    /// Tokens of one pass.
    limit: usize,
    numbering: Numbering,
    pad: Option<u32>,
}

/// Weights, and what is done with them.
struct Network {
    word: Tensor,
    /// Factor of the word embedding.
    scale: f32,
    position: Tensor,
    types: Option<Tensor>,
    norm: Normal,
    blocks: Vec<Block>,
    head: HeadMaps,
    hidden: usize,
    inner: usize,
    attention: varlen_attention::Attention,
}

struct Block {
    /// Step size of the block's input, which queries, keys and values share; `None` where maps read f16.
    step: Option<f32>,
    /// Queries, keys and values in one product.
    qkv: Map,
    /// Step sizes of queries, keys and values, if they are codes.
    qkv_steps: Option<[f32; 3]>,
    out_step: Option<f32>,
    out: Map,
    attention_norm: Normal,
    inner_step: Option<f32>,
    ffn_in: Map,
    ffn_out: Map,
    ffn_norm: Normal,
}

#[expect(clippy::large_enum_variant, reason = "there are few, and each lives as long as the model")]
enum HeadMaps {
    /// The hidden states themselves.
    None,
    /// One map of every token.
    Tokens { step: Option<f32>, out: Final },
    /// Of the first token of each sequence, perhaps through a dense layer.
    First { step: Option<f32>, dense: Option<Map>, out: Final },
}

/// A linear map.
#[expect(clippy::large_enum_variant, reason = "there are few, and each lives as long as the model")]
enum Map {
    /// Of INT8 codes.
    Codes(CodesMap),
    /// Of f16 numbers, with a bias and perhaps a function.
    Half { weight: Tensor, bias: Tensor, function: Option<Activation> },
    /// Of f16 numbers to f32 outputs, which may be few.
    Last { weight: Tensor, bias: Option<Tensor> },
}

/// An INT8 weight, and what becomes of the sums.
struct CodesMap {
    weight: Weight,
    /// What the weight was packed from.
    stored: Vec<params::Packed>,
    /// The same codes without the sparsity, where a plan wants them.
    dense: OnceLock<Weight>,
    epilogue: Epilogue,
}

/// The kernels that are worth timing: the first of all that can compute a map, which come in the order of what is likely.
/// Each takes half a second to compile when it is first met.
fn likely(w: &Weight, rows: usize) -> Vec<Kernel> {
    let mut all = kernels(w, rows);
    all.truncate(if w.is_sparse() { SPARSE_CANDIDATES } else { DENSE_CANDIDATES });
    all
}

/// The kernel of one map.
#[derive(Clone, Copy)]
struct Choice {
    kernel: Kernel,
    sparse: bool,
}

/// The kernels of a graph: of what is computed for every token, and of what for first tokens only.
#[derive(Default)]
struct Choices {
    tokens: HashMap<Place, Choice>,
    first: HashMap<Place, Choice>,
}

/// The last map. 32-bit sums are scaled on the host, as the CPU engine does it.
struct Final {
    map: Map,
    outputs: usize,
    /// Of sums; f32 outputs are what they are.
    scale: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    pair: Option<f32>,
}

struct Normal {
    gain: Tensor,
    bias: Tensor,
    eps: f32,
}

impl Normal {
    fn load(w: &Weights, gpu: Gpu, name: &str, norm: Norm) -> Result<Normal> {
        let Norm::Layer { eps } = norm else { return Err(unsupported("root mean square norms")) };
        let part = |part: &str| Ok::<_, Error>(w.dense(&format!("{name}.{part}"))?.to(Device::Cuda(gpu)));
        Ok(Normal { gain: part("weight")?, bias: part("bias")?, eps })
    }

    fn of(&self) -> norm_codes::Norm<'_> {
        norm_codes::Norm::Layer { gain: &self.gain, bias: &self.bias, eps: self.eps }
    }
}

fn unsupported(what: &str) -> Error {
    Error::Mismatch(format!("the engine does not run models with {what} on a GPU; --device cpu does"))
}

/// Several packed INT8 weights that read one input as one, on the GPU.
struct Joined {
    weight: Weight,
    stored: Vec<params::Packed>,
    scale: Vec<f32>,
    bias: Option<Vec<f32>>,
    /// Step size of each map's output pair, and how many outputs it has.
    pairs: Option<Vec<(f32, usize)>>,
    /// Step size of the input.
    step: f32,
}

impl Joined {
    fn new(gpu: Gpu, readers: &Readers) -> Result<Joined> {
        let Some(step) = readers.step.filter(|_| readers.maps.iter().all(|m| m.integer())) else {
            let message = format!("`{}`, whose weights are not INT8,", readers.input);
            return Err(unsupported(&message));
        };
        let (mut values, mut meta, mut scale, mut bias) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut rows, mut cols, mut stored) = (0, 0, Vec::new());
        for map in &readers.maps {
            let params::Weight::Packed(p) = map.weight else { unreachable!("checked above") };
            let steps = p.scale.as_ref().expect("checked above");
            values.extend_from_slice(p.values.i8());
            meta.extend_from_slice(p.meta.u8());
            scale.extend(steps.f32().iter().map(|s| step * s));
            bias.extend(map.bias.iter().flat_map(|b| b.f32().iter().copied()));
            (rows, cols) = (rows + p.values.rows(), p.cols);
            stored.push(p.clone());
        }
        if !bias.is_empty() && bias.len() != rows {
            return Err(unsupported(&format!("biases in some maps of `{}` only", readers.input)));
        }
        let steps: Vec<(f32, usize)> =
            readers.maps.iter().filter_map(|m| Some((m.output_step?, m.rows()))).collect();
        if !steps.is_empty() && steps.len() != readers.maps.len() {
            let message = format!("quantised outputs of some maps of `{}` only", readers.input);
            return Err(unsupported(&message));
        }
        let values = Tensor::from_i8(values, &[rows, cols / 2]);
        let meta = Tensor::from_u8(meta, &[rows, cols.div_ceil(8)]);
        Ok(Joined {
            weight: Weight::sparse(gpu, &values, &meta),
            stored,
            scale,
            bias: Some(bias).filter(|b| !b.is_empty()),
            pairs: Some(steps).filter(|s| !s.is_empty()),
            step,
        })
    }

    /// Step sizes of the output pairs, one for each output.
    fn columns(&self) -> Option<Vec<f32>> {
        let repeat = |&(step, rows): &(f32, usize)| std::iter::repeat_n(step, rows);
        self.pairs.as_ref().map(|p| p.iter().flat_map(repeat).collect())
    }

    fn on(gpu: Gpu, values: Vec<f32>) -> Tensor {
        let n = values.len();
        Tensor::from_f32(values, &[n]).to(Device::Cuda(gpu))
    }

    fn map(self, gpu: Gpu, store: Store) -> Map {
        let output_step = self.columns().map(|s| Self::on(gpu, s));
        let epilogue = Epilogue {
            scale: Self::on(gpu, self.scale),
            bias: self.bias.map(|b| Self::on(gpu, b)),
            output_step,
            store,
        };
        Map::Codes(CodesMap { weight: self.weight, stored: self.stored, dense: OnceLock::new(), epilogue })
    }

    /// A map whose outputs are stored as the codes of their pairs, if they have such, and as f16 otherwise; and the
    /// pairs' step sizes.
    fn stored_by_pairs(mut self, gpu: Gpu) -> (Map, Option<Vec<f32>>) {
        let Some(columns) = self.columns() else { return (self.map(gpu, Store::Half), None) };
        let steps = self.pairs.take().map(|p| p.into_iter().map(|(step, _)| step).collect());
        let store = Store::Codes { activation: None, step: Self::on(gpu, columns) };
        (self.map(gpu, store), steps)
    }

    /// A map whose activated outputs are codes of `step`.
    fn activated(self, gpu: Gpu, activation: Activation, step: f32) -> Map {
        let rows = self.weight.rows();
        let store = Store::Codes { activation: Some(activation), step: Self::on(gpu, vec![step; rows]) };
        self.map(gpu, store)
    }

    fn last(mut self, gpu: Gpu) -> Final {
        let (scale, bias) = (self.scale.clone(), self.bias.take());
        let pair = self.pairs.take().map(|p| p[0].0);
        let map = self.map(gpu, Store::Accumulators);
        Final { map, outputs: scale.len(), scale: Some(scale), bias, pair }
    }
}

/// Several weights that read one input as one f16 weight, and their bias.
fn joined_half(readers: &Readers, products: Products) -> Result<(Tensor, Option<Vec<f32>>)> {
    let (mut values, mut bias, mut cols) = (Vec::new(), Vec::new(), 0);
    for map in &readers.maps {
        let weight = match map.weight {
            params::Weight::Packed(p) => unpack_f32(p),
            params::Weight::Dense(t) => t.clone(),
            _ => unreachable!("refused when the weights were read"),
        };
        // Only to compare with are codes taken for the numbers they stand for.
        if map.integer() && products != Products::DenseF16 {
            let message = format!("`{}`, whose weights are INT8 and others are not,", readers.input);
            return Err(unsupported(&message));
        }
        cols = weight.width();
        values.extend_from_slice(weight.to_f16().f16());
        bias.extend(map.bias.iter().flat_map(|b| b.f32().iter().copied()));
    }
    let rows = values.len() / cols;
    if !bias.is_empty() && bias.len() != rows {
        return Err(unsupported(&format!("biases in some maps of `{}` only", readers.input)));
    }
    Ok((Tensor::from_f16(values, &[rows, cols]), Some(bias).filter(|b| !b.is_empty())))
}

impl Map {
    fn half(gpu: Gpu, readers: &Readers, products: Products, function: Option<Activation>) -> Result<Map> {
        let (weight, bias) = joined_half(readers, products)?;
        let rows = weight.rows();
        if rows % 8 != 0 || weight.width() % 8 != 0 {
            let message = format!("f16 weights of widths that are no multiples of 8 (`{}`)", readers.input);
            return Err(unsupported(&message));
        }
        let bias = Tensor::from_f32(bias.unwrap_or_else(|| vec![0.0; rows]), &[rows]).to_f16();
        let device = Device::Cuda(gpu);
        Ok(Map::Half { weight: weight.to(device), bias: bias.to(device), function })
    }

    fn codes(&self) -> Option<&CodesMap> {
        match self {
            Map::Codes(map) => Some(map),
            Map::Half { .. } | Map::Last { .. } => None,
        }
    }

    /// Element type of the output.
    fn dtype(&self) -> DType {
        match self {
            Map::Codes(map) => map.epilogue.store.dtype(),
            Map::Half { .. } => DType::F16,
            Map::Last { .. } => DType::F32,
        }
    }

    fn launch(&self, choice: Option<&Choice>, x: &Tensor, out: &mut Tensor) {
        match self {
            Map::Codes(map) => {
                let choice = choice.expect("every INT8 map has a kernel");
                let weight = match choice.sparse {
                    true => &map.weight,
                    false => map.dense.get().expect("a dense twin is made before a plan uses it"),
                };
                sparse_linear(&choice.kernel, x, weight, &map.epilogue, out);
            }
            Map::Half { weight, bias, function } => half_linear::apply(x, weight, bias, *function, out),
            Map::Last { weight, bias } => dense_linear::apply(x, weight, bias.as_ref(), None, out),
        }
    }
}

impl CodesMap {
    /// The weight with its zeros.
    fn twin(&self, gpu: Gpu) -> Weight {
        let codes: Vec<i8> = self.stored.iter().flat_map(unpack_codes).collect();
        Weight::dense(gpu, &Tensor::from_i8(codes, &[self.weight.rows(), self.weight.cols()]))
    }
}

impl Final {
    fn half(gpu: Gpu, readers: &Readers, products: Products) -> Result<Final> {
        let (weight, bias) = joined_half(readers, products)?;
        let outputs = weight.rows();
        let bias = bias.map(|b| Joined::on(gpu, b));
        let map = Map::Last { weight: weight.to(Device::Cuda(gpu)), bias };
        Ok(Final { map, outputs, scale: None, bias: None, pair: None })
    }

    /// Outputs of what the map gave, rows after each other.
    fn scaled(&self, sums: &[i32]) -> impl Iterator<Item = f32> {
        let n = self.outputs;
        sums.iter().enumerate().map(move |(i, &sum)| {
            let Some(scale) = &self.scale else { return f32::from_bits(sum as u32) };
            let mut y = sum as f32 * scale[i % n];
            if let Some(bias) = &self.bias {
                y += bias[i % n];
            }
            self.pair.map_or(y, |s| lsq::code(y, s) * s)
        })
    }
}

/// What graphs are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Bucket {
    tokens: usize,
    sequences: usize,
}

impl Bucket {
    /// What a plan is made for: buckets of about the same size share one.
    fn class(self, largest: Bucket) -> Bucket {
        let round = |n: usize, least: usize| n.next_multiple_of((n.next_power_of_two() / 4).max(least));
        Bucket {
            tokens: round(self.tokens, 16).min(largest.tokens),
            sequences: self.sequences.next_power_of_two().min(largest.sequences),
        }
    }

    /// The smallest that holds so many: at most a sixteenth is computed for nothing.
    fn of(tokens: usize, sequences: usize) -> Bucket {
        let round = |n: usize, least: usize| n.next_multiple_of((n.next_power_of_two() / 32).max(least));
        Bucket { tokens: round(tokens, 16), sequences: round(sequences, 1) }
    }
}

/// What requests change, one at a time.
struct Context {
    gpu: Gpu,
    stream: Stream,
    products: Products,
    plans: Plans,
    /// Dense twins of some maps, to be timed.
    twins: HashMap<(Place, bool), Vec<Weight>>,
    arena: Arena,
    input: Pinned<i32>,
    sums: Pinned<i32>,
    states: Pinned<f16>,
    graphs: HashMap<Bucket, Ready>,
    /// What the arena was made for.
    largest: Bucket,
    /// Requests so far.
    clock: u64,
}

/// A graph with what it works on.
struct Ready {
    graph: Graph,
    buffers: Buffers,
    used: u64,
}

/// Tensors of one bucket, in the arena.
struct Buffers {
    /// All of what the host writes: the next four.
    input: Tensor,
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    segments: Segments,
    /// f16 `[tokens, hidden]`
    hidden: Tensor,
    /// i8 `[tokens, hidden]`
    codes: Tensor,
    qkv: Tensor,
    /// `[tokens, hidden]`: what attention gives.
    mixed: Tensor,
    /// f16 `[tokens, hidden]`: what a sub-layer gives.
    added: Tensor,
    /// `[tokens, inner]`
    inner: Tensor,
    /// The last four again, and the hidden states, of first tokens only.
    first: Option<FirstRows>,
    /// i32 sums, or f32 outputs, of the last map.
    sums: Option<Tensor>,
}

struct FirstRows {
    hidden: Tensor,
    codes: Tensor,
    mixed: Tensor,
    added: Tensor,
    inner: Tensor,
}

/// Numbers of the input block before each of its parts, and in all.
fn input_parts(bucket: Bucket) -> [usize; 5] {
    let numbers = |n: usize| Layout::bytes(DType::I32, &[n]) / DType::I32.size();
    let sizes = [bucket.tokens; 3].into_iter().chain([Segments::size(bucket.sequences, bucket.tokens)]);
    let mut at = [0; 5];
    for (i, size) in sizes.enumerate() {
        at[i + 1] = at[i] + numbers(size);
    }
    at
}

impl Buffers {
    fn new(arena: &Arena, network: &Network, bucket: Bucket) -> Buffers {
        let Bucket { tokens, sequences } = bucket;
        let mut parts = arena.start();
        let [ids, positions, types] = [0; 3].map(|_| parts.tensor(DType::I32, &[tokens]));
        let table = parts.tensor(DType::I32, &[Segments::size(sequences, tokens)]);
        let mut place = arena.start();
        let input = place.tensor(DType::I32, &[input_parts(bucket)[4]]);
        let Network { hidden, inner, .. } = *network;
        let mut tensor = |dtype, rows: usize, width: usize| place.tensor(dtype, &[rows, width]);
        let of = |map: fn(&Block) -> &Map| network.blocks.first().map_or(DType::I8, |b| map(b).dtype());
        let (qkv, inner_type) = (of(|b| &b.qkv), of(|b| &b.ffn_in));
        // What attention gives is read as the feed-forward's inner activations are: all maps are of one kind.
        let mixed = inner_type;
        let first = match network.head {
            HeadMaps::First { .. } => Some(FirstRows {
                hidden: tensor(DType::F16, sequences, hidden),
                codes: tensor(DType::I8, sequences, hidden),
                mixed: tensor(mixed, sequences, hidden),
                added: tensor(DType::F16, sequences, hidden),
                inner: tensor(inner_type, sequences, inner),
            }),
            HeadMaps::None | HeadMaps::Tokens { .. } => None,
        };
        let sums = match &network.head {
            HeadMaps::None => None,
            HeadMaps::Tokens { out, .. } => Some(tensor(out.map.dtype(), tokens, out.outputs)),
            HeadMaps::First { out, .. } => Some(tensor(out.map.dtype(), sequences, out.outputs)),
        };
        Buffers {
            input,
            ids,
            positions,
            types,
            segments: Segments::new(table, sequences, tokens),
            hidden: tensor(DType::F16, tokens, hidden),
            codes: tensor(DType::I8, tokens, hidden),
            qkv: tensor(qkv, tokens, 3 * hidden),
            mixed: tensor(mixed, tokens, hidden),
            added: tensor(DType::F16, tokens, hidden),
            inner: tensor(inner_type, tokens, inner),
            first,
            sums,
        }
    }

    /// What a map reads and writes. A classifier's last map reads its `dense` layer's codes if there is one.
    fn ends(&mut self, place: Place, first: bool, dense: bool) -> (&Tensor, &mut Tensor) {
        let sums = self.sums.as_mut();
        let sums = || sums.expect("a head has sums");
        match (self.first.as_mut().filter(|_| first), place) {
            (None, Place::Qkv) => (&self.codes, &mut self.qkv),
            (None, Place::AttentionOut) => (&self.mixed, &mut self.added),
            (None, Place::FfnIn) => (&self.codes, &mut self.inner),
            (None, Place::FfnOut) => (&self.inner, &mut self.added),
            (None, Place::HeadOut) => (&self.codes, sums()),
            (Some(f), Place::AttentionOut) => (&f.mixed, &mut f.added),
            (Some(f), Place::FfnIn) => (&f.codes, &mut f.inner),
            (Some(f), Place::FfnOut) => (&f.inner, &mut f.added),
            (Some(f), Place::HeadDense) => (&f.codes, &mut f.mixed),
            (Some(f), Place::HeadOut) => (if dense { &f.mixed } else { &f.codes }, sums()),
            (None, Place::HeadDense) | (Some(_), Place::Qkv) => unreachable!("no map is there"),
        }
    }

    /// Bytes of the arena that a bucket needs at most.
    fn bytes(network: &Network, bucket: Bucket) -> usize {
        let Bucket { tokens, sequences } = bucket;
        let Network { hidden, inner, .. } = *network;
        let outputs = match &network.head {
            HeadMaps::None => 0,
            HeadMaps::Tokens { out, .. } | HeadMaps::First { out, .. } => out.outputs,
        };
        let row = hidden * (2 + 1 + 6 + 2 + 2) + 2 * inner + 4 * outputs;
        // Each tensor may begin a little later than the one before it ends.
        input_parts(bucket)[4] * 4 + (tokens + sequences) * row + (64 << 10)
    }
}

impl Network {
    fn load(gpu: Gpu, model: &Model, stack: &Stack, products: Products) -> Result<Network> {
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
            let (attention_norm, ffn_norm) = (normal(&at("attn.norm"))?, normal(&at("ffn.norm"))?);
            if !integer {
                return Ok(Block {
                    step: None,
                    qkv: half(&at("attn"), None)?,
                    qkv_steps: None,
                    out_step: None,
                    out: half(&at("attn.o"), None)?,
                    attention_norm,
                    inner_step: None,
                    ffn_in: half(&at("ffn"), Some(stack.activation))?,
                    ffn_out: half(&at("ffn.out"), None)?,
                    ffn_norm,
                });
            }
            let qkv = joined(&at("attn"))?;
            let out = joined(&at("attn.o"))?;
            let ffn_in = joined(&at("ffn"))?;
            let ffn_out = joined(&at("ffn.out"))?;
            let (step, out_step, inner_step) = (Some(qkv.step), Some(out.step), Some(ffn_in.step));
            let (qkv, steps) = qkv.stored_by_pairs(gpu);
            Ok(Block {
                step,
                qkv,
                qkv_steps: steps.map(|s| s.try_into().expect("an attention has three projections")),
                out_step,
                out: out.map(gpu, Store::Half),
                attention_norm,
                inner_step,
                ffn_in: ffn_in.activated(gpu, stack.activation, ffn_out.step),
                ffn_out: ffn_out.map(gpu, Store::Half),
                ffn_norm,
            })
        };
        let blocks = (0..stack.layers).map(block).collect::<Result<Vec<_>>>()?;
        if blocks.iter().any(|b| b.qkv_steps.is_some() != blocks[0].qkv_steps.is_some()) {
            return Err(unsupported("quantised queries, keys and values in some blocks only"));
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
    fn dense_head(&self) -> bool {
        matches!(self.head, HeadMaps::First { dense: Some(_), .. })
    }

    /// The INT8 maps that stand at each place, those for every token or those for first tokens only.
    fn maps(&self, first: bool) -> Vec<(Place, Vec<&CodesMap>)> {
        let last_alone = matches!(self.head, HeadMaps::First { .. });
        let (early, last) =
            self.blocks.split_at(self.blocks.len() - usize::from(last_alone && !self.blocks.is_empty()));
        let after = if first { last } else { early };
        let mut maps: Vec<(Place, Vec<&Map>)> = vec![
            (Place::AttentionOut, after.iter().map(|b| &b.out).collect()),
            (Place::FfnIn, after.iter().map(|b| &b.ffn_in).collect()),
            (Place::FfnOut, after.iter().map(|b| &b.ffn_out).collect()),
        ];
        if !first {
            maps.insert(0, (Place::Qkv, self.blocks.iter().map(|b| &b.qkv).collect()));
        }
        match &self.head {
            HeadMaps::Tokens { out, .. } if !first => maps.push((Place::HeadOut, vec![&out.map])),
            HeadMaps::First { dense, out, .. } if first => {
                maps.extend(dense.iter().map(|d| (Place::HeadDense, vec![d])));
                maps.push((Place::HeadOut, vec![&out.map]));
            }
            _ => {}
        }
        let codes =
            maps.into_iter().map(|(place, maps)| (place, maps.into_iter().filter_map(Map::codes).collect()));
        codes.filter(|(_, maps): &(_, Vec<_>)| !maps.is_empty()).collect()
    }

    /// What decides about times.
    fn shape(&self) -> String {
        let maps = [false, true].map(|first| self.maps(first));
        let one = |(place, maps): &(Place, Vec<&CodesMap>)| {
            let Epilogue { bias, output_step, store, .. } = &maps[0].epilogue;
            let function = match store {
                Store::Codes { activation, .. } => format!("{activation:?}"),
                _ => String::new(),
            };
            let (w, kind) = (&maps[0].weight, store.dtype());
            let [bias, pair] = [bias, output_step].map(Option::is_some);
            format!("{place:?} {}x{}x{} {kind:?} {function} {bias} {pair}", maps.len(), w.rows(), w.cols())
        };
        maps.iter().flatten().map(one).collect::<Vec<_>>().join("; ")
    }

    /// The likely fastest kernels, for want of a plan.
    fn untimed(&self, bucket: Bucket) -> Choices {
        let choose = |first: bool, rows: usize| {
            let likely = |(place, maps): (Place, Vec<&CodesMap>)| {
                (place, Choice { kernel: kernels(&maps[0].weight, rows)[0], sparse: true })
            };
            self.maps(first).into_iter().map(likely).collect()
        };
        Choices { tokens: choose(false, bucket.tokens), first: choose(true, bucket.sequences) }
    }

    /// The kernels that a plan names.
    fn planned(&self, gpu: Gpu, plan: &[Row], bucket: Bucket) -> Choices {
        let mut choices = self.untimed(bucket);
        for (first, kept) in [(false, &mut choices.tokens), (true, &mut choices.first)] {
            for (place, maps) in self.maps(first) {
                let Some(row) = plan.iter().find(|r| r.place == place && r.first == first) else { continue };
                if !row.sparse {
                    maps.iter().for_each(|m| {
                        m.dense.get_or_init(|| m.twin(gpu));
                    });
                }
                let weight = if row.sparse { Some(&maps[0].weight) } else { maps[0].dense.get() };
                let found = weight.map(|w| kernels(w, row.tokens)).unwrap_or_default();
                if let Some(kernel) = found.into_iter().find(|k| k.to_string() == row.kernel) {
                    kept.insert(place, Choice { kernel, sparse: row.sparse });
                }
            }
        }
        choices
    }

    /// Asks for everything between the input block and the outputs in `b`.
    fn launch(&self, choices: &Choices, b: &mut Buffers) {
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
    fn after_attention(
        &self,
        choices: &HashMap<Place, Choice>,
        mixed: &Tensor,
        hidden: &Tensor,
        codes: &Tensor,
        added: &mut Tensor,
        inner: &mut Tensor,
        next: Option<f32>,
    ) {
        self.out.launch(choices.get(&Place::AttentionOut), mixed, added);
        let out = |step: Option<f32>| norm_codes::Out {
            hidden: Some(hidden),
            codes: step.map(|step| Codes { to: codes, step }),
        };
        add_norm(added, Some(hidden), self.attention_norm.of(), out(self.inner_step));
        let x = if self.inner_step.is_some() { codes } else { hidden };
        self.ffn_in.launch(choices.get(&Place::FfnIn), x, inner);
        self.ffn_out.launch(choices.get(&Place::FfnOut), inner, added);
        add_norm(added, Some(hidden), self.ffn_norm.of(), out(next));
    }
}

impl Encoder {
    pub(super) fn load(gpu: Gpu, model: &Model, stack: &Stack, products: Products) -> Result<Encoder> {
        let network = Network::load(gpu, model, stack, products)?;
        gpu.check()?;
        let Positions::Learned { numbering, .. } = stack.embed.positions else {
            unreachable!("refused by the network")
        };
        let longest = model.spec.max_length();
        let mut limit = MOST_TOKENS.max(longest);
        // A smaller GPU, or one that others use, takes large batches in more passes.
        let context = loop {
            match Context::new(gpu, &network, limit, products) {
                Err(CudaError::OutOfMemory { .. }) if limit / 2 >= longest => limit /= 2,
                other => break other?,
            }
        };
        Ok(Encoder { network, context: Mutex::new(context), limit, numbering, pad: model.spec.tokens.pad })
    }

    /// The kernels that run a batch like `tokens`, or as much of it as is one pass.
    pub(super) fn plan(&self, tokens: &Tokens) -> Result<Vec<Row>> {
        let lengths = lengths(tokens)?;
        let first = passes(&lengths, self.limit).swap_remove(0);
        let lengths = &lengths[first];
        let bucket = Bucket::of(lengths.iter().sum(), lengths.len());
        let positions = position_rows(tokens, self.numbering, self.pad);
        let part = Part { tokens, positions: &positions, lengths, begin: 0 };
        self.context().plan(&self.network, bucket, &part)
    }

    /// The head's output for tokens that fit the model, as [`super::Engine::run`] gives it; zeros for padding.
    pub(super) fn run(&self, tokens: &Tokens) -> Result<Tensor> {
        let lengths = lengths(tokens)?;
        let positions = position_rows(tokens, self.numbering, self.pad);
        let width = match &self.network.head {
            HeadMaps::None => self.network.hidden,
            HeadMaps::Tokens { out, .. } | HeadMaps::First { out, .. } => out.outputs,
        };
        let of_tokens = !matches!(self.network.head, HeadMaps::First { .. });
        let rows = if of_tokens { tokens.batch * tokens.length } else { tokens.batch };
        let mut result = vec![0.0; rows * width];
        for sequences in passes(&lengths, self.limit) {
            let begin = sequences.start;
            let part = Part { tokens, positions: &positions, lengths: &lengths[sequences], begin };
            let mut context = self.context();
            context.run(&self.network, &part)?;
            // Rows of the part's tokens, or sequences, one after the other.
            let mut place = |row: usize, values: &mut dyn Iterator<Item = f32>| {
                result[row * width..][..width].iter_mut().zip(values).for_each(|(to, v)| *to = v);
            };
            let mut own = 0;
            for (i, &length) in part.lengths.iter().enumerate() {
                let (first, count) = match of_tokens {
                    true => ((begin + i) * tokens.length, length),
                    false => (begin + i, 1),
                };
                for row in first..first + count {
                    match &self.network.head {
                        HeadMaps::None => {
                            let states = &context.states[own * width..][..width];
                            place(row, &mut states.iter().map(|v| v.to_f32()));
                        }
                        HeadMaps::Tokens { out, .. } | HeadMaps::First { out, .. } => {
                            place(row, &mut out.scaled(&context.sums[own * width..][..width]));
                        }
                    }
                    own += 1;
                }
            }
        }
        let shape = if of_tokens { [tokens.batch * tokens.length, width] } else { [tokens.batch, width] };
        Ok(Tensor::from_f32(result, &shape))
    }

    /// Milliseconds of each of `repeats` launches of the graphs of `tokens`.
    pub(super) fn times(&self, tokens: &Tokens, repeats: usize) -> Result<Vec<f64>> {
        // Makes the graphs.
        self.run(tokens)?;
        let lengths = lengths(tokens)?;
        let mut context = self.context();
        let Context { stream, graphs, .. } = &mut *context;
        let mut times = vec![0.0; repeats];
        for part in passes(&lengths, self.limit) {
            let own = &lengths[part];
            let bucket = Bucket::of(own.iter().sum(), own.len());
            let Some(ready) = graphs.get_mut(&bucket) else {
                return Err(Error::Mismatch(
                    "another thread has taken the graph that was to be timed".into(),
                ));
            };
            let part = stream.times(repeats, || ready.graph.launch())?;
            times.iter_mut().zip(part).for_each(|(sum, t)| *sum += t);
        }
        Ok(times)
    }

    fn context(&self) -> MutexGuard<'_, Context> {
        self.context.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Some sequences of a batch.
struct Part<'a> {
    tokens: &'a Tokens,
    /// Rows of the position table, of all tokens of the batch.
    positions: &'a [u32],
    lengths: &'a [usize],
    /// The first sequence.
    begin: usize,
}

/// Which sequences go together: as many as have at most `limit` tokens.
fn passes(lengths: &[usize], limit: usize) -> Vec<Range<usize>> {
    let mut passes: Vec<Range<usize>> = Vec::new();
    let mut sum = 0;
    for (i, &length) in lengths.iter().enumerate() {
        match passes.last_mut() {
            Some(last) if sum + length <= limit => {
                last.end = i + 1;
                sum += length;
            }
            _ => {
                passes.push(i..i + 1);
                sum = length;
            }
        }
    }
    passes
}

/// How long each sequence is without its padding.
fn lengths(tokens: &Tokens) -> Result<Vec<usize>> {
    let Some(mask) = &tokens.mask else { return Ok(vec![tokens.length; tokens.batch]) };
    let rows = mask.chunks_exact(tokens.length).enumerate();
    rows.map(|(i, row)| {
        let length = row.iter().take_while(|&&real| real).count();
        if length == 0 || row[length..].iter().any(|&real| real) {
            return Err(Error::Mismatch(format!(
                "sequence {} of the batch is masked elsewhere than at its end; on a GPU padding comes last, and leaves a \
                 token",
                i + 1
            )));
        }
        Ok(length)
    })
    .collect()
}

impl Context {
    fn new(
        gpu: Gpu,
        network: &Network,
        limit: usize,
        products: Products,
    ) -> std::result::Result<Context, CudaError> {
        let largest = Bucket::of(limit, limit);
        let rows = |per_token: usize| largest.tokens * per_token;
        let (sums, states) = match &network.head {
            HeadMaps::None => (0, rows(network.hidden)),
            HeadMaps::Tokens { out, .. } | HeadMaps::First { out, .. } => (rows(out.outputs), 0),
        };
        let arena = Arena::new(gpu, Buffers::bytes(network, largest))?;
        Ok(Context {
            gpu,
            products,
            plans: Plans::load(gpu, &format!("{products:?} {}", network.shape())),
            twins: HashMap::new(),
            arena,
            input: Pinned::new(gpu, input_parts(largest)[4])?,
            sums: Pinned::new(gpu, sums)?,
            states: Pinned::new(gpu, states)?,
            stream: Stream::new(gpu)?,
            graphs: HashMap::new(),
            largest,
            clock: 0,
        })
    }

    /// Computes the outputs of a part and leaves them in pinned memory.
    fn run(&mut self, network: &Network, part: &Part) -> Result<()> {
        let bucket = Bucket::of(part.lengths.iter().sum(), part.lengths.len());
        self.clock += 1;
        if !self.graphs.contains_key(&bucket) {
            let ready = self.prepare(network, bucket, part)?;
            if self.graphs.len() >= MOST_GRAPHS {
                let oldest = self.graphs.iter().min_by_key(|(_, r)| r.used).map(|(b, _)| *b);
                oldest.map(|b| self.graphs.remove(&b));
            }
            self.graphs.insert(bucket, ready);
        }
        let Context { stream, input, graphs, clock, .. } = self;
        let ready = graphs.get_mut(&bucket).expect("inserted above");
        ready.used = *clock;
        part.write(&ready.buffers.segments, input);
        stream.run(|| ready.graph.launch())?;
        Ok(())
    }

    /// The graph of a bucket. `part` is some input for it.
    fn prepare(&mut self, network: &Network, bucket: Bucket, part: &Part) -> Result<Ready> {
        let plan = self.plan(network, bucket, part)?;
        let choices = network.planned(self.gpu, &plan, bucket);
        // Dense twins may have been sent.
        self.gpu.check()?;
        let mut buffers = Buffers::new(&self.arena, network, bucket);
        part.write(&buffers.segments, &mut self.input);
        let Context { stream, input, sums, states, .. } = self;
        let mut all = || {
            input.upload(&buffers.input);
            network.launch(&choices, &mut buffers);
            match &buffers.sums {
                Some(t) => sums.download(t),
                None => states.download(&buffers.hidden),
            }
        };
        // Once without a graph: what fails says so, and kernels are loaded.
        stream.run(&mut all)?;
        let graph = stream.capture(&mut all)?;
        Ok(Ready { graph, buffers, used: 0 })
    }

    /// The plan for a bucket, measured if nobody has yet. `part` is some input for it.
    fn plan(&mut self, network: &Network, bucket: Bucket, part: &Part) -> Result<Vec<Row>> {
        if self.products == Products::Likely {
            return Ok(Vec::new());
        }
        let class = bucket.class(self.largest);
        if let Some(plan) = self.plans.get(class.tokens, class.sequences) {
            return Ok(plan.clone());
        }
        let mut buffers = Buffers::new(&self.arena, network, class);
        part.write(&buffers.segments, &mut self.input);
        // Kernels are timed on what they will meet.
        let untimed = network.untimed(class);
        self.stream.run(|| {
            self.input.upload(&buffers.input);
            network.launch(&untimed, &mut buffers);
        })?;
        let mut plan = Vec::new();
        for (first, rows) in [(false, class.tokens), (true, class.sequences)] {
            for (place, maps) in network.maps(first) {
                plan.push(self.time(place, first, rows, &maps, network.dense_head(), &mut buffers)?);
            }
        }
        self.plans.insert(class.tokens, class.sequences, plan.clone());
        Ok(plan)
    }

    /// Times every kernel that can compute `maps`.
    fn time(
        &mut self,
        place: Place,
        first: bool,
        rows: usize,
        maps: &[&CodesMap],
        dense: bool,
        buffers: &mut Buffers,
    ) -> Result<Row> {
        let timed = &maps[..maps.len().min(TIMED_MAPS)];
        let gpu = self.gpu;
        let twins =
            self.twins.entry((place, first)).or_insert_with(|| timed.iter().map(|m| m.twin(gpu)).collect());
        gpu.check()?;
        let weights: [Vec<&Weight>; 2] = [timed.iter().map(|m| &m.weight).collect(), twins.iter().collect()];
        let candidates: Vec<(Kernel, &Vec<&Weight>)> =
            weights.iter().flat_map(|w| likely(w[0], rows).into_iter().map(move |k| (k, w))).collect();
        let allowed = |w: &Weight| self.products == Products::Fastest || !w.is_sparse();
        let candidates: Vec<_> = candidates.into_iter().filter(|(_, w)| allowed(w[0])).collect();
        let all: Vec<_> = candidates.iter().map(|(k, w)| (*k, w[0], &timed[0].epilogue)).collect();
        prepare(&all);
        let (x, out) = buffers.ends(place, first, dense);
        let mut times = Vec::new();
        for (kernel, weights) in candidates {
            let mut launches = || {
                for (w, map) in weights.iter().zip(timed) {
                    sparse_linear(&kernel, x, w, &map.epilogue, out);
                }
            };
            self.stream.run(&mut launches)?;
            let mut graph = self.stream.capture(|| (0..REPEATS).for_each(|_| launches()))?;
            let mut runs = self.stream.times(RUNS, || graph.launch())?;
            runs.sort_by(f64::total_cmp);
            times.push(Time {
                kernel: kernel.to_string(),
                sparse: weights[0].is_sparse(),
                microseconds: runs[RUNS / 2] * 1e3 / (REPEATS * timed.len()) as f64,
            });
        }
        let best = times.iter().min_by(|a, b| a.microseconds.total_cmp(&b.microseconds));
        let best = best.expect("there is a kernel for every map");
        let (kernel, sparse) = (best.kernel.clone(), best.sparse);
        let shape = [maps[0].weight.rows(), maps[0].weight.cols()];
        Ok(Row { place, first, tokens: rows, shape, maps: maps.len(), kernel, sparse, times })
    }
}

impl Part<'_> {
    /// Fills the input block of a bucket.
    fn write(&self, segments: &Segments, input: &mut [i32]) {
        let bucket = Bucket { tokens: segments.tokens(), sequences: segments.sequences() };
        let [ids, positions, types, table, end] = input_parts(bucket);
        let t = self.tokens;
        let mut row = 0;
        for (i, &length) in self.lengths.iter().enumerate() {
            let from = (self.begin + i) * t.length;
            for at in from..from + length {
                input[ids + row] = t.ids[at] as i32;
                input[positions + row] = self.positions[at] as i32;
                input[types + row] = t.types.get(at).map_or(0, |&t| t as i32);
                row += 1;
            }
        }
        let size = Segments::size(bucket.sequences, bucket.tokens);
        debug_assert!(table + size <= end);
        segments.describe(self.lengths, &mut input[table..][..size]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_they_are_for_and_little_more() {
        for n in [1, 15, 16, 17, 100, 384, 385, 1000, 3072, 12_288, 32_768] {
            let b = Bucket::of(n, n);
            assert!(
                b.tokens >= n && b.sequences >= n && Bucket::of(b.tokens, b.sequences) == b,
                "{n}: {b:?}"
            );
            assert!((b.tokens - n) * 16 <= n.max(256), "{n}: {b:?}");
        }
        assert_eq!(Bucket::of(384 * 32, 32), Bucket { tokens: 12_288, sequences: 32 });
    }

    #[test]
    fn passes_take_every_sequence_once_and_are_no_longer_than_may_be() {
        assert_eq!(passes(&[3, 4, 5, 1, 1, 9], 9), [0..2, 2..5, 5..6]);
        assert_eq!(passes(&[9], 9), [Range { start: 0, end: 1 }]);
    }

    #[test]
    fn only_padding_at_the_end_is_left_out() {
        let tokens = |mask: &[u8]| Tokens {
            batch: 2,
            length: 3,
            ids: vec![5; 6],
            types: Vec::new(),
            mask: Some(mask.iter().map(|&m| m == 1).collect()),
        };
        assert_eq!(lengths(&tokens(&[1, 1, 0, 1, 1, 1])).unwrap(), [2, 3]);
        for mask in [[1, 1, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]] {
            let e = lengths(&tokens(&mask)).unwrap_err().to_string();
            assert!(e.contains("padding comes last"), "{e}");
        }
    }
}
