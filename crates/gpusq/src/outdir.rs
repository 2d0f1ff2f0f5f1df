//! A run's output folder: who may write into it, and which run it holds.
//!
//! `gpusq.toml` in it has the settings, under comment lines that identify command, task, model and data;
//! `state/lock` is locked by the process that writes. The lock goes with the process, so that one that was
//! killed leaves nothing to clear away.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::config::CONFIG_FILE;
use crate::format::atomic::{remove_partial, write_file};
use crate::model::{Model, STATE_DIR};
use crate::params::{Packed, Weight};
use crate::task::{Dataset, Target};
use crate::{Error, Result};

const LOCK_FILE: &str = "lock";

/// The right to write into an output folder, until it is dropped or the process ends.
#[derive(Debug)]
#[must_use = "others may write into the folder once this is dropped"]
pub struct Held {
    /// The folder, and the lock in it; a process whose rank 0 has these has none.
    own: Option<(PathBuf, File)>,
}

/// Checks that a run may write into `out`: it does not exist or is empty, or `resume` is set and it holds a
/// run. Changes nothing, so that it can come before anything slow.
///
/// # Errors
/// [`Error::File`] that says what is there and what to do.
pub fn check(out: &Path, resume: bool) -> Result<()> {
    let entries = match fs::read_dir(out) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return match fs::read_link(out) {
                Ok(to) => {
                    let message = format!(
                        "is a link to {}, which is not there; make that folder, or choose another --out",
                        to.display()
                    );
                    Err(Error::file(out, message))
                }
                Err(_) => Ok(()),
            };
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => {
            return Err(Error::file(out, "is not a folder; choose another --out"));
        }
        Err(e) => return Err(Error::io(out)(e)),
    };
    let names: Vec<String> = entries
        .map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()
        .map_err(Error::io(out))?;
    if names.is_empty() {
        return Ok(());
    }
    if !resume {
        let message =
            "already exists and is not empty; choose another --out, continue it with --resume, or remove it";
        return Err(Error::file(out, message));
    }
    // A run killed before its settings were written has left nothing else.
    let begun = |name: &String| name == STATE_DIR || name.starts_with(&format!(".{CONFIG_FILE}."));
    if names.iter().any(|n| n == CONFIG_FILE) || names.iter().all(begun) {
        return Ok(());
    }
    Err(Error::file(out, format!("holds no run to resume (there is no {CONFIG_FILE}); choose another --out")))
}

/// Checks that files can be written into `dir`, which need not exist yet. Leaves nothing there, so that it can come
/// before the work whose results are to go there.
///
/// # Errors
/// [`Error::File`] where a file is in the way, [`Error::Io`] where the system refuses.
pub fn check_writable(dir: &Path) -> Result<()> {
    let there = dir.ancestors().find(|d| d.exists()).filter(|d| !d.as_os_str().is_empty());
    let there = there.unwrap_or(Path::new("."));
    if !there.is_dir() {
        return Err(Error::file(there, "is not a folder; choose another --out"));
    }
    tempfile::tempfile_in(there).map(drop).map_err(Error::io(dir))
}

/// Makes the output folder `out`, or continues the one there if `resume` is set, and keeps other processes
/// from writing into it. `identity` and `settings` are lines of text that a run to resume must share.
///
/// # Errors
/// As [`check`]; a folder that another process writes into; a run with another identity or settings.
pub fn open(out: &Path, resume: bool, identity: &str, settings: &str) -> Result<Held> {
    check(out, resume)?;
    let made = !out.exists();
    let held = Held::take(out)?;
    let file = out.join(CONFIG_FILE);
    let text = format!("{identity}\n{settings}");
    if !file.exists() {
        return match write_file(&file, |w| w.write_all(text.as_bytes())) {
            Ok(()) => Ok(held),
            Err(e) => {
                drop(held);
                if made {
                    // The error matters more than an empty folder that stays.
                    let _ = fs::remove_dir(out);
                }
                Err(e)
            }
        };
    }
    if !resume {
        // Another run came and went between the check and the lock.
        check(out, resume)?;
    }
    let before = fs::read_to_string(&file).map_err(Error::io(&file))?;
    let lines = || before.lines().zip(text.lines());
    if let Some(at) = lines().position(|(a, b)| a != b) {
        let table =
            before.lines().take(at).filter_map(|line| line.strip_prefix('[')?.strip_suffix(']')).last();
        let plain = |line: &str| match (line.strip_prefix("# "), table) {
            (None, Some(table)) => format!("{table}.{line}"),
            (comment, _) => comment.unwrap_or(line).to_string(),
        };
        let (was, is) = lines().nth(at).unwrap_or_default();
        let message = format!(
            "the run to resume has `{}`, this one `{}`; resume with the command and settings it was started with, \
             or choose another --out",
            plain(was),
            plain(is)
        );
        return Err(Error::file(file, message));
    }
    remove_partial(out)?;
    Ok(held)
}

impl Held {
    /// Of a process for which rank 0 holds the folder, and writes.
    pub fn by_rank_0() -> Held {
        Held { own: None }
    }

