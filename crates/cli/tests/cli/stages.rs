//! Every stage's folder is a model that can be scored, inspected and handed to the next command.

use std::path::Path;

use gpusq::evaluate::predict;
use gpusq::forward::Compute;
use gpusq::model::Model;
use gpusq::task::{Split, Tokenizer, task};
use serde_json::Value;

use crate::tiny::{Done, compressed, data, dense, model, run, start, train, tree};

fn eval(dir: &Path, split: &str) -> Value {
    eval_with(dir, split, &[])
}

fn eval_with(dir: &Path, split: &str, more: &[String]) -> Value {
    let data = data();
    let args = [
        "eval",
        "--model",
        dir.to_str().unwrap(),
        "--data",
        data.to_str().unwrap(),
        "--split",
        split,
        "--json",
    ];
    let done = run(&[&args.map(String::from)[..], more].concat());
    done.ok();
    assert_eq!(done.events().len(), 1);
    done.event("scored")
}

#[test]
fn every_stage_is_scored_and_the_packed_model_answers_as_the_quantised_one() {
    let out = compressed();
    let folders =
        [dense(), out.join("pruned"), out.join("packed-fp16"), out.join("quantized"), out.join("packed")];
    let stages = ["dense", "pruned", "packed-f16", "quantized", "packed-int8"];
    for split in ["dev", "train"] {
        let scored: Vec<Value> = folders.iter().map(|d| eval(d, split)).collect();
        for (s, stage) in scored.iter().zip(stages) {
            assert_eq!(
                (s["stage"].as_str(), s["task"].as_str(), s["split"].as_str()),
                (Some(stage), Some("sst2"), Some(split))
            );
            let accuracy = s["scores"]["accuracy"].as_f64().unwrap();
            assert!(accuracy > 80.0, "{stage} learned nothing: {accuracy}");
        }
        assert_eq!(scored[3]["scores"], scored[4]["scores"]);
    }
    let logits = |dir: &Path| {
        let (model, tokenizer) = (Model::load(dir).unwrap(), Tokenizer::load(dir).unwrap());
        let dev = task("sst2").unwrap().load(&data(), Split::Dev, &tokenizer, 32).unwrap();
        predict(&model, &dev, 7, tokenizer.pad_id(), Compute::CPU, gpusq::tensor::Device::Cpu, &mut |_| {})
            .unwrap()
    };
    assert_eq!(logits(&folders[3]), logits(&folders[4]), "logits to the last bit");
}

#[test]
fn every_stage_is_inspected() {
    let out = compressed();
    for dir in
        [dense(), out.join("pruned"), out.join("packed-fp16"), out.join("quantized"), out.join("packed")]
    {
        let args = ["inspect", dir.to_str().unwrap(), "--json"].map(String::from);
        let done = run(&args);
        done.ok();
        assert_eq!(
            done.event("inspect")["compressible_linears"],
            14,
            "12 of the encoder, pooler and classifier"
        );
        assert_eq!(run(&args[..2]).code, Some(0));
    }
}

