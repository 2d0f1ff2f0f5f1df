//! Runs that are killed or run out of disk continue to the same bytes, and never leave a broken file.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use gpusq::format::safetensors::Checkpoint;

use serde_json::Value;

use crate::tiny::{assert_same, compressed, dense, finish, killed, model, program, run, start, train, tree};

fn resumed(args: &[String]) -> Vec<String> {
    [args, &["--resume".into()]].concat()
}

#[test]
fn a_run_killed_in_each_stage_continues_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for (command, from, stage, whole) in [
        ("finetune", model(), "dense", dense()),
        ("compress", dense(), "2:4", compressed()),
        ("compress", dense(), "2:4 INT8", compressed()),
    ] {
        let out = dir.path().join(stage.replace([' ', ':'], "-"));
        let args = train(command, &from, &out);
        let saved = |e: &Value| e["event"] == "saved" && e["stage"] == stage && e["step"] == 8;
        // Two steps behind the checkpoint: they are taken again.
        let further = |e: &Value| e["event"] == "step" && e["step"] == 10;
        killed(&args, &out, &[&saved, &further]);
        let done = run(&resumed(&args));
        done.ok();
        let at = done.events().into_iter().rfind(|e| e["event"] == "stage" && e["stage"] == stage).unwrap();
        let step = at["done"].as_u64().unwrap();
        assert!(step >= 8 && step % 4 == 0, "{at}");
        assert_same(&out, &whole);
    }
}

/// Ctrl-C is what people stop a run with.
#[test]
fn an_interrupted_run_says_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("interrupted");
    let args = train("finetune", &model(), &out);
    // Again where the run was quicker.
    let said = (0..10).find_map(|_| {
        let mut child = program(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("\"step\"")), "the run takes steps");
        let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        let (done, mut said) = (child.wait().unwrap(), String::new());
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        if done.success() || !sent.success() {
            std::fs::remove_dir_all(&out).unwrap();
            return None;
        }
        assert_eq!(done.signal(), Some(2), "{said}");
        Some(said)
    });
    let said = said.expect("a run that lasts long enough");
    assert!(said.contains("run the same command with --resume"), "{said}");
    run(&resumed(&args)).ok();
    assert_same(&out, &dense());
}

/// What runs behind a script is not stopped by Ctrl-C before it.
#[test]
fn a_run_that_was_started_to_ignore_interrupts_does() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("behind");
    let args = train("finetune", &model(), &out);
    let own = program(&args);
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' INT; exec \"$0\" \"$@\""]).arg(own.get_program()).args(own.get_args());
    for (name, value) in own.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    let mut child = shell.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("\"step\"")), "the run takes steps");
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    lines.for_each(drop);
    assert!(child.wait().unwrap().success());
    assert_same(&out, &dense());
}

#[test]
fn the_times_of_a_resumed_run_are_those_of_all_its_processes() {
    let dir = tempfile::tempdir().unwrap();
    let read = |path: &Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let began = "2020-02-02T02:02:02Z";
    let out = dir.path().join("all");
    let args = train("compress", &dense(), &out);
    killed(&args, &out, &[&|e| e["event"] == "saved" && e["stage"] == "2:4 INT8"]);
    // As if the first process had been slow.
    let file = out.join("state/times.json");
    let mut times = read(&file);
    let spent = times["seconds"].as_object_mut().unwrap();
    assert_eq!(spent.len(), 3, "{spent:?}");
    for seconds in spent.values_mut() {
        assert!(seconds.as_f64().unwrap() > 0.0, "{seconds}");
        *seconds = 1000.into();
    }
    times["started"] = began.into();
    std::fs::write(&file, times.to_string()).unwrap();
    run(&resumed(&args)).ok();
    let record = read(&out.join("run.json"));
    assert_eq!(record["started"], began);
    let stages = record["stages"].as_array().unwrap();
    let parts: Vec<f64> = stages.iter().map(|s| s["wall_seconds"].as_f64().unwrap()).collect();
    assert!(parts.len() == 3 && parts.iter().all(|s| (1000.0..2000.0).contains(s)), "{parts:?}");
    assert!((record["wall_seconds"].as_f64().unwrap() - parts.iter().sum::<f64>()).abs() < 1e-6, "{record}");
    assert!(!out.join("state").exists());

    // Killed between the model and the report.
    let out = dir.path().join("one");
    let args = train("prune", &dense(), &out);
    run(&args).ok();
    std::fs::remove_file(out.join("run.json")).unwrap();
    std::fs::create_dir(out.join("state")).unwrap();
    let times = serde_json::json!({ "started": began, "seconds": { "2:4": 1000.0 } });
    std::fs::write(out.join("state/times.json"), times.to_string()).unwrap();
    run(&resumed(&args)).ok();
    let record = read(&out.join("run.json"));
    let seconds =
        [&record["wall_seconds"], &record["stages"][0]["wall_seconds"]].map(|s| s.as_f64().unwrap());
    assert!(seconds.iter().all(|s| (1000.0..2000.0).contains(s)), "{seconds:?}");
    assert!(!out.join("state").exists());
}

