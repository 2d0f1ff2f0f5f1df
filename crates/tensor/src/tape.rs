//! Reverse-mode differentiation over the fused operations.
//!
//! A [`Tape`] records, for each result that depends on a leaf, the closure that turns the result's
//! gradient into its inputs' gradients. [`Tape::backward`] runs them in reverse and frees each as it
//! goes. An inference tape records nothing, so that teacher and evaluation passes keep no activations.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};

use crate::cpu::ahead;
use crate::cuda::reduce::{self, Sums};
use crate::ops::add;
use crate::{Device, Tensor};

type Backward = Box<dyn FnOnce(Tensor, &mut Grads)>;

/// What the backward pass does at a place of the tape.
enum Node {
    /// Hands the gradient of a result on to what that was made of.
    Result(Backward),
    /// Tells that it has come so far ([`Tape::milestone`]).
    Milestone { name: String, made: Vec<Var> },
}

/// A value on a tape: the tensor, and its place on the tape if a gradient flows through it.
#[derive(Clone)]
pub struct Var {
    value: Tensor,
    node: Option<usize>,
}

impl Var {
    /// The computed value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Extent of each dimension.
    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }

    /// Whether a gradient flows through this value.
    pub fn tracked(&self) -> bool {
        self.node.is_some()
    }
}

/// Gradients by tape position, filled by [`Tape::backward`].
pub struct Grads {
    slots: Vec<Option<Tensor>>,
    /// Column sums of gradients that came with them. Ordered, so that memory is freed in one order.
    sums: BTreeMap<usize, Sums>,
    /// Those of the gradient that is being handed on.
    known: Option<Sums>,
    /// Gradients that are sums not made yet, and the positions they are of.
    unmade: Vec<(Sums, Tensor)>,
    waiting: HashSet<usize>,
}

impl Grads {
    /// Whether the gradient of `var` is asked for.
    pub fn wants(&self, var: &Var) -> bool {
        var.node.is_some()
    }

    /// Adds `grad` (the shape of `var`'s value) to the gradient of `var`.
    pub fn add(&mut self, var: &Var, grad: Tensor) {
        let Some(node) = var.node else { return };
        debug_assert_eq!(
            grad.len(),
            var.value.len(),
            "gradient of shape {:?} for {:?}",
            grad.shape(),
            var.shape()
        );
        self.sums.remove(&node);
        self.settle(node);
        match &mut self.slots[node] {
            Some(sum) => add::accumulate(sum, &grad),
            empty => *empty = Some(grad),
        }
    }

    /// [`Grads::add`] of sums that are made when something reads them: at the end of the backward pass, if nothing does.
    pub(crate) fn add_sums(&mut self, var: &Var, sums: Sums) {
        let Some(node) = var.node else { return };
        let place = sums.place(var.shape());
        self.unmade.push((sums, place.clone()));
        match self.slots[node] {
            Some(_) => {
                self.make_sums();
                self.add(var, place);
            }
            None => {
                self.slots[node] = Some(place);
                self.waiting.insert(node);
            }
        }
    }

    fn make_sums(&mut self) {
        let wanted = std::mem::take(&mut self.unmade);
        self.waiting.clear();
        if let Some((_, first)) = wanted.first() {
            let Device::Cuda(gpu) = first.device() else { unreachable!("left by kernels") };
            reduce::make(gpu, &wanted);
        }
    }

    /// Makes the gradient at `node`, if it is one that is not made yet; with all others that are not.
    fn settle(&mut self, node: usize) {
        if self.waiting.contains(&node) {
            self.make_sums();
        }
    }

    /// [`Grads::add`] of a gradient whose column sums were had in the same pass: a bias' gradient.
    pub(crate) fn add_with_sums(&mut self, var: &Var, grad: Tensor, sums: Sums) {
        let Some(node) = var.node else { return };
        let alone = self.slots[node].is_none();
        self.add(var, grad);
        if alone {
            self.sums.insert(node, sums);
        }
    }

    /// Column sums of the gradient that the backward pass of an operation was called with, if they are known.
    pub(crate) fn known_sums(&mut self) -> Option<Sums> {
        self.known.take()
    }

    /// Lets `f` add to the gradient of `var` in place; it starts at zero, in the type of `var`.
    pub fn add_with(&mut self, var: &Var, f: impl FnOnce(&mut Tensor)) {
        let zeros = || match var.value.device() {
            Device::Cpu => Tensor::zeros(var.shape()),
            Device::Cuda(gpu) => Tensor::zeros_of(gpu, var.value.dtype(), var.shape()),
        };
        if let Some(slot) = self.slot(var) {
            f(slot.get_or_insert_with(zeros));
        }
    }

