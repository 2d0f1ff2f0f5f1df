//! The one training forward: specification + weights + tape -> logits and taps.
//!
//! It serves dense, pruned and fake-quantised weights alike ([`Bound`] decides per weight), teacher and
//! student, training and evaluation, every family.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use gpusq_tensor::cuda::with_tf32;
use gpusq_tensor::ops;
use gpusq_tensor::ops::activation::{activation, quantized};
use gpusq_tensor::ops::add::add;
use gpusq_tensor::ops::attention::{Attention, Half, attention, attention_joint, takes_joint};
use gpusq_tensor::ops::cast::cast;
use gpusq_tensor::ops::dropout::dropout;
use gpusq_tensor::ops::embedding::{Lookup, embedding};
use gpusq_tensor::ops::gated::gated_silu;
use gpusq_tensor::ops::layer_norm::layer_norm;
use gpusq_tensor::ops::linear::{linear, linear_as, quantized_linear};
use gpusq_tensor::ops::lsq::{self, FakeWeight, Quantized};
use gpusq_tensor::ops::masked::{MaskGradient, Pruned, multiplied};
use gpusq_tensor::ops::rms_norm::rms_norm;
use gpusq_tensor::ops::rotary::{RotaryTable, rotary};
use gpusq_tensor::ops::select::{select_rows, split_columns};
use gpusq_tensor::{DType, Device, Grads, Tape, Tensor, Var};

use crate::config::Precision;
use crate::inputs::{attention_of, position_rows};
use crate::params::{Params, Weight};
use crate::sparsity::Pattern;
use crate::spec::*;
use crate::{Error, Result};

pub use crate::inputs::{Inputs, Tokens};

/// Which activations a forward keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapSet {
    /// Embedding output (`encoder.embed`), block outputs (`encoder.0`) and the last hidden states (`encoder.last`).
    pub blocks: bool,
    /// Attention outputs before the output projection (`encoder.0.attn.context`).
    pub attention: bool,
    /// Inputs of linear maps, by [`Linear::input`], and their outputs, by [`Linear::name`] + `.y`.
    pub linears: bool,
}

/// Activations by name.
pub type Taps = BTreeMap<String, Var>;

/// What a forward returns.
pub struct Output {
    /// The head's output; the last hidden states for [`Head::None`]. Shapes as in [`Head`].
    pub logits: Var,
    /// What was asked for.
    pub taps: Taps,
}

/// Where and in what a forward computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compute {
    /// Where.
    pub device: Device,
    /// Element type of activations and of the weights they are multiplied with: f32, or bf16 on a GPU. Weights that
    /// are trained, norms' statistics, softmax sums, losses and the optimiser's state are f32 in either case.
    pub element: DType,
    /// Training rounds the operands of f32 products to TF32, which tensor cores multiply.
    pub tf32: bool,
}

impl Compute {
    /// f32 on the CPU.
    pub const CPU: Compute = Compute { device: Device::Cpu, element: DType::F32, tf32: false };

    /// `precision` on `device`.
    ///
    /// # Errors
    /// [`Error::Config`] for bf16 or TF32 on a CPU.
    pub fn new(device: Device, precision: Precision) -> Result<Self> {
        let element = match (precision, device) {
            (Precision::F32, _) | (Precision::Auto, Device::Cpu) | (Precision::Tf32, Device::Cuda(_)) => {
                DType::F32
            }
            (Precision::Bf16 | Precision::Auto, Device::Cuda(_)) => DType::Bf16,
            (Precision::Bf16 | Precision::Tf32, Device::Cpu) => {
                let name = precision.name();
                let message =
                    format!("precision {name} needs a GPU, and the device is the CPU; use f32 or auto");
                return Err(Error::Config(message));
            }
        };
        Ok(Compute { device, element, tf32: precision == Precision::Tf32 })
    }

    /// `f` with the products that this trains with.
    pub fn training<R>(self, f: impl FnOnce() -> R) -> R {
        if self.tf32 { with_tf32(f) } else { f() }
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let element = match (self.element, self.tf32) {
            (DType::Bf16, _) => "bf16",
            (_, true) => "tf32",
            _ => "f32",
        };
        write!(f, "{}, {element}", self.device)
    }
}

