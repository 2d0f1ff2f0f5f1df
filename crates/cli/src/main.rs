//! `gpusq`: compress transformer language models to 2:4 sparse INT8 and run them.
#![forbid(unsafe_code)]

mod args;
mod demo;
mod eval;
mod inspect;
mod progress;
mod stages;

use std::process::ExitCode;

fn main() -> ExitCode {
    let matches = match args::command().try_get_matches() {
        Ok(m) => m,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
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
        "demo" => demo::run(m),
        other => unreachable!("command {other} has no code"),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            if m.try_get_one::<bool>("json").ok().flatten().is_some_and(|j| *j) {
                println!("{}", serde_json::json!({ "event": "error", "message": e.to_string() }));
            }
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}
