//! Several processes train as one does: started by `gpusq launch` or by variables, on CPUs; killed, resumed, refused.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::tiny::{Done, dense, finish, killed, model, program, run, start, train, tree};

/// `gpusq launch` of `n` processes on the CPU.
fn launched(n: usize, args: &[String]) -> Vec<String> {
    let launch = ["launch", "--gpus", &n.to_string()].map(String::from);
    [&launch, args, &["--device".into(), "cpu".into()]].concat()
}

fn with(args: Vec<String>, more: &[&str]) -> Vec<String> {
    [args, more.iter().map(|s| s.to_string()).collect()].concat()
}

/// Losses of every step that was shown, by stage.
fn losses(done: &Done) -> Vec<(String, f64)> {
    let steps = done.events().into_iter().filter(|e| e["event"] == "step");
    steps.map(|e| (e["stage"].to_string(), e["loss"].as_f64().unwrap())).collect()
}

#[track_caller]
fn close(a: &[(String, f64)], b: &[(String, f64)]) {
    assert_eq!(a.len(), b.len());
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(a.0 == b.0 && (a.1 - b.1).abs() <= 2e-3 * b.1.abs().max(1.0), "{step}: {a:?} {b:?}");
    }
}

/// Everything but the settings, which differ in the size of parts: models, packed models, curves.
#[track_caller]
fn same_models(a: &Path, b: &Path) {
    let of = |dir: &Path| {
        let mut all = tree(dir);
        all.retain(|name, _| !["run.json", "report.html", "gpusq.toml"].contains(&name.as_str()));
        all
    };
    let (a, b) = (of(a), of(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    a.iter().for_each(|(name, bytes)| assert!(*bytes == b[name], "{name} differs"));
}

/// Two processes sum what one process that computes each batch in two parts sums, in the same order: the same bits.
/// Three cut the batches elsewhere, and the losses are the same but for rounding.
#[test]
fn processes_train_as_one_does_with_the_batch_cut_alike() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two, three) = (dir.path().join("one"), dir.path().join("two"), dir.path().join("three"));
    let parts = ["--prune.micro-batch-size", "4", "--quantize.micro-batch-size", "4"];
    let args = |out: &Path| train("compress", &dense(), out);
    let alone = run(&with(args(&one), &parts));
    alone.ok();
    let both = run(&launched(2, &args(&two)));
    both.ok();
    assert_eq!(losses(&both), losses(&alone));
    same_models(&two, &one);
    let all = run(&launched(3, &args(&three)));
    all.ok();
    close(&losses(&all), &losses(&alone));
    // One process shows what all do, and shows it once.
    let names = |done: &Done| {
        // That there is no GPU is told where one was looked for.
        let all = done.events().into_iter().map(|e| e["event"].to_string());
        all.filter(|name| name != "\"note\"").collect::<Vec<_>>()
    };
    assert_eq!(names(&both), names(&alone));
}

/// With dropout, and with batches of 3, of which some processes have none.
#[test]
fn fewer_examples_than_processes_and_dropout_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (one, four) = (dir.path().join("one"), dir.path().join("four"));
    let args = |out: &Path| {
        with(train("finetune", &model(), out), &["--batch-size", "3", "--epochs", "1", "--dropout", "0.1"])
    };
    let (alone, all) = (run(&args(&one)), run(&launched(4, &args(&four))));
    alone.ok();
    all.ok();
    close(&losses(&all), &losses(&alone));
}

/// Each of two processes has one of the two blocks. Where gradients are not clipped by their norm, which is rounded
/// otherwise, all weights have the bits of one process with the same parts.
#[test]
fn a_pipeline_makes_the_models_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let args = |out: &Path| {
        let mut args = train("compress", &dense(), out);
        for stage in ["prune", "quantize"] {
            for (key, value) in [("micro-batch-size", "3"), ("max-grad-norm", "none"), ("dropout", "0.1")] {
                args.extend([format!("--{stage}.{key}"), value.to_string()]);
            }
        }
        args
    };
    let alone = run(&args(&one));
    alone.ok();
    let both = run(&launched(2, &with(args(&two), &["--pipeline-parallel-size", "2"])));
    both.ok();
    close(&losses(&both), &losses(&alone));
    // The sum of the feature loss is of two processes.
    for folder in ["pruned", "quantized"] {
        std::fs::copy(one.join(folder).join("curve.json"), two.join(folder).join("curve.json")).unwrap();
    }
    same_models(&two, &one);
}

