//! The engine on an NVIDIA GPU.
//!
//! Tokens lie one after the other without padding. Between linear maps there are INT8 codes and one f16 stream of
//! hidden states, in memory that is laid out when the model is loaded; what a request launches is one CUDA graph, made
//! when its bucket (so many tokens, so many sequences) is first met. A request copies its tokens into pinned memory,
//! launches the graph and waits.

mod buffers;
mod maps;
mod network;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard};

use gpusq_tensor::cuda::{Arena, CudaError, Gpu, Graph, Pinned, Stream};
use gpusq_tensor::ops::sparse_linear::Weight;
use gpusq_tensor::{Tensor, f16};

use super::Products;
use super::plan::{Place, Plans, Row, Time};
use crate::inputs::{Tokens, position_rows};
use crate::model::Model;
use crate::spec::{Numbering, Positions, Stack};
use crate::{Error, Result};

use buffers::{Bucket, Buffers, Part, input_parts, lengths, passes};
use maps::{Step, Way, prepare};
use network::{HeadMaps, Network};

/// Tokens of one pass. Larger batches take several: nothing is gained beyond.
const MOST_TOKENS: usize = 1 << 15;
/// Maps of a place that kernels are timed on, one after the other.
const TIMED_MAPS: usize = 2;
/// Kernels of each kind, and of these again with the norm in them, that are timed for a map.
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

/// The kernels that are worth timing: the first of all that can compute a step, which come in the order of what is likely.
/// Each takes half a second to compile when it is first met.
fn likely(step: &Step, w: &Weight, rows: usize) -> Vec<Way> {
    step.ways(w, rows, if w.is_sparse() { SPARSE_CANDIDATES } else { DENSE_CANDIDATES })
}

/// What can be done about memory that was missing when a model was loaded.
fn at_load(e: CudaError) -> Error {
    advised(
        e,
        "the model does not fit beside what is there: end other programs on this GPU, or use another device",
    )
}

/// What can be done about memory that was missing for a request. The next tries again; those of a size that was met
/// before need none.
fn in_request(e: Error) -> Error {
    let remedy = "a size of batch that is new needs some once: free memory on this GPU and ask again; sizes that were \
                  answered before still are";
    match e {
        Error::Device(e) => advised(e, remedy),
        other => other,
    }
}

fn advised(e: CudaError, remedy: &'static str) -> Error {
    Error::Device(match e {
        CudaError::OutOfMemory { ordinal, asked, free, total, .. } => {
            CudaError::OutOfMemory { ordinal, asked, free, total, remedy }
        }
        other => other,
    })
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

impl Encoder {
    pub(super) fn load(gpu: Gpu, model: &Model, stack: &Stack, products: Products) -> Result<Encoder> {
        let network = gpu.settled(|| Network::load(gpu, model, stack, products)).map_err(at_load)??;
        let Positions::Learned { numbering, .. } = stack.embed.positions else {
            unreachable!("refused by the network")
        };
        let longest = model.spec.max_length();
        let mut limit = MOST_TOKENS.max(longest);
        // A smaller GPU, or one that others use, takes large batches in more passes.
        let context = loop {
            match Context::new(gpu, &network, limit, products) {
                Err(CudaError::OutOfMemory { .. }) if limit / 2 >= longest => limit /= 2,
                other => break other.map_err(at_load)?,
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
        self.context().plan(&self.network, bucket, &part).map_err(in_request)
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
            context.run(&self.network, &part).map_err(in_request)?;
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
        let choices = network.planned(self.gpu, &plan, bucket)?;
        prepare(&network.kernels(&choices));
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
        let mut trials = Vec::new();
        for (first, rows) in [(false, class.tokens), (true, class.sequences)] {
            for (place, steps) in network.steps(first) {
                self.twins(place, first, &steps)?;
                trials.push(Trial { place, first, rows, steps });
            }
        }
        let Context { stream, input, arena, twins, products, .. } = self;
        let candidates: Vec<_> =
            trials.iter().map(|t| t.candidates(&twins[&(t.place, t.first)], *products)).collect();
        // All at once, on all threads: what is new takes half a second to compile.
        let steps = trials.iter().map(|t| t.steps[0]);
        let all = candidates.iter().zip(steps).flat_map(|(c, s)| c.iter().map(move |(k, w)| (*k, w[0], s)));
        prepare(&all.collect::<Vec<_>>());
        let mut buffers = Buffers::new(arena, network, class);
        part.write(&buffers.segments, input);
        // Kernels are timed on what they will meet.
        let untimed = network.untimed(class);
        stream.run(|| {
            input.upload(&buffers.input);
            network.launch(&untimed, &mut buffers);
        })?;
        let mut plan = Vec::new();
        for (trial, candidates) in trials.iter().zip(candidates) {
            plan.push(trial.time(stream, candidates, network.dense_head(), &mut buffers)?);
        }
        self.plans.insert(class.tokens, class.sequences, plan.clone());
        Ok(plan)
    }

    /// Makes the dense twins of the maps that are timed for `steps`, if they are not there.
    fn twins(&mut self, place: Place, first: bool, steps: &[Step]) -> Result<()> {
        if let Entry::Vacant(new) = self.twins.entry((place, first)) {
            let gpu = self.gpu;
            // Kept once they are there: a twin without memory would be multiplied by later requests.
            new.insert(gpu.settled(|| timed(steps).iter().map(|s| s.map.twin(gpu)).collect())?);
        }
        Ok(())
    }
}

/// The steps that kernels are timed on.
fn timed<'a, 'b>(steps: &'b [Step<'a>]) -> &'b [Step<'a>] {
    &steps[..steps.len().min(TIMED_MAPS)]
}

/// A kernel and the weights of the timed steps, in the form that it multiplies.
type Candidate<'a> = (Way, Vec<&'a Weight>);

