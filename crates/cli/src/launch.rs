//! `gpusq launch`: a training command as one process for each GPU of this host.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use clap::ArgMatches;
use gpusq::{Error, Result};

use crate::progress::out;
use crate::ranks::{COMMANDS, LAUNCHED};

/// How long the others may take to end by themselves once one has failed.
const ENDING: Duration = Duration::from_secs(8);

const RESUME: &str = "run the command again with --resume to go on from the last checkpoint";

/// A process, and what becomes of what it says.
struct Rank {
    child: Child,
    /// Its last error.
    error: Arc<Mutex<Option<String>>>,
    relays: Vec<JoinHandle<()>>,
    ended: Option<(Instant, ExitStatus)>,
}

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    let size = usize::from(*m.get_one::<u16>("gpus").expect("required"));
    let words: Vec<OsString> = m.get_many::<OsString>("command").expect("required").cloned().collect();
    if !COMMANDS.iter().any(|c| words[0] == *c) {
        return Err(Error::Config(format!(
            "gpusq launch starts {}, and not `{}`",
            COMMANDS.join(", "),
            words[0].to_string_lossy()
        )));
    }
    let system = |what: &str, e: std::io::Error| Error::Mismatch(format!("cannot {what}: {e}"));
    let program = std::env::current_exe().map_err(|e| system("find this program", e))?;
    // Free a moment ago, which is the best that can be known.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map(|a| a.port());
    let port = port.map_err(|e| system("find a free port", e))?.to_string();
    let cores = thread::available_parallelism().map_or(1, |n| n.get());
    let mut ranks: Vec<Rank> = Vec::new();
    for rank in 0..size {
        let mut command = Command::new(&program);
        command
            .args(&words)
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", size.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", &port)
            .env(LAUNCHED, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            // As many threads in each as there are cores would be in each other's way.
            command.env("RAYON_NUM_THREADS", (cores / size).max(1).to_string());
        }
        match command.spawn() {
            Ok(child) => ranks.push(Rank::new(rank, child)),
            Err(e) => {
                ranks.iter_mut().for_each(Rank::kill);
                return Err(system(&format!("start rank {rank}"), e));
            }
        }
    }
    let mut until = None;
    while ranks.iter().any(|r| r.ended.is_none()) {
        for rank in &mut ranks {
            rank.look();
            if rank.failed() {
                until.get_or_insert_with(|| Instant::now() + ENDING);
            }
        }
        if until.is_some_and(|t| Instant::now() > t) {
            ranks.iter_mut().for_each(Rank::kill);
        }
        thread::sleep(Duration::from_millis(10));
    }
    for relay in ranks.iter_mut().flat_map(|r| r.relays.drain(..)) {
        // One that panicked has said so.
        let _ = relay.join();
    }
    failure(&ranks).map_or(Ok(()), Err)
}

impl Rank {
    fn new(rank: usize, mut child: Child) -> Rank {
        let error = Arc::new(Mutex::new(None));
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let kept = error.clone();
        let relays = vec![
            relay(stdout.expect("asked for"), move |line| match rank {
                // The one error is told below.
                0 if line.starts_with("{\"event\":\"error\"") => {}
                0 => out(line),
                _ => eprintln!("rank {rank}: {line}"),
            }),
            relay(stderr.expect("asked for"), move |line| match line.strip_prefix("error: ") {
                Some(error) => *kept.lock().unwrap_or_else(|e| e.into_inner()) = Some(error.to_string()),
                None if rank == 0 => eprintln!("{line}"),
                None => eprintln!("rank {rank}: {line}"),
            }),
        ];
        Rank { child, error, relays, ended: None }
    }

    fn look(&mut self) {
        if self.ended.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            self.ended = Some((Instant::now(), status));
        }
    }

    fn failed(&self) -> bool {
        self.ended.is_some_and(|(_, status)| !status.success())
    }

    fn kill(&mut self) {
        if self.ended.is_none() {
            // It may have ended meanwhile.
            let _ = self.child.kill();
        }
    }

    fn message(&self) -> Option<String> {
        self.error.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

/// Hands each line on.
fn relay(from: impl Read + Send + 'static, to: impl Fn(&str) + Send + 'static) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut lines = BufReader::new(from);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            to(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
            line.clear();
        }
    })
}

/// Why it all ended: of the ranks that failed, the first with a reason of its own.
fn failure(ranks: &[Rank]) -> Option<Error> {
    let mut failed: Vec<(usize, &Rank)> = ranks.iter().enumerate().filter(|(_, r)| r.failed()).collect();
    failed.sort_by_key(|(_, r)| r.ended.map(|(at, _)| at));
    // What others say of a rank begins with its number. One without a word was killed, or crashed.
    let of_another = |message: &str| message.starts_with("rank ") && message.contains(RESUME);
    let own = |r: &Rank| r.message().is_none_or(|m| !of_another(&m));
    let (rank, root) = failed.iter().find(|(_, r)| own(r)).or(failed.first())?;
    let (_, status) = root.ended.expect("it has failed");
    let of = format!("rank {rank} of {}", ranks.len());
    Some(match root.message() {
        // The command line is wrong, and the same for all.
        Some(message) if status.code() == Some(2) => Error::Config(message),
        Some(message) => Error::Mismatch(format!("{of} failed: {message}")),
        None => Error::Mismatch(format!("{of} ended without a word ({status}); {RESUME}")),
    })
}
