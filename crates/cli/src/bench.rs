//! `gpusq bench`: how fast a model runs over a grid of batch sizes and lengths.

use std::path::{Path, PathBuf};

use clap::ArgMatches;
use gpusq::bench::{Grid, bench, size};
use gpusq::model::Model;
use gpusq::outdir::check_writable;
use gpusq::report::{BENCH_FILE, Bench, Machine, PAGE_FILE, write_bench};
use gpusq::tensor::{Device, cuda};
use gpusq::{Error, Result};
use serde_json::json;

use crate::args;
use crate::progress::out;

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    let grid = Grid {
        batches: args::numbers(m, "batch")?,
        lengths: args::numbers(m, "length")?,
        repeats: usize::from(*m.get_one::<u16>("repeats").expect("has a default")),
    };
    let spec = m.get_one::<String>("spec").map(|name| size(name)).transpose()?;
    let (device, why) = args::device_of(m)?;
    if let Some(why) = why {
        return Err(Error::Config(format!("{why}; to time the engine on this CPU, add --device cpu")));
    }
    let to = m.get_one::<PathBuf>("out");
    if let Some(dir) = to {
        check_out(dir)?;
    }
    let (name, model) = match spec {
        Some(size) => (size.name.to_string(), size.model(1)),
        // The command line has one of them.
        None => {
            let dir = args::model_dir(m)?;
            let model = Model::load(&dir)?;
            args::need_packed(&model, &dir, "bench")?;
            (dir.display().to_string(), model)
        }
    };
    let limit = model.spec.max_length();
    if let Some(n) = grid.lengths.iter().find(|n| **n > limit) {
        return Err(Error::Mismatch(format!(
            "--length {n}: {name} takes {limit} tokens; use at most {limit}"
        )));
    }
    let as_json = m.get_flag("json");
    let started = gpusq::report::now();
    let series = bench(&model, device, &grid, &mut |line| {
        if !as_json {
            out(line);
        }
    })?;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let record = Bench {
        model: name,
        machine: Machine::current(threads, &device.to_string()),
        versions: if device == Device::Cpu { String::new() } else { cuda::versions() },
        version: env!("CARGO_PKG_VERSION").into(),
        command: args::typed(),
        started,
        series,
    };
    match as_json {
        true => out(json!({ "event": "bench", "bench": record })),
        false => {
            let versions =
                if record.versions.is_empty() { String::new() } else { format!(", {}", record.versions) };
            out(format_args!("\n{} on {device}{versions}\n{}", record.model, record.table()))
        }
    }
    to.map_or(Ok(()), |dir| write_bench(&record, dir))
}

/// Refuses, before anything is timed, a folder that cannot take the results or has another command's report.
fn check_out(dir: &Path) -> Result<()> {
    if dir.join(PAGE_FILE).exists() && !dir.join(BENCH_FILE).exists() {
        let message = format!("has a {PAGE_FILE} that is not of a bench; choose another --out");
        return Err(Error::file(dir, message));
    }
    check_writable(dir)
}
