//! `gpusq`: compress transformer language models to 2:4 sparse INT8 and run them.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod demo;
mod eval;
mod inspect;
mod interrupt;
mod launch;
mod progress;
mod ranks;
mod reproduce;
mod run;
mod stages;

use std::io::Write;
use std::process::ExitCode;

use ranks::{need_one, with_group};

fn main() -> ExitCode {
    let line: Vec<_> = std::env::args_os().collect();
    let matches = match args::parse(&line) {
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
    if matches!(m.try_contains_id("resume"), Ok(true)) {
        interrupt::tell_how_to_go_on();
    }
    let done = match name {
        "finetune" => with_group(m, stages::finetune),
        "compress" => with_group(m, stages::compress),
        "prune" => with_group(m, stages::prune),
        "quantize" => with_group(m, stages::quantize),
        "eval" => eval::run(m),
        "inspect" => inspect::run(m),
        "run" => run::run(m),
        "bench" => bench::run(m),
        "demo" => need_one(name).and_then(|()| demo::run(m)),
        "reproduce" => need_one(name).and_then(|()| reproduce::run(m)),
        "launch" => launch::run(m),
        other => unreachable!("command {other} has no code"),
    };
    let Err(error) = done else { return all_printed() };
    fail(&error);
    // What is wrong with the command line itself is told from what went wrong in a run.
    ExitCode::from(if matches!(error, gpusq::Error::Config(_)) { 2 } else { 1 })
}

/// Says why a process ends, once.
fn fail(error: &gpusq::Error) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        let message = error.to_string();
        if ranks::speaks() && std::env::args_os().any(|a| a == "--json") {
            report_json(&message);
        }
        // Where standard error is closed there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "error: {message}");
    });
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
