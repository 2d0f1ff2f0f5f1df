//! Shows a run: a bar on a terminal, plain lines elsewhere, JSON lines for machines.

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gpusq::compress::Event;
use gpusq::preflight::Preflight;
use gpusq::report::{bytes, grouped};
use gpusq::tensor::Group;
use gpusq::train;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

/// How a run is shown.
pub(crate) struct Progress {
    /// Another process speaks.
    silent: bool,
    json: bool,
    bar: Option<ProgressBar>,
    terminal: bool,
    stage: String,
    first: usize,
    started: Instant,
    last: Instant,
}

/// Time between two plain lines.
const EVERY: Duration = Duration::from_secs(15);

impl Progress {
    pub(crate) fn new(json: bool) -> Self {
        let now = Instant::now();
        let terminal = io::stderr().is_terminal();
        Progress {
            silent: false,
            json,
            bar: None,
            terminal,
            stage: String::new(),
            first: 0,
            started: now,
            last: now,
        }
    }

    /// Of the processes of `group`, rank 0 shows what all do.
    pub(crate) fn of(group: &Group, json: bool) -> Self {
        Progress { silent: !group.is_first(), ..Progress::new(json) }
    }

    /// A line for people, or an object for machines.
    pub(crate) fn say(&mut self, line: &str, object: serde_json::Value) {
        if self.silent {
            return;
        }
        if self.json {
            out(format_args!("{object}"));
        } else if let Some(bar) = &self.bar {
            bar.suspend(|| out(format_args!("{line}")));
        } else {
            out(format_args!("{line}"));
        }
    }

    /// Something the user should know before a run starts.
    pub(crate) fn note(&mut self, text: &str) {
        self.say(&format!("note: {text}"), json!({ "event": "note", "text": text }));
    }

    pub(crate) fn preflight(&mut self, p: &Preflight) {
        let maps: usize = p.compressed.iter().map(|(_, n)| n).sum();
        let share = 100.0 * p.compressed_parameters as f64 / p.parameters as f64;
        let compresses = match maps {
            0 => String::new(),
            n => format!(", {n} linear maps to compress ({share:.1} % of the parameters)"),
        };
        let mut text = format!(
            "{} parameters{compresses}; {} to train on, {} to score; \
             longest {} tokens\nruns {}on {} and needs about {} of its memory and {} of disk{}",
            grouped(p.parameters as u64),
            counted(p.examples.0, p.windows.0),
            counted(p.examples.1, p.windows.1),
            p.longest,
            if p.processes > 1 { format!("in {} processes, this one ", p.processes) } else { String::new() },
            p.device,
            bytes(p.memory),
            bytes(p.disk),
            match p.teacher_cache {
                0 => String::new(),
                n => format!(", {} more for the teacher's outputs", bytes(n)),
            }
        );
        let names: Vec<String> = p.compressed.iter().map(|(name, n)| format!("{name} ({n})")).collect();
        if !names.is_empty() {
            text += &format!("\ncompresses: {}", names.join(", "));
        }
        for (name, reason) in &p.left_dense {
            text += &format!("\nstays dense: {name} ({reason})");
        }
        for w in &p.warnings {
            text += &format!("\nnote: {w}");
        }
        self.say(&text, json!({ "event": "preflight", "preflight": p }));
    }