    /// Where the gradient of `var` is summed, if it is asked for; empty until something was added.
    pub(crate) fn slot(&mut self, var: &Var) -> Option<&mut Option<Tensor>> {
        let node = var.node?;
        self.sums.remove(&node);
        self.settle(node);
        Some(&mut self.slots[node])
    }

    /// Runs `nodes`, the first of which has position `base`, from the last to the first, and calls `reached` at each
    /// milestone.
    fn run(&mut self, nodes: &mut [Option<Node>], base: usize, reached: &mut dyn FnMut(&str, &mut Grads)) {
        for i in (0..nodes.len()).rev() {
            match nodes[i].take() {
                // Leaves hand nothing on and keep their gradient for `take`; and what was handed on already.
                None => {}
                Some(Node::Result(backward)) => self.hand_on(base + i, backward),
                Some(Node::Milestone { name, made }) => {
                    for node in made.iter().filter_map(|v| v.node) {
                        if let Some(Node::Result(backward)) = nodes[node - base].take() {
                            self.hand_on(node, backward);
                        }
                    }
                    reached(&name, self);
                }
            }
        }
    }

    fn hand_on(&mut self, node: usize, backward: Backward) {
        self.settle(node);
        if let Some(grad) = self.slots[node].take() {
            self.known = self.sums.remove(&node);
            backward(grad, self);
        }
    }

    /// Takes the gradient of `var`; `None` if nothing that was differentiated depends on it.
    pub fn take(&mut self, var: &Var) -> Option<Tensor> {
        let node = var.node?;
        self.settle(node);
        self.slots[node].take()
    }
}

/// The record of one forward pass.
pub struct Tape {
    nodes: RefCell<Vec<Option<Node>>>,
    /// Position of the first node: what a checkpoint computes again lies behind the nodes of the tape around it.
    base: usize,
    recording: bool,
    /// Whether [`Tape::checkpoint`] keeps inputs only.
    recomputes: bool,
    /// Dropout key; `None` switches dropout off.
    seed: Option<u64>,
    draws: Cell<u32>,
    part: Part,
}

/// Which sequences of a batch are computed: a batch that does not fit a device, or that several share, is computed in
/// parts, and nothing random and no step size's gradient may depend on how it was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The first of them.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// How many the whole batch has.
    pub of: usize,
}

impl Part {
    /// The whole batch.
    pub const WHOLE: Part = Part { first: 0, count: 1, of: 1 };

    /// Elements before this part's in a whole batch's tensor, whose part has `elements`.
    pub(crate) fn before(self, elements: usize) -> u64 {
        (elements / self.count) as u64 * self.first as u64
    }

    /// Elements of a whole batch's tensor whose part has `elements`.
    pub(crate) fn all(self, elements: usize) -> usize {
        elements / self.count * self.of
    }
}

impl Tape {
    /// A tape that records, without dropout.
    pub fn recording() -> Self {
        Tape {
            nodes: RefCell::default(),
            base: 0,
            recording: true,
            recomputes: false,
            seed: None,
            draws: Cell::new(0),
            part: Part::WHOLE,
        }
    }

    /// A tape that records, with dropout drawn from `seed`: the same seed gives the same masks.
    pub fn training(seed: u64) -> Self {
        Tape { seed: Some(seed), ..Self::recording() }
    }

    /// The same for a part of a batch: together the parts get the masks and the step sizes' gradients of the whole.
    pub fn of_part(self, part: Part) -> Self {
        assert!(part.count > 0, "a part without sequences");
        Tape { part, ..self }
    }

    /// Which part of a batch this tape computes.
    pub(crate) fn part(&self) -> Part {
        self.part
    }

    /// A tape that records nothing: no gradients, no dropout, no kept activations.
    pub fn inference() -> Self {
        Tape { recording: false, ..Self::recording() }
    }

    /// The same tape, whose [`Tape::checkpoint`]s keep their input and are computed again for the backward pass.
    pub fn recomputing(self, recomputes: bool) -> Self {
        Tape { recomputes, ..self }
    }

    /// Whether [`Tape::checkpoint`] keeps inputs only.
    pub fn recomputes(&self) -> bool {
        self.recomputes && self.recording
    }

