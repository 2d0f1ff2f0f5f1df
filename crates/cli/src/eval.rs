//! `gpusq eval`: the scores of a model of any stage.

use std::path::PathBuf;
use std::time::Instant;

use clap::ArgMatches;
use gpusq::config::Precision;
use gpusq::evaluate::predict;
use gpusq::preflight::check_fit;
use gpusq::task::{Split, one_class, task};
use gpusq::tensor::Device;
use gpusq::{Error, Result};
use serde_json::json;

use crate::args;
use crate::progress::{counted, out};

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    let split: Split = m.get_one::<String>("split").expect("has a default").parse()?;
    // A task that does not exist is found before a model is downloaded.
    m.get_one::<String>("task").map(|name| task(name)).transpose()?;
    // As a run scores its models.
    let (compute, _) = args::compute(m, Precision::F32, None)?;
    // Packed models answer bit for bit on the CPU, so that a GPU runs them only where it is asked for.
    let asked = m.get_one::<String>("device").is_some_and(|d| d != "auto");
    let engine = if asked { compute.device } else { Device::Cpu };
    let dir = args::model_dir(m)?;
    let (model, tokenizer) = args::load_model(&dir)?;
    let name = m.get_one::<String>("task").or(model.task.as_ref()).ok_or_else(|| {
        Error::Config(format!("{} does not say what task it was trained on; give --task", dir.display()))
    })?;
    let task = task(name)?;
    args::need_trained_head(&model, &dir, task)?;
    let data = m.get_one::<PathBuf>("data").expect("required");
    let length = m.get_one::<usize>("max-length").copied();
    let limit = model.spec.max_length();
    if let Some(asked) = length.filter(|n| *n > limit) {
        let message =
            format!("--max-length is {asked} and the model takes {limit} tokens; set it to at most {limit}");
        return Err(Error::Mismatch(message));
    }
    let dataset = args::load_data(task, data, split, &tokenizer, length, &model)?;
    check_fit(&model, &tokenizer, &[&dataset])?;
    let start = Instant::now();
    let batch = usize::from(*m.get_one::<u16>("batch-size").expect("has a default"));
    let outputs = predict(&model, &dataset, batch, tokenizer.pad_id(), compute, engine, &mut |_| {})?;
    let seconds = start.elapsed().as_secs_f64();
    let scores = dataset.score(&outputs);
    let one_class = one_class(&dataset, &outputs);
    if m.get_flag("json") {
        let object = json!({ "event": "scored", "model": dir.display().to_string(), "stage": model.stage, "task": task.name, "split": split.to_string(),
            "examples": dataset.count, "windows": dataset.examples.len(), "max_length": dataset.max_length, "seconds": seconds, "scores": scores, "one_class": one_class });
        out(object);
    } else {
        out(format_args!(
            "{} ({}) on {} {split}: {scores}; {} in {seconds:.1} s",
            dir.display(),
            model.stage.title(),
            task.name,
            counted(dataset.count, dataset.examples.len())
        ));
        if one_class {
            out("note: predicts one class for every example");
        }
    }
    Ok(())
}