/// A pipeline that is killed goes on as any other number of processes, and the other way round.
#[test]
fn a_pipelines_checkpoint_is_any_layouts() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let args = |out: &Path| with(train("compress", &dense(), out), &["--prune.micro-batch-size", "4"]);
    let pipeline = |out: &Path| launched(2, &with(args(out), &["--pipeline-parallel-size", "2"]));
    let one = run(&args(&whole));
    one.ok();
    let saved = |stage: &'static str| move |e: &Value| e["event"] == "saved" && e["stage"] == stage;
    let resumed = |words: Vec<String>| {
        // What the killed launcher started ends by itself.
        let clock = Instant::now();
        loop {
            let done = run(&with(words.clone(), &["--resume"]));
            if done.code == Some(0) || clock.elapsed() > Duration::from_secs(20) {
                done.ok();
                return done;
            }
            assert!(done.stderr.contains("another run is writing here"), "{}", done.stderr);
        }
    };
    for (first, then) in [(pipeline(&out), args(&out)), (args(&out), pipeline(&out))] {
        killed(&first, &out, &[&saved("2:4")]);
        let done = resumed(then);
        let stage = done.events().into_iter().find(|e| e["event"] == "stage").unwrap();
        assert!(stage["stage"] == "2:4" && stage["done"].as_u64().unwrap() >= 4, "{stage}");
        let (all, rest) = (losses(&one), losses(&done));
        close(&rest, &all[all.len() - rest.len()..]);
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_pipeline_that_does_not_fit_is_refused_once() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let args = |p: &str| with(train("compress", &dense(), &out), &["--pipeline-parallel-size", p]);
    run(&launched(3, &args("2"))).fails(2, &["a pipeline of 2 processes", "there are 3"]);
    run(&launched(3, &args("3"))).fails(2, &["each process needs a block, and the model has 2"]);
    run(&args("2")).fails(2, &["there are 1"]);
    run(&args("0")).fails(2, &["--pipeline-parallel-size"]);
    assert!(!out.exists());
}

#[test]
fn a_run_goes_on_with_another_number_of_processes() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let args = |out: &Path| train("compress", &dense(), out);
    let one = run(&args(&whole));
    one.ok();
    let saved = |e: &Value| e["event"] == "saved" && e["stage"] == "2:4" && e["step"] == 12;
    killed(&launched(2, &args(&out)), &out, &[&saved]);
    // What the killed launcher started ends by itself.
    let clock = Instant::now();
    let done = loop {
        let done = run(&with(launched(3, &args(&out)), &["--resume"]));
        if done.code == Some(0) || clock.elapsed() > Duration::from_secs(20) {
            break done;
        }
        assert!(done.stderr.contains("another run is writing here"), "{}", done.stderr);
    };
    done.ok();
    let stage = done.events().into_iter().find(|e| e["event"] == "stage").unwrap();
    assert!(stage["stage"] == "2:4" && stage["done"].as_u64().unwrap() >= 12, "{stage}");
    let all = losses(&one);
    let rest = losses(&done);
    close(&rest, &all[all.len() - rest.len()..]);
    // A finished run is finished for any number of processes.
    let again = run(&with(launched(2, &args(&out)), &["--resume"]));
    again.ok();
    again.event("finished");
    let mut left = tree(&out);
    left.retain(|name, _| name.contains("state") || name.starts_with('.'));
    assert!(left.is_empty(), "{:?}", left.keys());
    // One process makes again what is gone, and one that joins in learns of what is there.
    std::fs::remove_dir_all(out.join("quantized")).unwrap();
    let again = run(&with(launched(2, &args(&out)), &["--resume"]));
    again.ok();
    close(&losses(&again), &losses(&one)[losses(&one).len() - losses(&again).len()..]);
}