    /// `f` of `x`, of which only `x` and the result are kept if this tape recomputes: the backward pass runs `f`
    /// again (gradient checkpointing, Chen et al. 2016). Values, dropout and gradients have the same bits either way.
    /// What else `f` reads, other values of this tape among it, it owns.
    pub fn checkpoint(&self, x: &Var, f: impl Fn(&Tape, &Var) -> Var + 'static) -> Var {
        if !self.recomputes() {
            return f(self, x);
        }
        let (seed, first, part) = (self.seed, self.draws.get(), self.part);
        let quiet = Tape { recording: false, seed, draws: Cell::new(first), part, ..Tape::recording() };
        let value = f(&quiet, x).value;
        self.draws.set(quiet.draws.get());
        let x = x.clone();
        let backward = move |grad: Tensor, grads: &mut Grads| {
            let outer = grads.slots.len();
            let again = Tape { base: outer, seed, draws: Cell::new(first), part, ..Tape::recording() };
            let y = f(&again, &x);
            let mut nodes = again.nodes.into_inner();
            grads.slots.resize(outer + nodes.len(), None);
            // Column sums that came with the gradient are used as without a checkpoint, or the bits would differ.
            match grads.known_sums() {
                Some(sums) => grads.add_with_sums(&y, grad, sums),
                None => grads.add(&y, grad),
            }
            grads.run(&mut nodes, outer, &mut |_, _| {});
            grads.slots.truncate(outer);
            grads.sums.retain(|node, _| *node < outer);
            grads.waiting.retain(|node| *node < outer);
        };
        Var { value, node: Some(self.slot(Some(Node::Result(Box::new(backward))))) }
    }

    /// A place that the backward pass tells of ([`Tape::backward_with`]) when it has come there, by its name: then the
    /// gradients of leaves that nothing before this place uses are what they will be. Results that were made before, and
    /// that nothing uses between their making and this place, `made`, have handed theirs on by then too.
    pub fn milestone(&self, name: impl FnOnce() -> String, made: impl FnOnce() -> Vec<Var>) {
        if self.recording {
            self.slot(Some(Node::Milestone { name: name(), made: made() }));
        }
    }

    /// A value whose gradient is wanted.
    pub fn leaf(&self, value: Tensor) -> Var {
        if !self.recording {
            return Var { value, node: None };
        }
        Var { value, node: Some(self.slot(None)) }
    }

    /// A value whose gradient is not wanted.
    pub fn constant(&self, value: Tensor) -> Var {
        Var { value, node: None }
    }

    /// Lets the dropouts that follow draw as the `n`-th ones of the tape and those after it, whatever came before: what
    /// is dropped in a block then depends on the block alone, wherever the blocks before it are computed.
    pub fn draw_from(&self, n: u32) {
        self.draws.set(n);
    }