/// What one row of a plan is found by.
struct Trial<'a> {
    place: Place,
    first: bool,
    rows: usize,
    steps: Vec<Step<'a>>,
}

impl Trial<'_> {
    /// The kernels to time, with the maps' weights or with their dense `twins`.
    fn candidates<'b>(&'b self, twins: &'b [Weight], products: Products) -> Vec<Candidate<'b>> {
        let weights: [Vec<&Weight>; 2] =
            [timed(&self.steps).iter().map(|s| &s.map.weight).collect(), twins.iter().collect()];
        let allowed = |w: &&Vec<&Weight>| products == Products::Fastest || !w[0].is_sparse();
        let ways = |w: &Vec<&'b Weight>| {
            let w = w.clone();
            likely(&self.steps[0], w[0], self.rows).into_iter().map(move |way| (way, w.clone()))
        };
        weights.iter().filter(allowed).flat_map(ways).collect()
    }

    /// Times each of `candidates`.
    fn time(
        &self,
        stream: &mut Stream,
        candidates: Vec<Candidate>,
        dense_head: bool,
        buffers: &mut Buffers,
    ) -> Result<Row> {
        let (x, out, states) = buffers.ends(self.place, self.first, dense_head);
        let timed = timed(&self.steps);
        let mut times = Vec::new();
        for (way, weights) in candidates {
            let mut launches = || {
                for (w, step) in weights.iter().zip(timed) {
                    step.launch(way, w, x, out, states);
                }
            };
            stream.run(&mut launches)?;
            let mut graph = stream.capture(|| (0..REPEATS).for_each(|_| launches()))?;
            let mut runs = stream.times(RUNS, || graph.launch())?;
            runs.sort_by(f64::total_cmp);
            times.push(Time {
                kernel: way.to_string(),
                sparse: weights[0].is_sparse(),
                microseconds: runs[RUNS / 2] * 1e3 / (REPEATS * timed.len()) as f64,
            });
        }
        let best = times.iter().min_by(|a, b| a.microseconds.total_cmp(&b.microseconds));
        let best = best.expect("there is a kernel for every map");
        let (kernel, sparse) = (best.kernel.clone(), best.sparse);
        let Step { map, normed } = self.steps[0];
        let (shape, norm) = ([map.weight.rows(), map.weight.cols()], normed.is_some());
        let (place, first, tokens, maps) = (self.place, self.first, self.rows, self.steps.len());
        Ok(Row { place, first, tokens, shape, maps, norm, kernel, sparse, times })
    }
}