/// Waits for a file.
#[track_caller]
fn wait_for(file: &Path) {
    let clock = Instant::now();
    while !file.exists() {
        assert!(clock.elapsed() < Duration::from_secs(60), "{} does not come", file.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The processes that `launcher` started, by rank: those whose parent it is.
fn children(launcher: u32) -> Vec<(usize, u32)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let read = |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let parent: Option<u32> =
            read("stat").rsplit(") ").next().and_then(|s| s.split(' ').nth(1)?.parse().ok());
        let rank = read("environ").split('\0').find_map(|v| v.strip_prefix("RANK=")?.parse().ok());
        if let (Some(parent), Some(rank)) = (parent, rank)
            && parent == launcher
        {
            found.push((rank, pid));
        }
    }
    found
}

#[test]
fn a_killed_process_ends_all_with_one_error_and_the_run_can_be_resumed() {
    let dir = tempfile::tempdir().unwrap();
    for victim in [0, 1] {
        let out = dir.path().join(format!("out{victim}"));
        let args = with(train("finetune", &model(), &out), &["--epochs", "2000"]);
        let mut command = program(&launched(2, &args));
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let state = out.join("state/train.safetensors");
        wait_for(&state);
        let ranks = children(child.id());
        assert_eq!(ranks.len(), 2, "{ranks:?}");
        let (_, pid) = ranks.iter().find(|(rank, _)| *rank == victim).unwrap();
        let clock = Instant::now();
        assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert!(clock.elapsed() < Duration::from_secs(10), "{:?}", clock.elapsed());
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let done =
            Done { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        done.fails(1, &[&format!("rank {victim} of 2 ended without a word"), "signal: 9", "--resume"]);
        for (rank, pid) in &ranks {
            assert!(!Path::new(&format!("/proc/{pid}")).exists(), "rank {rank} lives on");
        }
        // It goes on from the checkpoint, in one process.
        let mut again = start(&with(args, &["--device", "cpu", "--resume"]));
        again.wait_for(|e| e["event"] == "stage" && e["done"].as_u64().unwrap() > 0);
        again.kill();
    }
}

/// One that stops without ending: nothing is heard of it any more.
#[test]
fn a_process_that_hangs_ends_all() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let args = with(train("finetune", &model(), &out), &["--epochs", "2000"]);
    let mut command = program(&launched(2, &args));
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&out.join("state/train.safetensors"));
    let ranks = children(child.id());
    let (_, pid) = ranks.iter().find(|(rank, _)| *rank == 1).unwrap();
    assert!(Command::new("kill").args(["-STOP", &pid.to_string()]).status().unwrap().success());
    let clock = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(clock.elapsed() < Duration::from_secs(40), "{:?}", clock.elapsed());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1), "{stderr}");
    let errors = stderr.lines().filter(|l| l.starts_with("error: ")).count();
    assert!(errors == 1 && stderr.contains("rank 1 of 2"), "{stderr}");
}

#[test]
fn an_error_of_any_process_is_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let args = |more: &[&str]| {
        let out = dir.path().join("out");
        launched(2, &with(train("finetune", &model(), &out), more))
    };
    run(&args(&["--epochs", "0"])).fails(2, &["train.epochs"]);
    // What does not parse is told as of one process, with its usage behind it.
    let done = run(&args(&["--nosuch", "3"]));
    done.fails(2, &["--nosuch"]);
    assert!(done.stderr.starts_with("error: ") && !done.stderr.contains("rank"), "{}", done.stderr);
    let words = ["launch", "--gpus", "2", "finetune", "--help"].map(String::from);
    let help = finish(&mut program(&words));
    assert!(help.code == Some(0) && help.stdout.matches("Usage: gpusq finetune").count() == 1);
    // GPUs were asked for, and no process takes the CPU for one.
    let mut words = args(&[]);
    let flag = words.iter().position(|w| w == "--device").unwrap();
    words.drain(flag..flag + 2);
    let none = finish(program(&words).env("CUDA_VISIBLE_DEVICES", "-1"));
    none.fails(2, &["add --device cpu"]);
    assert!(!dir.path().join("out").exists());
    std::fs::create_dir(dir.path().join("out")).unwrap();
    std::fs::write(dir.path().join("out/letter"), "dear").unwrap();
    run(&args(&[])).fails(1, &["rank 0 of 2 failed", "not empty"]);
    // Not a command for several processes; none of this program's.
    let words = |words: &[&str]| words.iter().map(|w| w.to_string()).collect::<Vec<_>>();
    let refused = |w: &[&str]| finish(&mut program(&words(w)));
    for (line, what) in [
        (&["launch", "--gpus", "2", "eval", "--json"][..], "not `eval`"),
        (&["launch", "--gpus", "0", "compress"], "0 is not in"),
        (&["launch", "compress"], "--gpus"),
    ] {
        let done = refused(line);
        assert!(done.code == Some(2) && done.stderr.contains(what), "{}", done.stderr);
    }
}