#[test]
fn later_commands_use_the_length_a_model_was_trained_with() {
    let dir = tempfile::tempdir().unwrap();
    let (short, pruned) = (dir.path().join("short"), dir.path().join("pruned"));
    let few = ["--max-steps", "2"].map(String::from);
    let args =
        [&train("finetune", &model(), &short)[..], &few, &["--data.max-length", "8"].map(String::from)];
    run(&args.concat()).ok();
    assert_eq!(eval(&short, "dev")["max_length"], 8);
    let done = run(&[&train("prune", &short, &pruned)[..], &few].concat());
    done.ok();
    assert_eq!(done.event("preflight")["preflight"]["longest"], 8);
    assert_eq!(eval(&pruned, "dev")["max_length"], 8);
    for flag in ["--max-length", "--data.max-length"] {
        let whole = [flag, "32"].map(String::from);
        assert_eq!(eval_with(&pruned, "dev", &whole)["max_length"], 32, "what is asked for comes first");
    }

    // A manifest from before the length was kept: the task's own, as far as the model goes.
    let manifest = short.join("gpusq.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let old: String = text.lines().filter(|l| !l.contains("max_length")).collect();
    assert!(text.contains("\"max_length\": 8"), "{text}");
    std::fs::write(&manifest, old).unwrap();
    assert_eq!(eval(&short, "dev")["max_length"], 32);
}

#[test]
fn a_run_that_compresses_nothing_says_nothing_of_it() {
    let page = std::fs::read_to_string(dense().join("report.html")).unwrap();
    assert!(page.contains("<p class=\"muted\">sst2 · dense, nothing compressed</p>"), "{page}");
    assert!(!page.contains("GEMM weights are compressed") && !page.contains(">Kept<"), "{page}");
    let page = std::fs::read_to_string(compressed().join("report.html")).unwrap();
    assert!(page.contains("14 of 14 GEMM weights are compressed") && page.contains(">Kept<"), "{page}");

    let dir = tempfile::tempdir().unwrap();
    let mut said = Vec::new();
    for (command, from) in [("finetune", model()), ("prune", dense())] {
        let mut args = train(command, &from, &dir.path().join(command));
        args.retain(|a| a != "--json");
        args.extend(["--max-steps", "1"].map(String::from));
        let done = run(&args);
        assert_eq!(done.code, Some(0), "{}", done.stderr);
        let units = |text: &str| text.contains("B of its memory and ") && !text.contains("iB");
        assert!(units(&done.stdout), "the report's units: {}", done.stdout);
        said.push(done.stdout.contains("to compress") && done.stdout.contains("compresses: "));
        assert_eq!(done.stdout.contains("compress"), command == "prune", "{}", done.stdout);
    }
    assert_eq!(said, [false, true]);
}

#[test]
fn a_report_says_that_a_run_was_without_distillation() {
    let dir = tempfile::tempdir().unwrap();
    for (more, subtitle) in [
        (&["--no-distill"][..], "sst2 · GEMM, without distillation (labels only)"),
        (
            &["--attention", "2:4", "--no-distill"],
            "sst2 · GEMM-MHA, attention 2:4, without distillation (labels only)",
        ),
        (&[], "sst2 · GEMM"),
    ] {
        let out = dir.path().join(more.len().to_string());
        let few = ["--prune.max-steps", "1", "--quantize.max-steps", "1"];
        let more: Vec<String> = few.iter().chain(more).map(|a| a.to_string()).collect();
        run(&[train("compress", &dense(), &out), more].concat()).ok();
        let page = std::fs::read_to_string(out.join("report.html")).unwrap();
        assert!(page.contains(&format!("<p class=\"muted\">{subtitle}</p>")), "{subtitle}: {page}");
    }
}

#[test]
fn questions_are_counted_and_not_the_windows_they_are_read_in() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("squad");
    std::fs::create_dir(&data).unwrap();
    let context = "the film is good . ".repeat(12);
    let ask = |id: &str| {
        let answers = serde_json::json!([{ "text": "film", "answer_start": 4 }]);
        serde_json::json!({ "id": id, "question": "is it good", "answers": answers })
    };
    let file = |n: usize| {
        let asked: Vec<Value> = (0..n).map(|i| ask(&i.to_string())).collect();
        serde_json::json!({ "data": [{ "paragraphs": [{ "context": context, "qas": asked }] }] }).to_string()
    };
    std::fs::write(data.join("train-v1.1.json"), format!("\u{feff}{}", file(5))).unwrap();
    std::fs::write(data.join("dev-v1.1.json"), file(3)).unwrap();
    let out = dir.path().join("out");
    let mut args = train("finetune", &model(), &out);
    for (flag, value) in [("--task", "squad"), ("--data", data.to_str().unwrap())] {
        let at = args.iter().position(|a| a == flag).unwrap();
        args[at + 1] = value.into();
    }
    args.extend(["--max-steps", "1"].map(String::from));
    let done = run(&args);
    done.ok();
    let before = &done.event("preflight")["preflight"];
    assert_eq!(before["examples"], serde_json::json!([5, 3]));
    // 60 tokens of context in rooms of 26, of which neighbours share 13.
    assert_eq!(before["windows"], serde_json::json!([20, 12]));
    let record: Value = serde_json::from_slice(&std::fs::read(out.join("run.json")).unwrap()).unwrap();
    assert_eq!(record["stages"][0]["examples"], 3);

    let args = ["eval", "--model", out.to_str().unwrap(), "--data", data.to_str().unwrap(), "--json"];
    let done = run(&args.map(String::from));
    done.ok();
    let scored = done.event("scored");
    assert_eq!((scored["examples"].as_u64(), scored["windows"].as_u64()), (Some(3), Some(12)));
    let said = run(&args[..5].iter().map(|a| a.to_string()).collect::<Vec<_>>()).stdout;
    assert!(said.contains("; 3 examples in 12 windows in "), "{said}");
}

#[test]
fn a_model_that_knows_one_class_only_is_not_said_to_match() {
    let dir = tempfile::tempdir().unwrap();
    let one = dir.path().join("data");
    std::fs::create_dir(&one).unwrap();
    std::fs::copy(data().join("dev.tsv"), one.join("dev.tsv")).unwrap();
    let text = std::fs::read_to_string(data().join("train.tsv")).unwrap();
    let good: String = text.lines().filter(|l| !l.ends_with('0')).map(|l| format!("{l}\n")).collect();
    std::fs::write(one.join("train.tsv"), good).unwrap();
    let (constant, out) = (dir.path().join("constant"), dir.path().join("out"));
    for (command, from, to) in [("finetune", &model(), &constant), ("compress", &constant, &out)] {
        let mut args = train(command, from, to);
        let at = args.iter().position(|a| a == "--data").unwrap();
        args[at + 1] = one.to_str().unwrap().into();
        let done = run(&args);
        done.ok();
        assert!(done.stdout.contains("predicts one class for every example"), "{}", done.stdout);
        if command == "compress" {
            let verdict = done.event("verdict")["text"].as_str().unwrap().to_string();
            assert!(verdict.starts_with("dense and 2:4 INT8 each predict one class"), "{verdict}");
        }
    }
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(!page.contains("verdict good") && page.contains(">one class</span>"), "{page}");
    assert_eq!(eval(&out.join("packed"), "dev")["one_class"], true);
    assert_eq!(eval(&compressed().join("packed"), "dev")["one_class"], false);
}

