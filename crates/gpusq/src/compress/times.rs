//! How long a run has taken, over all the processes that worked on it.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use serde::{Deserialize, Serialize};

use crate::format::atomic::write_file;
use crate::model::{STATE_DIR, Stage};
use crate::report::RunRecord;
use crate::{Error, Result};

/// Kept in the run's `state/` until its report is written, and in no other file: what a run delivers does not
/// depend on how long it took. Of a process that was killed it has the time up to its last checkpoint.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Times {
    /// When the run began, RFC 3339.
    pub(super) started: String,
    /// Seconds spent on the model of each stage: making it, packing it, scoring it.
    seconds: BTreeMap<String, f64>,
}

fn file(out: &Path) -> PathBuf {
    out.join(STATE_DIR).join("times.json")
}

impl Times {
    /// Those of the run in `out`, or of one that begins now.
    pub(super) fn of(out: &Path) -> Result<Times> {
        let path = file(out);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::line(&path, e.line(), format!("{e}; remove it to go on without"))),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Times {
                started: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
                seconds: BTreeMap::new(),
            }),
            Err(e) => Err(Error::io(path)(e)),
        }
    }

    /// Those of a run that is finished, as its record has them.
    pub(super) fn of_finished(record: &RunRecord) -> Times {
        // The record calls a stage by what the engine runs of it.
        let title = |name: &str| match name {
            "2:4 FP16" => Stage::Pruned.title().to_string(),
            "2:4 INT8" => Stage::Quantized.title().to_string(),
            other => other.to_string(),
        };
        let seconds = record.stages.iter().map(|s| (title(&s.name), s.wall_seconds));
        Times { started: record.started.clone(), seconds: seconds.collect() }
    }

    /// Keeps them for a process that continues the run.
    pub(super) fn keep(&self, out: &Path) -> Result<()> {
        let path = file(out);
        let json = serde_json::to_vec(self).expect("plain data serialises");
        std::fs::create_dir_all(out.join(STATE_DIR)).map_err(Error::io(&path))?;
        write_file(path, |w| w.write_all(&json))
    }

    /// Adds the time since `clock`, which starts again, to what the run in `out` has spent on `stage`, and gives
    /// the sum.
    pub(super) fn add(out: &Path, stage: Stage, clock: &mut Instant) -> Result<f64> {
        let mut times = Times::of(out)?;
        let sum = times.seconds.entry(stage.title().into()).or_default();
        let now = Instant::now();
        *sum += (now - *clock).as_secs_f64();
        let sum = *sum;
        times.keep(out)?;
        *clock = now;
        Ok(sum)
    }

    /// Seconds spent on all stages.
    pub(super) fn total(&self) -> f64 {
        self.seconds.values().sum()
    }

    /// Forgets the times of a run whose report is written.
    pub(super) fn forget(out: &Path) -> Result<()> {
        let path = file(out);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::io(path)(e)),
            _ => {}
        }
        // Fails where the lock is, and that is right.
        let _ = std::fs::remove_dir(out.join(STATE_DIR));
        Ok(())
    }
}