/// Started as torchrun, SLURM and the like do.
fn as_rank(vars: &[(&str, &str)], args: &[String]) -> Command {
    let mut command = program(args);
    for (name, value) in vars {
        command.env(name, value);
    }
    command
}

#[test]
fn variables_of_other_launchers_are_taken_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let args = with(train("finetune", &model(), &out), &["--device", "cpu", "--epochs", "1"]);
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let used = held.local_addr().unwrap().port().to_string();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let vars = |rank: &'static str, size: &'static str, port: &str| -> Vec<(&'static str, String)> {
        [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size), ("MASTER_ADDR", "127.0.0.1")]
            .map(|(n, v)| (n, v.to_string()))
            .into_iter()
            .chain([("MASTER_PORT", port.to_string()), ("GPUSQ_JOIN_TIMEOUT", "2".to_string())])
            .collect()
    };
    let of = |vars: &[(&'static str, String)]| {
        let vars: Vec<(&str, &str)> = vars.iter().map(|(n, v)| (*n, v.as_str())).collect();
        as_rank(&vars, &args)
    };
    let mut without = vars("0", "2", &free);
    without.retain(|v| v.0 != "MASTER_ADDR");
    finish(&mut of(&without)).fails(2, &["MASTER_ADDR is not set"]);
    finish(&mut of(&vars("0", "2", &used))).fails(1, &["is in use", "MASTER_PORT"]);
    finish(&mut of(&vars("0", "2", &free))).fails(1, &["did not come: 1"]);
    assert!(!out.exists());

    // Ranks that disagree about how many they are.
    let first = of(&vars("0", "2", &free)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let second = finish(&mut of(&vars("1", "3", &free)));
    assert!(
        second.code == Some(1) && second.stderr.contains("WORLD_SIZE 3 and rank 0 with 2"),
        "{}",
        second.stderr
    );
    assert!(second.stdout.is_empty(), "{}", second.stdout);
    assert_eq!(first.wait_with_output().unwrap().status.code(), Some(1));

    // Ranks with different settings.
    let first = of(&vars("0", "2", &free)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut other = of(&vars("1", "2", &free));
    let second = finish(other.args(["--learning-rate", "1e-4"]));
    let error = "another run than rank 0, `learning_rate = 1e-4` for `learning_rate = 0.005`";
    assert!(second.code == Some(1) && second.stderr.contains(error), "{}", second.stderr);
    assert_eq!(first.wait_with_output().unwrap().status.code(), Some(1));
    assert!(!out.exists());

    let first = of(&vars("0", "2", &free)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let second = finish(&mut of(&vars("1", "2", &free)));
    assert!(
        second.code == Some(0) && second.stdout.is_empty() && second.stderr.is_empty(),
        "{}",
        second.stderr
    );
    assert!(first.wait_with_output().unwrap().status.success());
    assert!(out.join("run.json").exists());

    let line = ["demo", "--out", dir.path().join("demo").to_str().unwrap(), "--json"].map(String::from);
    finish(&mut as_rank(
        &vars("0", "2", &free).iter().map(|(n, v)| (*n, v.as_str())).collect::<Vec<_>>(),
        &line,
    ))
    .fails(2, &["`gpusq demo` runs in one process"]);
}
