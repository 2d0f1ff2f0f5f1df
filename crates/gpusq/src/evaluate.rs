//! Outputs of a model of any stage for examples.

use gpusq_tensor::ops::masked::MaskGradient;
use gpusq_tensor::{Device, Tape, Tensor};

use crate::engine::Engine;
use crate::forward::{Bound, Compute, TapSet, forward};
use crate::inputs::Inputs;
use crate::model::Model;
use crate::task::{Dataset, Example, HeadKind};
use crate::train::batch::{by_length, collate};
use crate::{Error, Result};

/// From inputs to logits.
type Run<'a> = Box<dyn Fn(&Inputs) -> Result<Tensor> + 'a>;

/// Logits of each example of `data`, in the layout [`Dataset::score`] takes: by the engine on `packed_on` for a packed
/// model, by the training forward as `compute` says for the others. Examples are batched by length, `batch` at a time; `watch`
/// is told how many are done.
///
/// # Errors
/// What the engine says of a packed model it cannot run, or a GPU meets; outputs that are not finite, which have no score.
pub fn predict(
    model: &Model,
    data: &Dataset,
    batch: usize,
    pad: u32,
    compute: Compute,
    packed_on: Device,
    watch: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<f32>>> {
    let run: Run = if model.stage.packed() {
        let engine = Engine::load(model, packed_on)?;
        Box::new(move |inputs| engine.run(inputs))
    } else {
        let tape = Tape::inference();
        let bound = Bound::new(&tape, &model.params, MaskGradient::Kept, compute);
        Box::new(move |inputs| {
            let out = forward(&tape, &model.spec, &bound, model.attention, inputs, TapSet::default());
            let logits = out.logits.value().to(Device::Cpu);
            compute.device.check()?;
            Ok(logits)
        })
    };
    let folder = model.config.path().parent().unwrap_or(model.config.path());
    let name = |i: usize| format!("example {} of the {} split", i + 1, data.split);
    outputs(&run, &data.examples, Some(data.head), batch, pad, watch).map_err(|e| match e {
        Failure::NotFinite(i) => Error::file(folder, not_finite(&name(i))),
        Failure::Run(e) => e,
    })
}

/// Why there are no [`outputs`].
pub(crate) enum Failure {
    /// Those of this example are not finite numbers.
    NotFinite(usize),
    Run(Error),
}

/// What to do about outputs of `what` that are not finite.
pub(crate) fn not_finite(what: &str) -> String {
    format!(
        "its outputs for {what} are not finite numbers, so that there is no score; its config.json or weights are \
         spoilt, or its training went wrong: copy or train it again"
    )
}

/// What `run` gives for each of `examples`, in the layout [`Dataset::score`] takes; without a `head` the hidden states
/// of its tokens. Examples are batched by length, `batch` at a time.
pub(crate) fn outputs(
    run: &dyn Fn(&Inputs) -> Result<Tensor>,
    examples: &[Example],
    head: Option<HeadKind>,
    batch: usize,
    pad: u32,
    watch: &mut dyn FnMut(usize),
) -> std::result::Result<Vec<Vec<f32>>, Failure> {
    let mut outputs = vec![Vec::new(); examples.len()];
    let mut done = 0;
    for which in by_length(examples, batch) {
        let b = collate(examples, &which, head.unwrap_or(HeadKind::Value), pad);
        let result = run(&b.inputs).map_err(Failure::Run)?;
        let (values, length, width) = (result.f32(), b.inputs.tokens.length, result.width());
        for (row, &i) in which.iter().enumerate() {
            // Without its padding.
            let own = || &values[row * length * width..][..examples[i].ids.len() * width];
            outputs[i] = match head {
                Some(HeadKind::Classes(n)) => values[row * n..(row + 1) * n].to_vec(),
                Some(HeadKind::Value) => vec![values[row]],
                Some(HeadKind::Span) => {
                    let starts = own().iter().step_by(2);
                    starts.chain(own().iter().skip(1).step_by(2)).copied().collect()
                }
                None => own().to_vec(),
            };
            if outputs[i].iter().any(|x| !x.is_finite()) {
                return Err(Failure::NotFinite(i));
            }
        }
        done += which.len();
        watch(done);
    }
    Ok(outputs)
}
