//! `gpusq reproduce`: an experiment of the paper, as many ordinary runs with one table.

use clap::ArgMatches;
use gpusq::Result;
use gpusq::model::Stage;
use gpusq::report::{COMPARISON_FILE, PAGE_FILE, TABLE_FILE};
use gpusq::reproduce::{Event, Reproduction, experiment};
use gpusq::tensor::Group;
use serde_json::json;

use crate::args;
use crate::progress::Progress;
use crate::stages::{Head, Start};

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    // Both are found before a model is downloaded.
    let experiment = experiment(m.get_one::<String>("experiment").expect("required"))?;
    args::refuse_settings_of(experiment, m)?;
    let seeds = args::chosen_seeds(m)?;
    let s = Start::read("reproduce", Stage::Dense, Head::Either, m, Group::alone())?;
    let trained = args::need_trained_head(&s.model, &s.model_dir, s.task).is_ok();
    let reproduction = Reproduction {
        experiment,
        base: s.run(),
        model: &s.model,
        trained,
        seeds: &seeds,
        keep_models: m.get_flag("keep-models"),
    };
    let mut progress = Progress::new(m.get_flag("json"));
    let done = reproduction.run(&mut |event| match event {
        Event::Preflight(p) => {
            progress.preflight(p);
            s.notes().iter().for_each(|note| progress.note(note));
        }
        Event::Run { number, of, seed, label, folder, finished } => {
            let before = if finished { ", finished before" } else { "" };
            let line = format!("run {number}/{of}: {label}, seed {seed}, in {}{before}", folder.display());
            let object = json!({ "event": "run", "number": number, "of": of, "seed": seed, "variant": label,
                "folder": folder.display().to_string(), "finished": finished });
            progress.say(&line, object);
        }
        Event::Within(event) => progress.show(event),
    })?;
    let (_, verdict) = done.verdict();
    let [page, table, file] = [PAGE_FILE, TABLE_FILE, COMPARISON_FILE].map(|name| s.out.join(name));
    progress.say(
        &format!(
            "\n{}\nwrote {}, {} and {}",
            done.markdown(),
            table.display(),
            page.display(),
            file.display()
        ),
        json!({ "event": "done", "verdict": verdict, "report": page.display().to_string(),
            "table": table.display().to_string(), "scores": file.display().to_string(), "rows": done.rows }),
    );
    Ok(())
}