    pub(crate) fn show(&mut self, event: Event) {
        if self.silent {
            return;
        }
        match event {
            Event::Stage { name, steps, done } => {
                self.finish();
                self.stage = name.into();
                (self.first, self.started, self.last) = (done, Instant::now(), Instant::now());
                let resumed =
                    if done > 0 { format!(", continuing after step {done}") } else { String::new() };
                self.say(
                    &format!("{name}: {steps} steps{resumed}"),
                    json!({ "event": "stage", "stage": name, "steps": steps, "done": done }),
                );
                if self.terminal && !self.json {
                    let bar = ProgressBar::new(steps as u64).with_position(done as u64);
                    let style = "{prefix} {bar:24} {pos}/{len} {elapsed} eta {eta} {per_sec} {msg}";
                    bar.set_style(ProgressStyle::with_template(style).expect("the template is a constant"));
                    bar.set_prefix(self.stage.clone());
                    bar.reset_eta();
                    self.bar = Some(bar);
                }
            }
            Event::Train(train::Event::Step { step, steps, terms, learning_rate, tokens }) => {
                let line = format!("loss {:.4} lr {learning_rate:.2e}", terms.total);
                if let Some(bar) = &self.bar {
                    bar.set_position(step as u64);
                    bar.set_message(line);
                } else if self.json {
                    out(format_args!(
                        "{}",
                        json!({ "event": "step", "stage": self.stage, "step": step, "steps": steps, "loss": terms.total, "hard": terms.hard,
                            "soft": terms.soft, "feature": terms.feature, "learning_rate": learning_rate, "tokens": tokens })
                    ));
                } else if self.last.elapsed() > EVERY || step == steps {
                    self.last = Instant::now();
                    let rate = (step - self.first) as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
                    let left = Duration::from_secs_f64((steps - step) as f64 / rate.max(1e-9));
                    out(format_args!(
                        "{}: step {step}/{steps} {line} {rate:.2} steps/s, {} left",
                        self.stage,
                        clock(left)
                    ));
                }
            }
            Event::Train(train::Event::Saved { step }) => {
                if self.json {
                    out(format_args!("{}", json!({ "event": "saved", "stage": self.stage, "step": step })));
                }
            }
            Event::Train(train::Event::Stopped { step, running }) => {
                let line = format!(
                    "{}: running loss {running:.4} is below its threshold, stopping at step {step}",
                    self.stage
                );
                self.say(
                    &line,
                    json!({ "event": "stopped", "stage": self.stage, "step": step, "running_loss": running }),
                );
            }
            Event::Scored { name, scores } => {
                self.finish();
                self.say(
                    &format!("{name}: {scores}"),
                    json!({ "event": "scored", "stage": name, "scores": scores }),
                );
            }
            Event::Note(text) => self.say(text, json!({ "event": "note", "text": text })),
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// What standard output failed with first.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// Whether whoever read standard output has gone away.
static GONE: AtomicBool = AtomicBool::new(false);

/// A line on standard output. A run of hours goes on when nothing takes its output any more.
pub(crate) fn out(line: impl std::fmt::Display) {
    printed(writeln!(io::stdout(), "{line}"));
}

/// Keeps what printing failed with, unless whoever read has gone away and so has what they wanted.
pub(crate) fn printed(result: io::Result<()>) {
    match result {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::BrokenPipe => GONE.store(true, Ordering::Relaxed),
        // A later failure says no more than the first.
        Err(e) => drop(LOST.set(e)),
    }
}

/// Whether what is printed from now on reaches nobody, for commands that do nothing but print.
pub(crate) fn unread() -> bool {
    GONE.load(Ordering::Relaxed) || lost().is_some()
}

/// Why something that was printed is lost, if anything is.
pub(crate) fn lost() -> Option<&'static io::Error> {
    LOST.get()
}

/// Examples, and the windows they are read in where these are more.
pub(crate) fn counted(examples: usize, windows: usize) -> String {
    match windows == examples {
        true => format!("{} examples", grouped(examples as u64)),
        false => format!("{} examples in {} windows", grouped(examples as u64), grouped(windows as u64)),
    }
}

fn clock(d: Duration) -> String {
    let s = d.as_secs();
    if s >= 3600 {
        format!("{}h{:02}m", s / 3600, s % 3600 / 60)
    } else {
        format!("{}m{:02}s", s / 60, s % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        assert_eq!([clock(Duration::from_secs(65)), clock(Duration::from_secs(3700))], ["1m05s", "1h01m"]);
    }
}