    /// The key for the next dropout, of a tensor with `elements`, if this tape drops.
    pub(crate) fn next_draw(&self, elements: usize) -> Option<u64> {
        let seed = self.seed?;
        let n = self.draws.replace(self.draws.get() + 1);
        // SplitMix64's finaliser: keys that differ little would give one sequence from different indices on.
        let z = seed.wrapping_add(u64::from(n) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Some(ahead(z ^ (z >> 31), self.part.before(elements)))
    }

    /// Whether an operation on `inputs` will be differentiated, so that it must keep what its backward needs.
    pub(crate) fn tracks(&self, inputs: &[&Var]) -> bool {
        self.recording && inputs.iter().any(|v| v.tracked())
    }

    /// Records a result of `inputs`. `backward` receives the result's gradient; it is dropped unused if
    /// no input is tracked.
    pub(crate) fn push(
        &self,
        value: Tensor,
        inputs: &[&Var],
        backward: impl FnOnce(&Tensor, &mut Grads) + 'static,
    ) -> Var {
        self.push_owned(value, inputs, move |grad, grads| backward(&grad, grads))
    }

    /// [`Tape::push`] with a `backward` that has the gradient for itself, so that it can be divided without a copy.
    pub(crate) fn push_owned(
        &self,
        value: Tensor,
        inputs: &[&Var],
        backward: impl FnOnce(Tensor, &mut Grads) + 'static,
    ) -> Var {
        if !self.tracks(inputs) {
            return Var { value, node: None };
        }
        Var { value, node: Some(self.slot(Some(Node::Result(Box::new(backward))))) }
    }

    /// The same elements under another shape.
    pub fn reshape(&self, x: &Var, shape: &[usize]) -> Var {
        let x2 = x.clone();
        self.push(x.value().reshape(shape), &[x], move |grad, grads| {
            grads.add(&x2, grad.reshape(x2.shape()));
        })
    }

    fn slot(&self, node: Option<Node>) -> usize {
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(node);
        self.base + nodes.len() - 1
    }

    /// Gradients of the one-element `loss` with respect to every leaf. The record is used up.
    pub fn backward(self, loss: &Var) -> Grads {
        self.backward_with(Some(loss), None, &mut |_, _| {})
    }

    /// Gradients of a loss that is `loss`, if given, plus what is computed elsewhere of a result of this tape, with
    /// respect to which that has the gradient `outer`. `reached` is called at each milestone, from the last to the first,
    /// and may take gradients that are done. The record is used up.
    pub fn backward_with(
        self,
        loss: Option<&Var>,
        outer: Option<(&Var, Tensor)>,
        reached: &mut dyn FnMut(&str, &mut Grads),
    ) -> Grads {
        let mut nodes = self.nodes.into_inner();
        let mut grads = Grads {
            slots: vec![None; nodes.len()],
            sums: BTreeMap::new(),
            known: None,
            unmade: Vec::new(),
            waiting: HashSet::new(),
        };
        if let Some(loss) = loss {
            grads.add(loss, Tensor::full(loss.shape(), 1.0).to(loss.value.device()));
        }
        if let Some((result, grad)) = outer {
            grads.add(result, grad);
        }
        grads.run(&mut nodes, 0, reached);
        grads.make_sums();
        grads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::activation::{Activation, activation};
    use crate::ops::check::noise;
    use crate::ops::dropout::dropout;
    use crate::ops::linear::linear;
    use crate::ops::weighted_sum::dot;

    /// Two layers that share a weight, with dropout and a residual input from outside.
    fn run(device: Device, recomputes: bool) -> (Tensor, Vec<Tensor>, usize) {
        let tape = Tape::training(7).recomputing(recomputes);
        let leaf = |seed, shape: &[usize]| tape.leaf(noise(shape, seed).to(device));
        let (x, w, beside) = (leaf(1, &[6, 8]), leaf(2, &[8, 8]), leaf(3, &[6, 8]));
        let mut y = x.clone();
        for _ in 0..2 {
            let (w, beside) = (w.clone(), beside.clone());
            y = tape.checkpoint(&y, move |tape, x| {
                let y = activation(tape, &linear(tape, x, &w, None), Activation::Gelu);
                add::add(tape, &dropout(tape, &y, 0.3), &beside)
            });
        }
        // What is drawn after a checkpoint does not depend on it either.
        let y = dropout(&tape, &y, 0.5);
        let loss = dot(&tape, &y, &noise(&[6, 8], 4));
        let kept = tape.nodes.borrow().len();
        let value = y.value().to(Device::Cpu);
        let mut grads = tape.backward(&loss);
        let of = [&x, &w, &beside].map(|v| grads.take(v).expect("has a gradient").to(Device::Cpu));
        (value, of.to_vec(), kept)
    }

    /// Three layers with a weight each, all made at the start: at each milestone the gradient of the weight of the layer
    /// behind it is what it is at the end, and no other's is there yet.
    #[test]
    fn a_milestone_is_told_when_gradients_are_done() {
        use crate::ops::masked::{MaskGradient, multiplied};
        for device in Device::all() {
            for recomputes in [false, true] {
                let run = |takes: bool| {
                    let tape = Tape::training(7).recomputing(recomputes);
                    let leaf = |seed, shape: &[usize]| tape.leaf(noise(shape, seed).to(device));
                    let mut y = leaf(1, &[6, 8]);
                    let raw: Vec<Var> = (0..3).map(|i| leaf(2 + i, &[8, 8])).collect();
                    let groups: Vec<_> = raw.iter().map(|w| vec![(w.clone(), None)]).collect();
                    let made = multiplied(&tape, &groups, MaskGradient::Kept, crate::DType::F32);
                    for (i, w) in made.into_iter().enumerate() {
                        tape.milestone(|| i.to_string(), || vec![w.clone()]);
                        y = tape
                            .checkpoint(&y, move |tape, x| dropout(tape, &linear(tape, x, &w, None), 0.3));
                    }
                    let loss = dot(&tape, &y, &noise(&[6, 8], 9));
                    let mut taken = Vec::new();
                    let mut grads = tape.backward_with(Some(&loss), None, &mut |name, grads| {
                        if takes {
                            let there = raw.iter().map(|w| grads.take(w));
                            let there: Vec<(usize, Tensor)> = there
                                .enumerate()
                                .filter_map(|(i, g)| Some((i, g?.to(Device::Cpu))))
                                .collect();
                            assert!(there.len() == 1 && there[0].0.to_string() == name, "{name}");
                            taken.extend(there);
                        }
                    });
                    if takes {
                        assert!(raw.iter().all(|w| grads.take(w).is_none()));
                        taken.reverse();
                        return taken.into_iter().map(|(_, g)| g).collect::<Vec<_>>();
                    }
                    raw.iter().map(|w| grads.take(w).unwrap().to(Device::Cpu)).collect()
                };
                assert_eq!(run(true), run(false), "{device:?}, {recomputes}");
            }
        }
    }

    #[test]
    fn a_checkpoint_keeps_less_and_changes_no_bit() {
        for device in Device::all() {
            let (plain, again) = (run(device, false), run(device, true));
            assert_eq!(plain.0, again.0, "{device:?}");
            assert_eq!(plain.1, again.1, "{device:?}");
            assert!(again.2 < plain.2, "{} nodes, {} without checkpoints", again.2, plain.2);
        }
    }
}