/// Weights placed on a tape. Copies name the same ones.
#[derive(Clone)]
pub struct Bound {
    leaves: Rc<BTreeMap<String, Leaf>>,
    /// Projections of one input that are computed by one product, by the name of their attention.
    joint: Rc<BTreeMap<String, Joint>>,
    element: DType,
}

struct Leaf {
    /// What the optimiser trains.
    raw: Var,
    /// What the forward multiplies with.
    effective: Effective,
    /// Step sizes of a fake-quantised weight.
    scale: Option<Var>,
}

#[derive(Clone)]
enum Effective {
    Plain(Var),
    Quantized(Quantized),
}

/// Queries, keys and values of a self-attention as one linear map.
struct Joint {
    weight: Effective,
    bias: Option<Var>,
    /// Columns of each in the output.
    widths: [usize; 3],
}

/// The three projections of an attention.
const PROJECTIONS: [&str; 3] = ["q", "k", "v"];

impl Bound {
    /// Puts `params` on `tape`, for `compute`. A bound inference tape may serve any number of forwards.
    pub fn new(tape: &Tape, params: &Params, gradient: MaskGradient, compute: Compute) -> Self {
        let Compute { device, element, .. } = compute;
        let leaf = |(name, w): (&str, &Weight)| {
            let (raw, scale) = match w {
                Weight::Dense(t) | Weight::Masked { value: t, .. } => (tape.leaf(t.to(device)), None),
                Weight::Fake { value, scale, .. } => {
                    (tape.leaf(value.to(device)), Some(tape.leaf(scale.to(device))))
                }
                Weight::Packed(_) => panic!("`{name}` is packed: packed models run in the engine"),
            };
            (name.to_string(), Leaf { effective: Effective::Plain(raw.clone()), raw, scale })
        };
        let mut leaves: BTreeMap<String, Leaf> = params.iter().map(leaf).collect();
        let joint: BTreeMap<&str, [usize; 3]> =
            params.iter().filter_map(|(name, _)| joint_widths(params, name, compute)).collect();
        // Each group of names becomes one tensor.
        let groups = |part: &str| -> Vec<Vec<String>> {
            let of = |at: &&str| PROJECTIONS.map(|p| format!("{at}.{p}.{part}")).to_vec();
            joint.keys().map(of).filter(|g| params.get(&g[0]).is_some()).collect()
        };
        let (weights, biases) = (groups("weight"), groups("bias"));
        let taken: BTreeSet<String> = weights.iter().chain(&biases).flatten().cloned().collect();
        let alone =
            params.iter().filter(|(name, _)| !taken.contains(*name)).map(|(name, _)| vec![name.to_string()]);
        let all: Vec<Vec<String>> = weights.into_iter().chain(biases).chain(alone).collect();
        let mask_of = |name: &str| match params.get(name) {
            Some(Weight::Masked { mask, .. } | Weight::Fake { mask, .. }) => Some(mask.to(device)),
            _ => None,
        };
        let is_fake = |group: &[String]| matches!(params.get(&group[0]), Some(Weight::Fake { .. }));
        let fake: Vec<&Vec<String>> = all.iter().filter(|g| is_fake(g)).collect();
        let codes: Vec<Vec<FakeWeight>> = fake
            .iter()
            .map(|group| {
                let of = |name: &String| FakeWeight {
                    weight: leaves[name].raw.clone(),
                    mask: mask_of(name).expect("it is fake-quantised"),
                    scale: leaves[name].scale.clone().expect("it is fake-quantised"),
                };
                group.iter().map(of).collect()
            })
            .collect();
        let mut made: BTreeMap<&String, Effective> = BTreeMap::new();
        for (group, q) in fake.iter().zip(lsq::quantize_weights(tape, &codes, element)) {
            made.insert(&group[0], Effective::Quantized(q));
        }
        // What activations are multiplied with and added to, to be made at once; tables and norms stay f32, and so do
        // biases of quantised maps.
        let multiplies = |name: &str| match params.get(name) {
            Some(Weight::Masked { .. }) => true,
            Some(Weight::Dense(t)) => {
                name.ends_with(".weight") && t.shape().len() == 2 || plain_bias(params, name)
            }
            _ => false,
        };
        for (element, wanted) in [(element, true), (DType::F32, false)] {
            let these: Vec<&Vec<String>> = all
                .iter()
                .filter(|g| !is_fake(g) && multiplies(&g[0]) == wanted && (wanted || g.len() > 1))
                .collect();
            let pruned: Vec<Vec<Pruned>> = these
                .iter()
                .map(|group| group.iter().map(|name| (leaves[name].raw.clone(), mask_of(name))).collect())
                .collect();
            for (group, w) in these.iter().zip(multiplied(tape, &pruned, gradient, element)) {
                made.insert(&group[0], Effective::Plain(w));
            }
        }
        let mut found = BTreeMap::new();
        for (at, widths) in &joint {
            let weight = made.remove(&format!("{at}.q.weight")).expect("every joint weight is made");
            let bias = match made.remove(&format!("{at}.q.bias")) {
                Some(Effective::Plain(b)) => Some(b),
                _ => None,
            };
            found.insert(at.to_string(), Joint { weight, bias, widths: *widths });
        }
        for (name, effective) in made {
            leaves.get_mut(name).expect("made above").effective = effective;
        }
        Bound { leaves: Rc::new(leaves), joint: Rc::new(found), element }
    }