/// Every file under a final name is whole.
fn assert_nothing_broken(out: &Path) {
    for (name, bytes) in tree(out) {
        let file = Path::new(&name).file_name().unwrap_or_default().to_string_lossy().into_owned();
        if file.starts_with('.') || name.ends_with('/') {
            continue;
        }
        if file.ends_with(".safetensors") {
            Checkpoint::open_file(out.join(&name)).unwrap();
        } else if file.ends_with(".json") {
            serde_json::from_slice::<serde_json::Value>(&bytes).unwrap();
        }
    }
}

#[test]
fn kills_at_any_moment_break_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // Saves after every step, so that many kills hit one.
    let more = ["--prune.checkpoint-every", "1", "--quantize.checkpoint-every", "1"];
    let slow = |out: &Path| {
        let args = train("compress", &dense(), out);
        args.into_iter().chain(more.map(String::from)).collect::<Vec<_>>()
    };
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let clock = Instant::now();
    run(&slow(&whole)).ok();
    let all = clock.elapsed();
    let args = resumed(&slow(&out));
    // Times from before the folder is made on, spread by a fixed rule (multiples of the golden ratio). A run
    // that ends before its time has used up the folder; the next ones get less time, as on a quicker machine.
    let (mut kills, mut share) = (0, 0.3);
    for i in 1..=100u32 {
        let child = start(&args);
        std::thread::sleep(all.mul_f64(0.02 + share * (f64::from(i) * 0.618_034 % 1.0)));
        if child.kill() {
            kills += 1;
        } else {
            std::fs::remove_dir_all(&out).unwrap();
            share *= 0.7;
        }
        if out.exists() {
            assert_nothing_broken(&out);
        }
        if kills == 16 {
            break;
        }
    }
    assert_eq!(kills, 16, "runs that were killed before they ended");
    run(&args).ok();
    assert_same(&out, &whole);
}

#[test]
fn a_finished_run_says_so_and_stays_as_it_is() {
    let out = compressed();
    let args = resumed(&train("compress", &dense(), &out));
    let before = tree(&out);
    let done = run(&args);
    done.ok();
    let record: serde_json::Value = serde_json::from_slice(&before["run.json"]).unwrap();
    let of = |stages: &serde_json::Value| -> Vec<serde_json::Value> {
        stages.as_array().unwrap().iter().map(|s| s["scores"].clone()).collect()
    };
    assert_eq!(of(&done.event("finished")["stages"]), of(&record["stages"]));
    assert!(tree(&out) == before);
    let plain: Vec<String> = args.into_iter().filter(|a| a != "--json").collect();
    assert!(run(&plain).stdout.contains("finished"));
}

