//! `gpusq bench`: how fast a model runs over a grid of batch sizes and lengths.

use std::path::PathBuf;

use clap::ArgMatches;
use gpusq::bench::{Grid, bench, size};
use gpusq::model::Model;
use gpusq::report::{Bench, Machine, write_bench};
use gpusq::tensor::{Device, cuda};
use gpusq::{Error, Result};
use serde_json::json;

use crate::args;
use crate::progress::out;

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    let (device, why) = args::device_of(m)?;
    if let Some(why) = why {
        return Err(Error::Config(format!("{why}; --device cpu times the engine on this CPU")));
    }
    let grid = Grid {
        batches: args::numbers(m, "batch")?,
        lengths: args::numbers(m, "length")?,
        repeats: usize::from(*m.get_one::<u16>("repeats").expect("has a default")),
    };
    let (name, model) = match (m.get_one::<String>("spec"), m.get_one::<String>("model")) {
        (Some(name), _) => (name.clone(), size(name)?.model(1)),
        (None, Some(_)) => {
            let dir = args::model_dir(m)?;
            (dir.display().to_string(), Model::load(&dir)?)
        }
        (None, None) => unreachable!("clap requires one of them"),
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
    if let Some(dir) = m.get_one::<PathBuf>("out") {
        write_bench(&record, dir)?;
    }
    Ok(())
}