#[test]
fn single_stages_give_what_all_of_them_together_give() {
    let dir = tempfile::tempdir().unwrap();
    let (pruned, quantized) = (dir.path().join("pruned"), dir.path().join("quantized"));
    run(&train("prune", &dense(), &pruned)).ok();
    run(&train("quantize", &pruned, &quantized)).ok();
    let all = compressed();
    for (single, whole) in [(&pruned, all.join("pruned")), (&quantized, all.join("quantized"))] {
        for file in ["model.safetensors", "gpusq.json", "curve.json", "config.json"] {
            assert_eq!(
                std::fs::read(single.join(file)).unwrap(),
                std::fs::read(whole.join(file)).unwrap(),
                "{file}"
            );
        }
    }
    assert_eq!(tree(&quantized.join("packed")), tree(&all.join("packed")));
}

/// A second run reads what the first kept, and leaves the files of a run without a cache.
#[test]
fn a_teachers_outputs_are_kept_for_later_runs() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let out = |name: &str| dir.path().join(name);
    let with = |name: &str, more: &[&str]| {
        let mut args = train("prune", &dense(), &out(name));
        args.extend(more.iter().map(|s| s.to_string()));
        run(&args)
    };
    let plain = with("plain", &[]);
    plain.ok();
    let flag = ["--teacher-cache", cache.to_str().unwrap()];
    let notes = |done: &Done| -> Vec<String> {
        let all = done.events().into_iter().filter(|e| e["event"] == "note");
        all.map(|e| e["text"].as_str().unwrap().to_string()).filter(|t| t.contains("cache")).collect()
    };
    // Said before anything is trained or written.
    let file = out("a-file");
    std::fs::write(&file, "").unwrap();
    let refused = with("refused", &["--teacher-cache", file.to_str().unwrap()]);
    refused.fails(2, &["the teacher's cache", "a-file", "give another folder or leave it out"]);
    assert!(!out("refused").exists());
    for (name, note) in [("first", "2:4: 0 of 32 outputs"), ("second", "2:4: 32 of 32 outputs")] {
        let done = with(name, &flag);
        done.ok();
        assert!(notes(&done).len() == 1 && notes(&done)[0].starts_with(note), "{:?}", notes(&done));
        let preflight = done.events().into_iter().find(|e| e["event"] == "preflight").unwrap();
        assert!(preflight["preflight"]["teacher_cache"].as_u64().unwrap() > 0);
        for file in ["model.safetensors", "curve.json"] {
            let read = |name: &str| std::fs::read(out(name).join(file)).unwrap();
            assert!(read(name) == read("plain"), "{file} of the {name} run differs");
        }
    }
    assert!(notes(&plain).is_empty());
    for (more, why) in [
        (["--no-distill", "", ""], "distillation is off"),
        (["--pipeline-parallel-size", "2", ""], "cannot be used with"),
    ] {
        let more: Vec<&str> = flag.iter().chain(&more).copied().filter(|s| !s.is_empty()).collect();
        let done = with("refused", &more);
        assert!(done.code != Some(0) && done.stderr.contains(why), "{}", done.stderr);
        assert!(!out("refused").exists());
    }
}

#[test]
fn every_file_that_a_run_leaves_is_documented() {
    let documents = [include_str!("../../../../README.md"), include_str!("../../../../FORMAT.md")].concat();
    for name in tree(&compressed()).keys().chain(tree(&dense()).keys()) {
        for part in name.split_terminator('/') {
            assert!(
                documents.contains(&format!("`{part}`"))
                    || documents.contains(&format!("`{part}/`"))
                    || documents.contains(&format!("`OUT/{part}`")),
                "{name}"
            );
        }
    }
}

#[test]
fn a_run_goes_on_when_nobody_reads_its_output() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut child = crate::tiny::program(&train("prune", &dense(), &out))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    assert!(out.join("run.json").exists());
}

#[test]
fn two_runs_into_one_folder_do_not_meet() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let args = [&train("prune", &dense(), &out)[..], &["--epochs", "1000"].map(String::from)].concat();
    let resumed = [&args[..], &["--resume".into()]].concat();
    let mut first = start(&args);
    first.wait_for(|e| e["event"] == "saved");
    first.pause();
    let before = tree(&out);
    run(&args).fails(1, &["not empty", "--resume"]);
    run(&resumed).fails(1, &[out.to_str().unwrap(), "another run is writing here"]);
    assert!(tree(&out) == before);
    assert!(first.kill());
    // The lock went with the process that held it.
    let mut second = start(&resumed);
    second.wait_for(|e| e["event"] == "stage" && e["done"].as_u64() >= Some(4));
    assert!(second.kill());
}