#[test]
fn what_was_taken_from_a_finished_run_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let pruned = compressed().join("pruned");
    run(&train("quantize", &pruned, &whole)).ok();
    for (command, from, finished, gone, stages) in [
        ("compress", dense(), compressed(), "packed", &[][..]),
        ("compress", dense(), compressed(), "packed-fp16/model.gpusq.safetensors", &[]),
        ("compress", dense(), compressed(), "quantized", &["2:4 INT8"]),
        ("compress", dense(), compressed(), "pruned/model.safetensors", &["2:4"]),
        ("quantize", pruned.clone(), whole.clone(), "packed/gpusq.json", &[]),
        ("quantize", pruned, whole, "model.safetensors", &["2:4 INT8"]),
        ("finetune", model(), dense(), "gpusq.json", &["dense"]),
    ] {
        let out = dir.path().join("out");
        crate::tiny::copy(&finished, &out);
        let path = out.join(gone);
        if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }.unwrap();
        let done = run(&resumed(&train(command, &from, &out)));
        done.ok();
        let folder = if path.extension().is_some() { path.parent().unwrap() } else { &path };
        let note = format!("no model is in {} any more: making it again", folder.display());
        assert!(
            done.events().iter().any(|e| e["text"].as_str().is_some_and(|t| t.contains(&note))),
            "{}",
            done.stdout
        );
        let trained: Vec<Value> = done.events().into_iter().filter(|e| e["event"] == "stage").collect();
        assert_eq!(
            trained.iter().map(|e| e["stage"].as_str().unwrap()).collect::<Vec<_>>(),
            stages,
            "{gone}"
        );
        assert_same(&out, &finished);
        // The record counts what was spent before.
        let wall = |dir: &Path| {
            let record: Value =
                serde_json::from_slice(&std::fs::read(dir.join("run.json")).unwrap()).unwrap();
            assert_eq!(record["stages"].as_array().unwrap().len(), if command == "compress" { 3 } else { 1 });
            (record["started"].clone(), record["wall_seconds"].as_f64().unwrap())
        };
        let (before, after) = (wall(&finished), wall(&out));
        assert!(after.0 == before.0 && after.1 > before.1, "{before:?} {after:?}");
        std::fs::remove_dir_all(out).unwrap();
    }

    // A report is written again from the record.
    let out = dir.path().join("out");
    crate::tiny::copy(&compressed(), &out);
    std::fs::remove_file(out.join("report.html")).unwrap();
    run(&resumed(&train("compress", &dense(), &out))).event("finished");
    assert!(tree(&out) == tree(&compressed()));
}

#[test]
fn resuming_another_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let args = train("prune", &dense(), &out);
    killed(&args, &out, &[&|e| e["event"] == "saved"]);
    let before = tree(&out);
    let with = |more: &[&str]| {
        [&resumed(&args)[..], &more.iter().map(|s| s.to_string()).collect::<Vec<_>>()].concat()
    };
    let toml = out.join("gpusq.toml");
    let file = toml.to_str().unwrap();
    run(&with(&["--learning-rate", "1e-4"]))
        .fails(1, &[file, "`prune.learning_rate = 0.001`", "`prune.learning_rate = 1e-4`"]);
    run(&with(&["--seed", "3"])).fails(1, &[file, "seed = 42", "seed = 3"]);
    run(&resumed(&train("compress", &dense(), &out)))
        .fails(1, &[file, "command: prune", "command: compress"]);
    let other = dir.path().join("other");
    crate::tiny::copy(&dense(), &other);
    crate::tiny::without_checksums(&other);
    let weights = other.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    // The lowest bit of the last weight.
    let last = bytes.len() - 4;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    run(&resumed(&train("prune", &other, &out))).fails(1, &[file, "model: bert, digest"]);
    let mut after = tree(&out);
    let mut before = before;
    // The lock of the killed run is gone; all else stays.
    after.remove("state/lock");
    before.remove("state/lock");
    assert!(after == before);
    run(&resumed(&args)).ok();
}

#[test]
fn a_damaged_state_says_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let args = train("prune", &dense(), &out);
    killed(&args, &out, &[&|e| e["event"] == "saved"]);
    let state = out.join("state/train.safetensors");
    let whole = std::fs::read(&state).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 0x10;
    for damaged in [&flipped, &whole[..whole.len() / 2]] {
        std::fs::write(&state, damaged).unwrap();
        let advice = "remove this file and run the command again with --resume";
        run(&resumed(&args)).fails(1, &[state.to_str().unwrap(), advice]);
    }
    std::fs::remove_file(&state).unwrap();
    let done = run(&resumed(&args));
    done.ok();
    assert_eq!(done.event("stage")["done"], 0);
    crate::tiny::assert_same_stage(&out, &compressed().join("pruned"));
}