    /// Takes the gradients of every weight whose name begins with `prefix`: `(name, gradient, step-size gradient)`. A
    /// weight the loss does not depend on has none.
    pub fn gradients(&self, grads: &mut Grads, prefix: &str) -> BTreeMap<String, (Tensor, Option<Tensor>)> {
        let mut out = BTreeMap::new();
        for (name, leaf) in self.of(prefix) {
            if let Some(g) = grads.take(&leaf.raw) {
                let s = leaf.scale.as_ref().and_then(|s| grads.take(s));
                out.insert(name.clone(), (g, s));
            }
        }
        out
    }

    fn of<'b>(&'b self, prefix: &'b str) -> impl Iterator<Item = (&'b String, &'b Leaf)> {
        self.leaves.range(prefix.to_string()..).take_while(move |(name, _)| name.starts_with(prefix))
    }

    /// What was made of the weights whose names begin with `prefix`, for the forward to multiply with.
    fn made(&self, prefix: &str) -> Vec<Var> {
        let alone = self.of(prefix).map(|(_, leaf)| &leaf.effective);
        let joint = self.joint.iter().filter(|(at, _)| at.starts_with(prefix)).map(|(_, joint)| joint);
        let weight = |effective: &Effective| match effective {
            Effective::Plain(v) => v.clone(),
            Effective::Quantized(q) => q.codes.clone(),
        };
        let joint: Vec<Var> =
            joint.flat_map(|j| std::iter::once(weight(&j.weight)).chain(j.bias.clone())).collect();
        alone.map(weight).chain(joint).collect()
    }

    fn get(&self, name: &str) -> &Leaf {
        self.leaves
            .get(name)
            .unwrap_or_else(|| panic!("no weight `{name}`: loading checks that all are there"))
    }

    fn plain(&self, name: &str) -> &Var {
        match &self.get(name).effective {
            Effective::Plain(v) => v,
            Effective::Quantized(_) => panic!("`{name}` is quantised where only a dense weight can be"),
        }
    }
}

/// Whether `name` is the bias of a linear map that is not quantised, other than the last one, whose output is f32.
fn plain_bias(params: &Params, name: &str) -> bool {
    let weight = name.strip_suffix(".bias").and_then(|map| params.get(&format!("{map}.weight")));
    let plain = match weight {
        Some(Weight::Dense(w)) => w.shape().len() == 2,
        Some(Weight::Masked { .. }) => true,
        _ => false,
    };
    plain && name != "head.out.bias"
}

