//! Outputs of a model of any stage for a data set.

use gpusq_tensor::ops::masked::MaskGradient;
use gpusq_tensor::{Device, Tape, Tensor};

use crate::engine::Engine;
use crate::forward::{Bound, TapSet, forward};
use crate::inputs::Inputs;
use crate::model::Model;
use crate::task::{Dataset, HeadKind};
use crate::train::batch::{by_length, collate};
use crate::{Error, Result};

/// From inputs to logits.
type Run<'a> = Box<dyn Fn(&Inputs) -> Result<Tensor> + 'a>;

/// Logits of each example of `data`, in the layout [`Dataset::score`] takes: by the engine for a packed
/// model, by the training forward on `device` for the others. Examples are batched by length, `batch` at a time; `watch`
/// is told how many are done.
///
/// # Errors
/// What the engine says of a packed model it cannot run, or a GPU meets; outputs that are not finite, which have no score.
pub fn predict(
    model: &Model,
    data: &Dataset,
    batch: usize,
    pad: u32,
    device: Device,
    watch: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<f32>>> {
    let run: Run = if model.stage.packed() {
        let engine = Engine::load(model)?;
        Box::new(move |inputs| engine.run(inputs))
    } else {
        let tape = Tape::inference();
        let bound = Bound::new(&tape, &model.params.to(device), MaskGradient::Kept);
        Box::new(move |inputs| {
            let out = forward(&tape, &model.spec, &bound, model.attention, inputs, TapSet::default());
            let logits = out.logits.value().to(Device::Cpu);
            device.check()?;
            Ok(logits)
        })
    };
    let mut outputs = vec![Vec::new(); data.examples.len()];
    let mut done = 0;
    for which in by_length(data, batch) {
        let b = collate(&data.examples, &which, data.head, pad);
        let logits = run(&b.inputs)?;
        let (logits, length) = (logits.f32(), b.inputs.tokens.length);
        for (row, &i) in which.iter().enumerate() {
            outputs[i] = match data.head {
                HeadKind::Classes(n) => logits[row * n..(row + 1) * n].to_vec(),
                HeadKind::Value => vec![logits[row]],
                HeadKind::Span => {
                    let own = &logits[row * length * 2..][..data.examples[i].ids.len() * 2];
                    let starts = own.iter().step_by(2);
                    starts.chain(own.iter().skip(1).step_by(2)).copied().collect()
                }
            };
            if outputs[i].iter().any(|x| !x.is_finite()) {
                let folder = model.config.path().parent().unwrap_or(model.config.path());
                let message = format!(
                    "its outputs for example {} of the {} split are not finite numbers, so that there is no score; \
                     its config.json or weights are spoilt, or its training went wrong: copy or train it again",
                    i + 1,
                    data.split
                );
                return Err(Error::file(folder, message));
            }
        }
        done += which.len();
        watch(done);
    }
    Ok(outputs)
}
