//! `gpusq bench`: how fast a model runs over a grid of batch sizes and lengths.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::ArgMatches;
use gpusq::bench::{Grid, bench, bench_load, bench_texts, size};
use gpusq::model::Model;
use gpusq::outdir::check_writable;
use gpusq::preflight::check_fit;
use gpusq::report::{BENCH_FILE, Bench, BenchLoad, Machine, PAGE_FILE, Unit, write_bench};
use gpusq::task::{Split, Tokenizer, task};
use gpusq::tensor::{Device, cuda};
use gpusq::{Error, Result, hub};
use serde_json::json;

use crate::args;
use crate::progress::out;

pub(crate) fn run(m: &ArgMatches) -> Result<()> {
    if m.get_flag("first-answer") {
        return first_answer(m);
    }
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
    let (name, model, dir) = match spec {
        Some(size) => (size.name.to_string(), size.model(1), None),
        // The command line has one of them.
        None => {
            let dir = args::model_dir(m)?;
            let model = Model::load(&dir)?;
            args::need_packed(&model, &dir, "bench")?;
            (dir.display().to_string(), model, Some(dir))
        }
    };
    let limit = model.spec.max_length();
    if let Some(n) = grid.lengths.iter().find(|n| **n > limit) {
        return Err(Error::Mismatch(format!(
            "--length {n}: {name} takes {limit} tokens; use at most {limit}"
        )));
    }
    let as_json = m.get_flag("json");
    let watch = &mut |line: &str| {
        if !as_json {
            out(line);
        }
    };
    let texts = m.get_one::<String>("task").map(|name| task(name)).transpose()?;
    let started = gpusq::report::now();
    let (mut series, mut timed) = (Vec::new(), Vec::new());
    match texts {
        Some(task) => {
            let tokenizer = match (m.get_one::<String>("tokenizer"), &dir) {
                (Some(name), _) => hub::resolve(name)?,
                (None, Some(dir)) => dir.clone(),
                (None, None) => {
                    let message = "--spec has no tokenizer for the texts of --task; give --tokenizer, a folder with one";
                    return Err(Error::Config(message.into()));
                }
            };
            let tokenizer = Tokenizer::load(&tokenizer)?;
            let split: Split = m.get_one::<String>("split").expect("has a default").parse()?;
            let folder = m.get_one::<PathBuf>("data").expect("required with a task");
            let read = |&length: &usize| {
                let data = args::load_data(task, folder, split, &tokenizer, Some(length), &model)?;
                check_fit(&model, &tokenizer, &[&data])?;
                grid.check_texts(&data.examples)?;
                Ok((length, data))
            };
            // Before anything is timed.
            let all = grid.lengths.iter().map(read).collect::<Result<Vec<_>>>()?;
            watch(&format!("gemm: texts of {} {split}, as they are and padded", task.name));
            for (length, data) in all {
                let pad = tokenizer.pad_id();
                timed.extend(bench_texts(&model, device, &data.examples, pad, length, &grid, watch)?);
            }
        }
        None => series = bench(&model, device, &grid, watch)?,
    }
    let loads = match dir {
        Some(dir) => loads(&dir, m, &grid)?,
        None => {
            let scratch = Scratch::new("model")?;
            model.save(&scratch.0, None)?;
            loads(&scratch.0, m, &grid)?
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let record = Bench {
        model: name,
        machine: Machine::current(threads, &device.to_string()),
        versions: if device == Device::Cpu { String::new() } else { cuda::versions() },
        version: env!("CARGO_PKG_VERSION").into(),
        command: args::typed(),
        started,
        unit: Unit::Milliseconds,
        series,
        texts: timed,
        loads,
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

/// What `gpusq bench --first-answer` does, in a process that has done nothing else: opens the GPU, loads the model and
/// answers a batch of the first size of the grid.
fn first_answer(m: &ArgMatches) -> Result<()> {
    let clock = Instant::now();
    let (device, _) = args::device_of(m)?;
    let open = clock.elapsed().as_secs_f64() * 1e3;
    let [batch, length] = ["batch", "length"].map(|name| args::numbers(m, name).map(|all| all[0]));
    let load = bench_load(&args::model_dir(m)?, device, batch?, length?)?;
    out(json!({ "event": "load", "load": BenchLoad { open, ..load } }));
    Ok(())
}

/// What a process takes from its start to its first answer, with and without plans on disk.
fn loads(dir: &Path, m: &ArgMatches, grid: &Grid) -> Result<Vec<BenchLoad>> {
    let device = m.get_one::<String>("device").expect("has a default");
    let system = |what: &str, e: std::io::Error| Error::Mismatch(format!("cannot {what}: {e}"));
    let program = std::env::current_exe().map_err(|e| system("find this program", e))?;
    let cache = Scratch::new("cache")?;
    let one = |name: &str| -> Result<BenchLoad> {
        let clock = Instant::now();
        let child = Command::new(&program)
            .args(["bench", "--first-answer", "--json", "--device", device, "--model"])
            .arg(dir)
            .args(["--batch", &grid.batches[0].to_string(), "--length", &grid.lengths[0].to_string()])
            .env("GPUSQ_CACHE", &cache.0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()
            .map_err(|e| system("start this program", e))?;
        let whole = clock.elapsed().as_secs_f64() * 1e3;
        let event = String::from_utf8_lossy(&child.stdout);
        let event: serde_json::Value = serde_json::from_str(event.trim()).unwrap_or_default();
        let load: Option<BenchLoad> = serde_json::from_value(event["load"].clone()).ok();
        let Some(load) = load.filter(|_| child.status.success()) else {
            let said = String::from_utf8_lossy(&child.stderr);
            let said = said.trim().trim_start_matches("error: ");
            return Err(Error::Mismatch(format!("timing how the model is loaded: {said}")));
        };
        // What is no part of the load: the start of the program with the GPU's, and a little for its end.
        let open = (whole - load.load()).max(load.open);
        Ok(BenchLoad { name: name.into(), open, ..load })
    };
    if device == "cpu" {
        return Ok(vec![one("cold")?]);
    }
    // Kernels that the bench has compiled already.
    if let Some(kernels) = cuda::cache_folder().map(|f| f.join("kernels")) {
        copy_files(&kernels, &cache.0.join("kernels"));
    }
    // Compiles what is left.
    one("")?;
    // Nothing is there where no plan was measured.
    let _ = std::fs::remove_dir_all(cache.0.join("plans"));
    Ok(vec![one("cold")?, one("warm")?])
}

/// Copies a cache's files as far as that goes: what is missing is made again.
fn copy_files(from: &Path, to: &Path) {
    let _ = std::fs::create_dir_all(to);
    for file in std::fs::read_dir(from).into_iter().flatten().flatten() {
        let _ = std::fs::copy(file.path(), to.join(file.file_name()));
    }
}

/// A folder that goes with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(what: &str) -> Result<Scratch> {
        let dir = std::env::temp_dir().join(format!("gpusq-bench-{}-{what}", std::process::id()));
        std::fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Refuses, before anything is timed, a folder that cannot take the results or has others already.
fn check_out(dir: &Path) -> Result<()> {
    if let Some(file) = [BENCH_FILE, PAGE_FILE].iter().find(|f| dir.join(f).exists()) {
        return Err(Error::file(dir, format!("has a {file} already; choose another --out")));
    }
    check_writable(dir)
}