#[test]
fn resuming_where_nothing_is_starts_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("new/out");
    run(&resumed(&train("prune", &dense(), &out))).ok();
    crate::tiny::assert_same_stage(&out, &compressed().join("pruned"));
}

/// A small disk of its own, where the tests may mount one.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf, kib: u32) -> Option<Disk> {
        std::fs::create_dir_all(&at).unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={kib}k"), "tmpfs"])
            .arg(&at)
            .stderr(std::process::Stdio::null())
            .status();
        if !mount.is_ok_and(|s| s.success()) {
            println!("skipped: no small disk can be mounted here (needs root)");
            return None;
        }
        Some(Disk(at))
    }

    /// Leaves `kib` free. The run under test writes at the same time, so the space is measured again where the
    /// filler did not fit.
    fn fill(&self, kib: u64) -> PathBuf {
        let path = self.0.join("filler");
        loop {
            let free = gpusq::format::atomic::free_space(&self.0).unwrap();
            match std::fs::write(&path, vec![0u8; (free.saturating_sub(kib * 1024)) as usize]) {
                Ok(()) => return path,
                Err(e) if e.kind() == std::io::ErrorKind::StorageFull => std::fs::remove_file(&path).unwrap(),
                Err(e) => panic!("{e}"),
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_while_saving_keeps_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(dir.path().join("disk"), 4096) else { return };
    // Runs until the disk is full and reports on it; again from the start where the run was quicker.
    let run_full = |args: &[String], out: &Path, event: &str, file: &str| {
        for _ in 0..10 {
            let mut first = start(args);
            first.wait_for(|e| e["event"] == event);
            let filler = disk.fill(16);
            let mut message = None;
            first.wait_for_end(|e| message = message.take().or(e["message"].as_str().map(String::from)));
            if let Some(message) = message {
                assert!(message.contains(file) && message.contains("free some space"), "{message}");
                return filler;
            }
            std::fs::remove_file(filler).unwrap();
            std::fs::remove_dir_all(out).unwrap();
        }
        panic!("the run always ended before the disk was full");
    };

    // In the middle of a checkpoint.
    let out = disk.0.join("out");
    let args = train("finetune", &model(), &out);
    let filler = run_full(&args, &out, "saved", "train.safetensors");
    Checkpoint::open_file(out.join("state/train.safetensors")).unwrap();
    let left: Vec<String> = tree(&out).into_keys().collect();
    let whole = ["gpusq.toml", "state/", "state/times.json", "state/train.safetensors"];
    assert_eq!(left, whole, "nothing half-written");
    run(&["inspect".into(), out.to_str().unwrap().into(), "--json".into()])
        .fails(1, &["not finished", "--resume"]);
    std::fs::remove_file(&filler).unwrap();
    run(&resumed(&args)).ok();
    assert_same(&out, &dense());
    std::fs::remove_dir_all(&out).unwrap();

    // In the middle of the model at the end.
    let args = [&args[..], &["--checkpoint-every".into(), "0".into()]].concat();
    let filler = run_full(&args, &out, "step", "model.safetensors");
    let left: Vec<String> = tree(&out).into_keys().collect();
    assert_eq!(left, ["curve.json", "gpusq.toml", "state/", "state/times.json"], "nothing half-written");
    std::fs::remove_file(&filler).unwrap();
    run(&resumed(&args)).ok();
    let weights = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(weights(&out) == weights(&dense()));
    std::fs::remove_dir_all(&out).unwrap();

    // Known before it starts.
    let filler = disk.fill(64);
    finish(&mut program(&args)).fails(1, &[out.to_str().unwrap(), "of disk", "--out"]);
    assert!(!out.exists());
    std::fs::remove_file(&filler).unwrap();
}
