//! `gpusq reproduce`: experiments are ordinary runs with one table over them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::tiny::{Done, dense, killed, model, run, train, tree};

/// The arguments of an experiment whose compressed models are trained for one epoch.
fn args(experiment: &str, from: &Path, out: &Path, more: &[&str]) -> Vec<String> {
    let mut args = train("reproduce", from, out);
    args.insert(1, experiment.into());
    let few = ["--prune.epochs", "1", "--quantize.epochs", "1"];
    args.extend(few.iter().chain(more).map(|a| a.to_string()));
    args
}

/// `reproduce.json` of `out`.
fn scores(out: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(out.join("reproduce.json")).unwrap()).unwrap()
}

/// Runs by folder: whether each was finished before.
fn runs(done: &Done, out: &Path) -> BTreeMap<String, bool> {
    let of = |e: &Value| {
        let folder =
            Path::new(e["folder"].as_str().unwrap()).strip_prefix(out).unwrap().display().to_string();
        (folder, e["finished"].as_bool().unwrap())
    };
    done.events().iter().filter(|e| e["event"] == "run").map(of).collect()
}

const TABLE1: [&str; 5] = ["dense", "gemm-kd", "gemm-labels", "gemm-mha-kd", "gemm-mha-labels"];

#[test]
fn a_table_is_made_of_ordinary_runs_and_only_missing_ones_are_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let two = ["--seeds", "5,6"];
    let done = run(&args("table1", &model(), &out, &two));
    done.ok();
    let all: Vec<String> = [5, 6].iter().flat_map(|s| TABLE1.map(|name| format!("seed{s}/{name}"))).collect();
    let first = runs(&done, &out);
    assert_eq!(first, all.iter().map(|name| (name.clone(), false)).collect());

    // What the table says is what the runs' own records say.
    let said = scores(&out);
    let record = |folder: &str| -> Value {
        serde_json::from_slice(&std::fs::read(out.join(folder).join("run.json")).unwrap()).unwrap()
    };
    assert_eq!(said["runs"].as_array().unwrap().len(), 10);
    for r in said["runs"].as_array().unwrap() {
        let own = record(r["folder"].as_str().unwrap());
        assert_eq!(r["stages"], own["stages"]);
        assert!(own["config"].as_str().unwrap().contains(&format!("\nseed = {}\n", r["seed"])));
    }
    let rows = said["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 9, "dense, and 2:4 FP16 and INT8 of four variants");
    let learned = rows[0]["metrics"][0]["score"]["low"].as_f64().unwrap();
    assert!(learned > 80.0, "the scores are no comparison where dense has {learned}");
    for row in &rows[1..] {
        assert_eq!(row["one_class"], 0);
        let at = |i: usize| {
            let own = record(&format!("seed{}/{}", 5 + i, row["variant"].as_str().unwrap()));
            let stages = own["stages"].as_array().unwrap();
            let stage = stages.iter().find(|s| s["name"] == row["stage"]).unwrap();
            (stage["scores"][0][1].as_f64().unwrap(), stages[0]["scores"][0][1].as_f64().unwrap())
        };
        let ((a, dense_a), (b, dense_b)) = (at(0), at(1));
        let m = &row["metrics"][0];
        assert_eq!(m["name"], "accuracy");
        assert_eq!(m["score"]["values"], json!([a, b]));
        assert_eq!(m["score"]["mean"], json!((a + b) / 2.0));
        assert_eq!(m["difference"]["values"], json!([a - dense_a, b - dense_b]));
        assert!(!row["verdict"].as_str().unwrap().is_empty(), "{row}");
    }
    for (folder, attention, distil) in
        [("gemm-kd", "none", true), ("gemm-labels", "none", false), ("gemm-mha-labels", "2:4", false)]
    {
        let config = record(&format!("seed6/{folder}"))["config"].as_str().unwrap().to_string();
        for line in [format!("\nattention = \"{attention}\"\n"), format!("\nenabled = {distil}\n")] {
            assert!(config.contains(&line), "{folder}: {line}");
        }
    }
    let table = std::fs::read_to_string(out.join("table.md")).unwrap();
    assert!(table.contains("| GEMM-MHA, labels alone · 2:4 INT8 |"), "{table}");
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("GEMM-MHA, distilled · 2:4 INT8") && page.contains("class=\"band\""), "{page}");

    // The dense models stay for those who go on; of the others only the reports do.
    let weights = |out: &Path| -> Vec<String> {
        tree(out).into_keys().filter(|n| n.ends_with(".safetensors")).collect()
    };
    assert_eq!(weights(&out), ["seed5/dense/model.safetensors", "seed6/dense/model.safetensors"]);

    // One run is gone: it alone is repeated, and gives the same.
    let before = tree(&out);
    std::fs::remove_dir_all(out.join("seed6/gemm-mha-kd")).unwrap();
    let resumed = run(&args("table1", &model(), &out, &["--seeds", "5,6", "--resume"]));
    resumed.ok();
    let again: Vec<String> = runs(&resumed, &out).into_iter().filter(|(_, f)| !f).map(|(n, _)| n).collect();
    assert_eq!(again, ["seed6/gemm-mha-kd"]);
    assert_eq!(scores(&out)["rows"], said["rows"]);
    assert_eq!(tree(&out).keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());

    // More seeds may be asked for, and other settings not.
    let more =
        run(&args("table1", &model(), &out, &["--seeds", "5,6,7", "--quantize.max-steps", "1", "--resume"]));
    more.fails(1, &["max_steps", "the run to resume has"]);
    run(&args("figure4", &model(), &out, &["--seeds", "5,6", "--resume"]))
        .fails(1, &["command: reproduce table1", "command: reproduce figure4"]);
    run(&args("table1", &model(), &out, &two)).fails(1, &["not empty", "--resume"]);
}

