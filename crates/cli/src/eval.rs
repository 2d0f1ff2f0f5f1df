//! `gpusq eval`: the scores of a model of any stage.

use std::path::PathBuf;
use std::time::Instant;

use clap::ArgMatches;
use gpusq::evaluate::predict;
use gpusq::preflight::check_fit;
use gpusq::spec::Head;
use gpusq::task::{HeadKind, Split, task};
use gpusq::{Error, Result};
use serde_json::json;

use crate::args;

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    let dir = args::model_dir(m)?;
    let (model, tokenizer) = args::load_model(&dir)?;
    let name = m.get_one::<String>("task").or(model.task.as_ref()).ok_or_else(|| {
        Error::Config(format!("{} does not say what task it was trained on; give --task", dir.display()))
    })?;
    let task = task(name)?;
    let fits = match (&model.spec.head, task.head) {
        (Head::Classify { outputs, .. }, HeadKind::Classes(n)) => *outputs == n,
        (Head::Classify { outputs, .. }, HeadKind::Value) => *outputs == 1,
        (Head::Span, HeadKind::Span) => true,
        _ => false,
    };
    if !fits || !model.fresh.is_empty() {
        let message = format!(
            "{} has no trained head for {}; run `gpusq finetune` on it first",
            dir.display(),
            task.name
        );
        return Err(Error::Mismatch(message));
    }
    let split: Split = m.get_one::<String>("split").expect("has a default").parse()?;
    let data = m.get_one::<PathBuf>("data").expect("required");
    let length = m.get_one::<usize>("max-length").copied();
    let dataset = args::load_data(task, data, split, &tokenizer, length, &model)?;
    check_fit(&model, &tokenizer, &[&dataset])?;
    let start = Instant::now();
    let batch = *m.get_one::<usize>("batch-size").expect("has a default");
    let outputs = predict(&model, &dataset, batch, tokenizer.pad_id(), &mut |_| {})?;
    let seconds = start.elapsed().as_secs_f64();
    let scores = dataset.score(&outputs);
    if m.get_flag("json") {
        let object = json!({ "event": "scored", "model": dir, "stage": model.stage, "task": task.name, "split": split.to_string(),
            "examples": dataset.examples.len(), "seconds": seconds, "scores": scores });
        println!("{object}");
    } else {
        println!(
            "{} ({}) on {} {split}: {scores}; {} examples in {seconds:.1} s",
            dir.display(),
            model.stage.title(),
            task.name,
            dataset.examples.len()
        );
    }
    Ok(())
}