    fn take(out: &Path) -> Result<Held> {
        let state = out.join(STATE_DIR);
        fs::create_dir_all(&state).map_err(Error::io(&state))?;
        let path = state.join(LOCK_FILE);
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(Error::io(&path))?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => Err(Error::file(
                out,
                "another run is writing here; wait until it ends or choose another --out",
            )),
            // Some network file systems have no locks. A run there goes unprotected rather than not at all.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Held { own: Some((out.to_path_buf(), lock)) }),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some((out, _lock)) = &self.own else { return };
        let state = out.join(STATE_DIR);
        // A lock file that stays hurts nobody; the folder stays while it holds the state of an unfinished run.
        let _ = fs::remove_file(state.join(LOCK_FILE));
        let _ = fs::remove_dir(state);
    }
}

/// Lines that tell one run from another: the command, the task, and digests of the model it starts from and
/// of its examples, which find a change that names and paths do not show.
pub fn identity(command: &str, task: &str, model: &Model, train: &Dataset, dev: &Dataset) -> String {
    let family = model.config.json["model_type"].as_str().unwrap_or("model");
    let data = |d: &Dataset| format!("{} examples, digest {:016x}", d.examples.len(), digest_data(d));
    format!(
        "# command: {command}\n# task: {task}\n# model: {family}, digest {:016x}\n# train: {}\n# dev: {}\n",
        digest_model(model),
        data(train),
        data(dev)
    )
}

/// FNV-1a over 32-bit words (Fowler, Noll, Vo): not against malice, only against mistakes.
pub(crate) struct Digest(u64);

impl Digest {
    pub(crate) fn new() -> Self {
        Digest(0xCBF2_9CE4_8422_2325)
    }

    pub(crate) fn word(&mut self, word: u32) {
        self.0 = (self.0 ^ u64::from(word)).wrapping_mul(0x0000_0100_0000_01B3);
    }

    pub(crate) fn text(&mut self, text: &str) {
        text.bytes().for_each(|b| self.word(b.into()));
        self.word(text.len() as u32);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0
    }
}

/// Of weights and attention pattern.
pub(crate) fn digest_model(model: &Model) -> u64 {
    let mut d = Digest::new();
    d.text(&format!("{:?}", model.attention));
    for (name, weight) in model.params.iter() {
        d.text(name);
        let value = match weight {
            Weight::Dense(t) | Weight::Masked { value: t, .. } | Weight::Fake { value: t, .. } => t,
            Weight::Packed(Packed { values, .. }) => {
                d.text(&format!("{:?}", values.shape()));
                continue;
            }
        };
        value.shape().iter().for_each(|&n| d.word(n as u32));
        value.f32().iter().for_each(|v| d.word(v.to_bits()));
    }
    d.0
}

fn digest_data(data: &Dataset) -> u64 {
    let mut d = Digest::new();
    for e in &data.examples {
        d.word(e.ids.len() as u32);
        e.ids.iter().chain(&e.types).for_each(|&id| d.word(id));
        match e.target {
            Target::Class(c) => d.word(c),
            Target::Value(v) => d.word(v.to_bits()),
            Target::Span { start, end } => [start, end].into_iter().for_each(|p| d.word(p)),
            Target::None => d.word(u32::MAX),
        }
    }
    d.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_run_is_refused_until_the_first_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let held = open(&out, false, "# a", "x = 1").unwrap();
        let error = open(&out, true, "# a", "x = 1").unwrap_err().to_string();
        assert!(error.contains("another run is writing here"), "{error}");
        drop(held);
        assert!(!out.join(STATE_DIR).exists());
        drop(open(&out, true, "# a", "x = 1").unwrap());
        let error = open(&out, true, "# b", "x = 1").unwrap_err().to_string();
        assert!(error.contains("`a`, this one `b`"), "{error}");
        let error = open(&out, true, "# a", "x = 2").unwrap_err().to_string();
        assert!(error.contains("`x = 1`, this one `x = 2`"), "{error}");
        let error = open(&out, false, "# a", "x = 1").unwrap_err().to_string();
        assert!(error.contains("not empty"), "{error}");
    }

    #[test]
    fn a_setting_that_differs_is_named_with_its_table() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let settings = "seed = 1\n\n[train]\nepochs = 2\n\n[prune]\n# Passes.\nepochs = 3\n";
        drop(open(&out, false, "# a", settings).unwrap());
        let error = open(&out, true, "# a", &settings.replace("= 3", "= 4")).unwrap_err().to_string();
        assert!(error.contains("`prune.epochs = 3`, this one `prune.epochs = 4`"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_nothing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        std::os::unix::fs::symlink(dir.path().join("gone"), &out).unwrap();
        let error = check(&out, false).unwrap_err().to_string();
        assert!(error.contains("out: is a link to") && error.contains("gone"), "{error}");
    }

    #[test]
    fn only_a_run_can_be_resumed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("letter.txt"), "dear").unwrap();
        let error = check(dir.path(), true).unwrap_err().to_string();
        assert!(error.contains("holds no run to resume"), "{error}");
        let begun = dir.path().join("begun");
        fs::create_dir_all(begun.join(STATE_DIR)).unwrap();
        fs::write(begun.join(STATE_DIR).join(LOCK_FILE), "").unwrap();
        drop(open(&begun, true, "# a", "x = 1").unwrap());
        assert!(begun.join(CONFIG_FILE).exists());
    }
}