/// If `name` is the queries' weight of a self-attention whose projections can be one linear map: the attention's name and
/// the rows of its projections. Wide products are faster than narrow ones on a GPU; a CPU gains nothing.
fn joint_widths<'a>(params: &Params, name: &'a str, compute: Compute) -> Option<(&'a str, [usize; 3])> {
    let at = name.strip_suffix(".q.weight").filter(|at| at.ends_with(".attn"))?;
    let weights = PROJECTIONS.map(|p| params.get(&format!("{at}.{p}.weight")));
    let [Some(q), Some(k), Some(v)] = weights else { return None };
    let Compute { device: Device::Cuda(_), element: DType::Bf16, .. } = compute else { return None };
    let shape = |w: &Weight| match w {
        Weight::Dense(t) | Weight::Masked { value: t, .. } | Weight::Fake { value: t, .. } => {
            t.shape().to_vec()
        }
        Weight::Packed(_) => Vec::new(),
    };
    let shapes = [q, k, v].map(shape);
    let same = |other: &Weight| std::mem::discriminant(q) == std::mem::discriminant(other);
    // Parts of a product begin where sixteen bytes do.
    let [[rows, width], [k_rows, _], [v_rows, _]] =
        shapes.each_ref().map(|s| [s[0], *s.last().unwrap_or(&0)]);
    let aligned = [rows, k_rows, v_rows].iter().all(|n| n % 8 == 0) && width % 8 == 0;
    let has = |part: &str| PROJECTIONS.map(|p| params.get(&format!("{at}.{p}.{part}")).is_some());
    let all_or_none = |[q, k, v]: [bool; 3]| q == k && k == v;
    // A kernel that quantises the output has a step size for each of three equal parts.
    let quantised = matches!(q, Weight::Fake { .. });
    let steps = !quantised
        || lsq::takes_bytes(compute.device, compute.element, width) && rows == k_rows && rows == v_rows;
    let fits = aligned
        && steps
        && same(k)
        && same(v)
        && all_or_none(has("bias"))
        && all_or_none(has("output_scale"));
    fits.then_some((at, [rows, k_rows, v_rows]))
}

/// Compiles the kernels of passes over `spec` that are not in the cache; a first step would wait for one after the other.
pub fn prepare(spec: &TransformerSpec, pattern: Option<Pattern>, compute: Compute) {
    let dense = match spec.head {
        Head::Classify { dense, .. } => dense,
        _ => None,
    };
    let functions = spec.stacks().map(|(_, s)| s.activation).chain(dense).collect();
    let pattern = pattern.map(|p| (p.keep, p.of));
    let heads = spec.stacks().map(|(_, s)| (s.head_dim, pattern)).collect();
    ops::prepare(compute.device, compute.element, &ops::Trained { functions, heads });
}

/// A tensor that linear maps read: as it is where it exists so, and quantised if its maps are.
struct Input {
    plain: Option<Var>,
    quantized: Option<Quantized>,
}

/// What all blocks of a stack share.
#[derive(Clone)]
struct Block {
    stack: Stack,
    own: Attention,
    /// The encoder's output and the attention to it.
    cross: Option<(Var, Attention)>,
    rotation: Option<(RotaryTable, Vec<u32>)>,
}

/// One forward pass in progress.
pub struct Forward<'a> {
    tape: &'a Tape,
    spec: &'a TransformerSpec,
    bound: &'a Bound,
    pattern: Option<Pattern>,
    want: TapSet,
    taps: std::cell::RefCell<Taps>,
}

/// Runs `spec` with the weights in `bound` on `inputs`; attention keeps `pattern` where it is given. The tape gets a
/// milestone before each block, named by what the names of the block's weights begin with (`encoder.0.`).
pub fn forward(
    tape: &Tape,
    spec: &TransformerSpec,
    bound: &Bound,
    pattern: Option<Pattern>,
    inputs: &Inputs,
    want: TapSet,
) -> Output {
    let f = Forward { tape, spec, bound, pattern, want, taps: Default::default() };
    let mut hidden: Option<(Var, &Tokens)> = None;
    if let Some(s) = &spec.encoder {
        hidden = Some((f.stack("encoder", s, &inputs.tokens, None), &inputs.tokens));
    }
    let mut last = &inputs.tokens;
    if let Some(s) = &spec.decoder {
        if spec.encoder.is_some() {
            last = inputs.target.as_ref().expect("an encoder-decoder needs target tokens");
        }
        let source = hidden.take();
        hidden = Some((f.stack("decoder", s, last, source.as_ref()), last));
    }
    let (hidden, _) = hidden.expect("a transformer has a stack");
    let logits = f.head(&hidden, last);
    Output { logits, taps: f.taps.into_inner() }
}

/// What a section of a model makes of its part of the work.
pub struct Passed {
    /// The last block's output, or the head's.
    pub output: Var,
    /// What was asked for. The output of the last block before the section is among the block outputs, that of its own
    /// last block is not, unless it is the model's: each is with the section that reads it, where its gradient is summed.
    pub taps: Taps,
}