#[test]
fn a_killed_experiment_goes_on_where_it_was_and_a_trained_model_is_taken_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    let one = ["--seeds", "3", "--keep-models"];
    run(&args("table1", &dense(), &whole, &one)).ok();
    let args_out = args("table1", &dense(), &out, &one);
    let in_second = |e: &Value| e["event"] == "run" && e["number"] == 2;
    killed(&args_out, &out, &[&in_second, &|e| e["event"] == "saved"]);
    // The table grows with the runs.
    let so_far = scores(&out);
    assert_eq!((so_far["runs"].as_array().unwrap().len(), &so_far["planned"]), (1, &json!(4)));
    assert!(std::fs::read_to_string(out.join("table.md")).unwrap().contains("so far 1 of 4 runs"));

    let done = run(&[args_out, vec!["--resume".into()]].concat());
    done.ok();
    let of = |name: &str, finished| (format!("seed3/{name}"), finished);
    assert_eq!(
        runs(&done, &out),
        [of(TABLE1[1], true), of(TABLE1[2], false), of(TABLE1[3], false), of(TABLE1[4], false)].into()
    );
    assert_eq!(scores(&out)["rows"], scores(&whole)["rows"]);
    assert!(out.join("seed3/gemm-kd/packed/model.gpusq.safetensors").is_file(), "--keep-models keeps them");
    // One seed tells no spread, and the page says whose dense model it is.
    let said = scores(&out);
    assert!(said["rows"][1]["metrics"][0]["score"]["spread"].is_null());
    assert_eq!(said["rows"][1]["outcome"], "unknown");
    assert!(said["notes"][0].as_str().unwrap().contains("taken as it is"), "{}", said["notes"]);
    assert_eq!(done.event("done")["rows"], said["rows"]);

    // Another seed joins, without the first being repeated; the models go where they are no longer wanted.
    let two = run(&args("table1", &dense(), &out, &["--seeds", "3,4", "--resume"]));
    two.ok();
    assert!(runs(&two, &out).into_iter().all(|(name, finished)| finished == name.starts_with("seed3/")));
    assert_eq!(scores(&out)["rows"][2]["seeds"], json!([3, 4]));
    assert!(!out.join("seed3/gemm-kd/packed").exists() && out.join("seed3/gemm-kd/run.json").exists());
}

#[test]
fn the_loss_factors_and_patterns_reach_the_runs() {
    let dir = tempfile::tempdir().unwrap();
    for (experiment, n, table, lines) in [
        ("table5", 8, "distill", &["alpha = 0.0", "beta = 20.0", "gamma = 1.2"][..]),
        ("figure4", 6, "prune", &["attention = \"2:16\"", "attention = \"1:8\"", "attention = \"none\""]),
    ] {
        let out = dir.path().join(experiment);
        let few = ["--seeds", "1", "--prune.max-steps", "1", "--quantize.max-steps", "1"];
        let done = run(&args(experiment, &dense(), &out, &few));
        done.ok();
        assert_eq!(runs(&done, &out).len(), n);
        let configs: Vec<String> = runs(&done, &out)
            .keys()
            .map(|name| std::fs::read_to_string(out.join(name).join("gpusq.toml")).unwrap())
            .collect();
        for line in lines {
            let has =
                |c: &&String| c.split(&format!("[{table}]")).nth(1).unwrap().contains(&format!("\n{line}\n"));
            assert_eq!(configs.iter().filter(has).count(), 1, "{experiment}: {line}");
        }
    }
}

#[test]
fn a_wrong_experiment_seed_or_setting_is_refused_before_anything_is_read() {
    let out = Path::new("nowhere-to-write");
    let none = Path::new("no-such-model");
    run(&args("tabel1", none, out, &[]))
        .fails(2, &["no experiment `tabel1`", "did you mean `table1`", "table1, figure4, table5"]);
    for (seeds, part) in [("1,1", "1 is there twice"), ("1,x", "`x` is no seed"), ("", "`` is no seed")] {
        run(&args("table1", none, out, &["--seeds", seeds])).fails(2, &["--seeds", part, "1,2,3"]);
    }
    run(&args("table5", none, out, &["--distill.beta", "5"]))
        .fails(2, &["--distill.beta has no effect on `gpusq reproduce table5`"]);
    // What the experiment does not set is a setting like any other: the model is what is missing.
    run(&args("table1", none, out, &["--distill.beta", "5"])).fails(1, &["no-such-model"]);
    assert!(!out.exists());
}

#[test]
fn help_lists_every_experiment_with_what_it_compares() {
    let done = run(&["reproduce", "--help"].map(String::from));
    assert_eq!(done.code, Some(0));
    for e in gpusq::reproduce::EXPERIMENTS {
        assert!(done.stdout.contains(e.about), "{}", e.name);
        assert!(e.variants.iter().all(|v| done.stdout.contains(v.label)), "{}", e.name);
    }
    for part in ["--seeds", "--keep-models", "--distill.temperature", "--resume", "sample standard deviation"]
    {
        assert!(done.stdout.contains(part), "{part}");
    }
    assert!(!done.stdout.contains("--seed <"), "{}", done.stdout);
}
