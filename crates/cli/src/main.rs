//! `gpusq`: compress transformer language models to 2:4 sparse INT8 and run them.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod demo;
mod eval;
mod inspect;
mod progress;
mod reproduce;
mod run;
mod stages;

use std::process::ExitCode;

fn main() -> ExitCode {
    let matches = match args::command().try_get_matches() {
        Ok(m) => m,
        Err(e) => {
            let printed = e.print();
            if !e.use_stderr() {
                progress::printed(printed);
                return all_printed();
            }
            // The command line did not parse, so that nothing says for sure that it asks for JSON.
            if std::env::args_os().any(|a| a == "--json") {
                let text = e.to_string();
                let first = text.lines().next().unwrap_or_default();
                report_json(first.strip_prefix("error: ").unwrap_or(first));
            }
            return ExitCode::from(2);
        }
    };
    let (name, m) = matches.subcommand().expect("clap requires a command");
    let done = match name {
        "finetune" => stages::finetune(m),
        "compress" => stages::compress(m),
        "prune" => stages::prune(m),
        "quantize" => stages::quantize(m),
        "eval" => eval::run(m),
        "inspect" => inspect::run(m),
        "run" => run::run(m),
        "bench" => bench::run(m),
        "demo" => demo::run(m),
        "reproduce" => reproduce::run(m),
        other => unreachable!("command {other} has no code"),
    };
    let Err(error) = done else { return all_printed() };
    let message = error.to_string();
    if m.try_get_one::<bool>("json").ok().flatten().is_some_and(|j| *j) {
        report_json(&message);
    }
    eprintln!("error: {message}");
    // What is wrong with the command line itself is told from what went wrong in a run.
    ExitCode::from(if matches!(error, gpusq::Error::Config(_)) { 2 } else { 1 })
}

/// How a command ends that did its work: well, if all that it printed got through.
fn all_printed() -> ExitCode {
    let Some(error) = progress::lost() else { return ExitCode::SUCCESS };
    eprintln!("error: standard output: {error}; what was printed there is not complete");
    ExitCode::FAILURE
}

fn report_json(message: &str) {
    progress::out(serde_json::json!({ "event": "error", "message": message }));
}