/// The blocks of `section` of [`forward`], on the output of the blocks before them, `before` (for the first section
/// `None`). `bound` has the weights that the section owns.
pub fn forward_section(
    tape: &Tape,
    spec: &TransformerSpec,
    bound: &Bound,
    pattern: Option<Pattern>,
    inputs: &Inputs,
    want: TapSet,
    section: &Section,
    before: Option<&Var>,
) -> Passed {
    let f = Forward { tape, spec, bound, pattern, want, taps: Default::default() };
    let (name, s) = spec.stacks().next().expect("a transformer has a stack");
    let hidden = f.section(name, s, &inputs.tokens, None, section, before);
    let output = if section.is_last() { f.head(&hidden, &inputs.tokens) } else { hidden };
    Passed { output, taps: f.taps.into_inner() }
}

/// Draws of dropout that each block has to itself, more than it takes.
const DRAWS: u32 = 16;

impl Forward<'_> {
    fn tap(&self, wanted: bool, name: impl FnOnce() -> String, v: &Var) {
        if wanted {
            self.taps.borrow_mut().insert(name(), v.clone());
        }
    }

    /// Prepares `x` for the maps that read it under the name `input`.
    fn input(&self, input: &str, x: &Var) -> Input {
        self.tap(self.want.linears, || input.to_string(), x);
        let scale = self.bound.leaves.get(&format!("{input}.input_scale"));
        let quantized = scale.map(|s| lsq::quantize_activation(self.tape, x, &s.raw));
        Input { plain: Some(x.clone()), quantized }
    }

    /// What the map `out` reads: the activation of what the map `first` makes of `x`. Where `out` is quantised, nothing
    /// else reads the activation, and it goes from the sums of `first` to codes in one pass.
    fn activated(&self, first: &str, out: &str, x: &Input, s: &Stack) -> Input {
        match self.bound.leaves.get(&format!("{out}.input_scale")) {
            Some(scale) if self.is_quantised(out) && !self.want.linears => {
                let pair = self.output_step(first);
                let (weight, bias) = self.weight_and_bias(first, s.bias);
                let inner = self.product(weight, x, bias, &[], self.bound.element);
                let codes = quantized(self.tape, &inner, s.activation, &scale.raw, pair);
                Input { plain: None, quantized: Some(codes) }
            }
            _ => {
                let inner = self.linear(first, x, s.bias);
                self.input(out, &activation(self.tape, &inner, s.activation))
            }
        }
    }

    fn linear(&self, name: &str, x: &Input, bias: bool) -> Var {
        self.linear_as(name, x, bias, self.bound.element)
    }

    /// [`Forward::linear`] with an output of type `element`.
    fn linear_as(&self, name: &str, x: &Input, bias: bool, element: DType) -> Var {
        let (effective, bias) = self.weight_and_bias(name, bias);
        self.map(&[name.to_string()], effective, x, bias, element)
    }

    fn weight_and_bias(&self, name: &str, bias: bool) -> (&Effective, Option<&Var>) {
        let effective = &self.bound.get(&format!("{name}.weight")).effective;
        (effective, bias.then(|| self.bound.plain(&format!("{name}.bias"))))
    }

    /// Whether the weight of the map `name` is quantised.
    fn is_quantised(&self, name: &str) -> bool {
        matches!(self.bound.get(&format!("{name}.weight")).effective, Effective::Quantized(_))
    }

    /// The step size of the output of the map `name`, if it is quantised.
    fn output_step(&self, name: &str) -> Option<&Var> {
        self.bound.leaves.get(&format!("{name}.output_scale")).map(|s| &s.raw)
    }

    /// The linear maps `names` of one input, whose weights are one below the other. Their outputs are quantised as they
    /// are wanted, except that those of several maps that are to be tapped are left to the caller.
    fn map(
        &self,
        names: &[String],
        weight: &Effective,
        x: &Input,
        bias: Option<&Var>,
        element: DType,
    ) -> Var {
        let steps: Vec<Var> = names.iter().filter_map(|name| self.output_step(name)).cloned().collect();
        // What is tapped is not quantised yet.
        let together = matches!(weight, Effective::Quantized(_)) && !self.want.linears;
        let y = self.product(weight, x, bias, if together { &steps } else { &[] }, element);
        let [name] = names else { return y };
        self.tap(self.want.linears, || format!("{name}.y"), &y);
        match &steps[..] {
            [step] if !together => lsq::fake_quantize(self.tape, &y, step),
            _ => y,
        }
    }

    /// `x` times `weight`; with `steps`, of a quantised weight, fake-quantised.
    fn product(
        &self,
        weight: &Effective,
        x: &Input,
        bias: Option<&Var>,
        steps: &[Var],
        element: DType,
    ) -> Var {
        match (weight, x) {
            (Effective::Plain(w), Input { plain: Some(x), .. }) => linear_as(self.tape, x, w, bias, element),
            (Effective::Quantized(w), Input { quantized: Some(x), .. }) => {
                quantized_linear(self.tape, x, w, bias, steps, element)
            }
            _ => panic!("a map is quantised and its input is not, or the other way round"),
        }
    }

    /// `half`: what is summed was rounded to f16, as the engine holds it.
    fn norm(&self, name: &str, kind: Norm, x: &Var, residual: Option<&Var>, half: bool) -> Var {
        let gain = self.bound.plain(&format!("{name}.weight"));
        match kind {
            Norm::Layer { eps } => {
                let bias = self.bound.plain(&format!("{name}.bias"));
                layer_norm(self.tape, x, residual, gain, bias, eps, half)
            }
            Norm::Rms { eps } => match residual {
                Some(r) => rms_norm(self.tape, &add(self.tape, x, r), gain, eps),
                None => rms_norm(self.tape, x, gain, eps),
            },
        }
    }

    fn embed(&self, name: &str, s: &Stack, tokens: &Tokens) -> Var {
        let e = &s.embed;
        let word = Lookup {
            table: self.bound.plain("embed.word").clone(),
            ids: tokens.ids.clone(),
            factor: e.scale,
        };
        let rows = |numbering| position_rows(tokens, numbering, self.spec.tokens.pad);
        let table = |part: &str| self.bound.plain(&format!("{name}.embed.{part}")).clone();
        let mut lookups = vec![word];
        let mut x = None;
        if e.projected {
            // Positions are as wide as the hidden states, so they join after the projection.
            let word = embedding(self.tape, &lookups, self.bound.element);
            x = Some(linear(self.tape, &word, &table("project_in.weight"), None));
            lookups.clear();
        }
        if let Positions::Learned { numbering, .. } = e.positions {
            lookups.push(Lookup { table: table("position"), ids: rows(numbering), factor: 1.0 });
        }
        if e.types > 0 {
            let ids = if tokens.types.is_empty() { vec![0; tokens.ids.len()] } else { tokens.types.clone() };
            lookups.push(Lookup { table: table("type"), ids, factor: 1.0 });
        }
        let mut sum = match (x, lookups.is_empty()) {
            (Some(x), true) => x,
            (Some(x), false) => add(self.tape, &x, &embedding(self.tape, &lookups, self.bound.element)),
            (None, _) => embedding(self.tape, &lookups, self.bound.element),
        };
        if e.norm {
            sum = self.norm(&format!("{name}.embed.norm"), s.norm, &sum, None, false);
        }
        dropout(self.tape, &sum, s.dropout.hidden)
    }

    fn stack(&self, name: &str, s: &Stack, tokens: &Tokens, source: Option<&(Var, &Tokens)>) -> Var {
        let whole = Section { index: 0, of: 1, blocks: 0..s.layers };
        self.section(name, s, tokens, source, &whole, None)
    }

    /// The blocks of `section`, on `before` or the embeddings.
    fn section(
        &self,
        name: &str,
        s: &Stack,
        tokens: &Tokens,
        source: Option<&(Var, &Tokens)>,
        section: &Section,
        before: Option<&Var>,
    ) -> Var {
        let rows = tokens.batch * tokens.length;
        // An encoder's come before its decoder's.
        let draws = match (name, &self.spec.encoder) {
            ("decoder", Some(encoder)) => DRAWS * (encoder.layers as u32 + 1),
            _ => 0,
        };
        self.tape.draw_from(draws);
        let mut x = match before {
            Some(x) => {
                self.tap(self.want.blocks, || format!("{name}.{}", section.blocks.start - 1), x);
                x.clone()
            }
            None => {
                let x = self.embed(name, s, tokens);
                self.tap(self.want.blocks, || format!("{name}.embed"), &x);
                x
            }
        };
        let table = match &s.embed.positions {
            Positions::Rotary { frequency, .. } => {
                let positions: Vec<u32> = (0..rows).map(|t| (t % tokens.length) as u32).collect();
                Some((RotaryTable::new(tokens.length, frequency), positions))
            }
            Positions::Learned { .. } => None,
        };
        let own = attention_of(s, tokens, tokens, s.causal, self.pattern);
        let cross = source
            .filter(|_| s.cross)
            .map(|(encoded, source)| (encoded.clone(), attention_of(s, tokens, source, false, self.pattern)));
        let block = Block { stack: s.clone(), own, cross, rotation: table };
        // What is tapped inside of a block must be kept.
        let whole = !self.tape.recomputes() || self.want.attention || self.want.linears;
        for i in section.blocks.clone() {
            let at = format!("{name}.{i}");
            self.tape.draw_from(draws + DRAWS * (i as u32 + 1));
            // Nothing before the block uses its weights.
            self.tape.milestone(|| format!("{at}."), || self.bound.made(&format!("{at}.")));
            x = match whole {
                true => self.block(&at, &block, &x),
                false => {
                    let (at, block) = (at.clone(), block.clone());
                    let (spec, bound, pattern) = (self.spec.clone(), self.bound.clone(), self.pattern);
                    self.tape.checkpoint(&x, move |tape, x| {
                        let want = TapSet::default();
                        let (spec, bound) = (&spec, &bound);
                        let f = Forward { tape, spec, bound, pattern, want, taps: Default::default() };
                        f.block(&at, &block, x)
                    })
                }
            };
            let passed_on = i + 1 == section.blocks.end && !section.is_last();
            self.tap(self.want.blocks && !passed_on, || at.clone(), &x);
        }
        self.tape.draw_from(draws + DRAWS * (s.layers as u32 + 1));
        if !section.is_last() {
            return x;
        }
        if s.final_norm {
            x = self.norm(&format!("{name}.norm"), s.norm, &x, None, false);
        }
        if s.embed.projected {
            x = linear(self.tape, &x, self.bound.plain(&format!("{name}.project_out.weight")), None);
        }
        self.tap(self.want.blocks, || format!("{name}.last"), &x);
        x
    }

    /// Block `at` of a stack.
    fn block(&self, at: &str, block: &Block, x: &Var) -> Var {
        let s = &block.stack;
        let mut x = self.sublayer(&format!("{at}.attn.norm"), &format!("{at}.attn.o"), s, x, |x| {
            let input = self.input(&format!("{at}.attn"), x);
            self.attend(&format!("{at}.attn"), s, &input, &input, &block.own, block.rotation.as_ref())
        });
        if let Some((encoded, how)) = &block.cross {
            x = self.sublayer(&format!("{at}.cross.norm"), &format!("{at}.cross.o"), s, &x, |x| {
                let q = self.input(&format!("{at}.cross.q"), x);
                let kv = self.input(&format!("{at}.cross.kv"), encoded);
                self.attend(&format!("{at}.cross"), s, &q, &kv, how, None)
            });
        }
        self.sublayer(&format!("{at}.ffn.norm"), &format!("{at}.ffn.out"), s, &x, |x| {
            let input = self.input(&format!("{at}.ffn"), x);
            let (first, out) = (format!("{at}.ffn.in"), format!("{at}.ffn.out"));
            let inner = if s.gated {
                let inner = self.linear(&first, &input, s.bias);
                let gate = self.linear(&format!("{at}.ffn.gate"), &input, s.bias);
                self.input(&out, &gated_silu(self.tape, &gate, &inner))
            } else {
                self.activated(&first, &out, &input, s)
            };
            self.linear(&out, &inner, s.bias)
        })
    }

    /// Residual connection, dropout and normalisation around `f`, whose last map is `last`, in the stack's order.
    fn sublayer(&self, norm: &str, last: &str, s: &Stack, x: &Var, f: impl FnOnce(&Var) -> Var) -> Var {
        match s.order {
            NormOrder::Pre => {
                let y = f(&self.norm(norm, s.norm, x, None, false));
                add(self.tape, x, &dropout(self.tape, &y, s.dropout.hidden))
            }
            NormOrder::Post => {
                let y = dropout(self.tape, &f(x), s.dropout.hidden);
                self.norm(norm, s.norm, &y, Some(x), self.is_quantised(last))
            }
        }
    }

    fn attend(
        &self,
        at: &str,
        s: &Stack,
        q_input: &Input,
        kv_input: &Input,
        how: &Attention,
        rotation: Option<&(RotaryTable, Vec<u32>)>,
    ) -> Var {
        let joint = self.bound.joint.get(at).filter(|_| std::ptr::eq(q_input, kv_input));
        let names = PROJECTIONS.map(|p| format!("{at}.{p}"));
        // What rotation makes of codes is none.
        let half = || {
            let steps = names.each_ref().map(|name| self.output_step(name).filter(|_| rotation.is_none()));
            let [q, k, v] = steps.map(|step| step.map(|step| step.value().clone()));
            Half { steps: q.zip(k).zip(v).map(|((q, k), v)| [q, k, v]) }
        };
        let how = &Attention { half: self.is_quantised(&format!("{at}.o")).then(half), ..how.clone() };
        let [mut q, mut k, v] = match joint {
            Some(j) => {
                let y = self.map(&names, &j.weight, q_input, j.bias.as_ref(), self.bound.element);
                if rotation.is_none() && !self.want.linears && takes_joint(y.value(), how) {
                    return self.attended(at, s, attention_joint(self.tape, &y, how));
                }
                let parts = split_columns(self.tape, &y, &j.widths);
                let part = |i: usize| {
                    if !self.want.linears {
                        return parts[i].clone();
                    }
                    self.tap(true, || format!("{}.y", names[i]), &parts[i]);
                    let step = self.output_step(&names[i]);
                    step.map_or(parts[i].clone(), |step| lsq::fake_quantize(self.tape, &parts[i], step))
                };
                [part(0), part(1), part(2)]
            }
            None => {
                let [q, k, v] = &names;
                [(q, q_input), (k, kv_input), (v, kv_input)].map(|(name, x)| self.linear(name, x, s.qkv_bias))
            }
        };
        if let Some((table, positions)) = rotation {
            q = rotary(self.tape, &q, positions, table);
            k = rotary(self.tape, &k, positions, table);
        }
        self.attended(at, s, attention(self.tape, &q, &k, &v, how))
    }

    /// What follows attention's output `y`.
    fn attended(&self, at: &str, s: &Stack, y: Var) -> Var {
        self.tap(self.want.attention, || format!("{at}.context"), &y);
        self.linear(&format!("{at}.o"), &self.input(&format!("{at}.o"), &y), s.bias)
    }

    /// Logits are f32: losses and softmaxes of them would feel bf16's 8 bits.
    fn head(&self, hidden: &Var, tokens: &Tokens) -> Var {
        let out = |x: &Var, bias| self.linear_as("head.out", &self.input("head.out", x), bias, DType::F32);
        let drop = self.spec.last_stack().dropout.head;
        match &self.spec.head {
            Head::None => hidden.clone(),
            Head::Classify { dense, .. } => {
                let first: Vec<u32> = (0..tokens.batch).map(|b| (b * tokens.length) as u32).collect();
                let mut x = select_rows(self.tape, hidden, &first);
                if let Some(function) = dense {
                    let y = self.linear("head.dense", &self.input("head.dense", &x), true);
                    x = activation(self.tape, &y, *function);
                }
                // Dropout scales what it keeps by 1/(1-p): behind a saturated tanh that leaves the range the
                // step size was calibrated for, all of it is clipped, and no gradient reaches the model.
                if !self.bound.leaves.contains_key("head.out.input_scale") {
                    x = dropout(self.tape, &x, drop);
                }
                out(&x, true)
            }
            Head::Span => out(hidden, true),
            Head::LanguageModel { tied, bias } => {
                if *tied {
                    let bias = bias.then(|| self.bound.plain("head.out.bias"));
                    let word = cast(self.tape, self.bound.plain("embed.word"), self.bound.element);
                    linear_as(self.tape, hidden, &word, bias, DType::F32)
                } else {
                    out(hidden, *bias)
                }
            }
        }
    }
}
