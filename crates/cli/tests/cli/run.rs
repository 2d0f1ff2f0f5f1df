//! `gpusq run`: lines in, JSON lines out.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use gpusq::compress::prune_weights;
use gpusq::config::{Config, Method};
use gpusq::forward::{Compute, Inputs, Tokens};
use gpusq::model::Model;
use gpusq::params::Weight;
use gpusq::quant::{Calibration, calibrate};
use gpusq::task::{HeadKind, Split, Tokenizer, task};
use gpusq::tensor::Tensor;
use serde_json::{Value, json};

use crate::tiny::{Done, compressed, copy, data, model, program, run, tree};

fn args(model: &Path, more: &[&str]) -> Vec<String> {
    let words = ["run", "--device", "cpu", "--json", "--model", model.to_str().unwrap()];
    words.iter().chain(more).map(|s| s.to_string()).collect()
}

/// The program with `text` on its standard input.
fn given(args: &[String], text: &[u8]) -> Done {
    let mut child =
        program(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A program that has seen enough reads no more.
    let _ = child.stdin.take().unwrap().write_all(text);
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Done { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// The tiny model with another head, compressed without training, in a folder of `dir`.
fn untrained(dir: &Path, head: Option<HeadKind>) -> PathBuf {
    let mut m = Model::load(&model()).unwrap();
    if let Some(head) = head {
        m.set_head(head, 3).unwrap();
    }
    prune_weights(&mut m, &Config::default().prune, &[], Compute::CPU).unwrap();
    let tokens = Tokens { batch: 2, length: 9, ids: (5..23).collect(), types: Vec::new(), mask: None };
    let how = Calibration {
        weights: Method::Mse,
        activations: Method::Absmax,
        percentile: 99.9,
        outputs: Vec::new(),
    };
    calibrate(&mut m, &[Inputs { tokens, target: None }], &how, Compute::CPU).unwrap();
    let folder = dir.join("untrained");
    fs::create_dir(&folder).unwrap();
    m.packed().unwrap().save(&folder, Some(&model())).unwrap();
    folder
}

#[test]
fn a_classifier_says_of_each_line_what_evaluation_says_of_it() {
    let packed = compressed().join("packed");
    let dataset = {
        let tokenizer = Tokenizer::load(&packed).unwrap();
        task("sst2").unwrap().load(&data(), Split::Dev, &tokenizer, 32).unwrap()
    };
    let m = Model::load(&packed).unwrap();
    let want =
        gpusq::evaluate::predict(&m, &dataset, 7, 0, Compute::CPU, gpusq::tensor::Device::Cpu, &mut |_| {})
            .unwrap();
    let text = fs::read_to_string(data().join("dev.tsv")).unwrap();
    let sentences: Vec<&str> = text.lines().skip(1).map(|l| l.split('\t').next().unwrap()).collect();
    // Batches smaller than the file, empty lines, objects among plain text.
    let lines: Vec<String> = sentences
        .iter()
        .enumerate()
        .map(|(i, s)| match i % 3 {
            0 => json!({ "text": s, "id": { "n": i } }).to_string() + "\n\n",
            _ => format!("{s}\r\n"),
        })
        .collect();
    let done = given(&args(&packed, &["--batch-size", "2"]), lines.concat().as_bytes());
    done.ok();
    let answers = done.events();
    assert_eq!(answers.len(), sentences.len());
    for (i, (answer, logits)) in answers.iter().zip(&want).enumerate() {
        let label = ["negative", "positive"][usize::from(logits[1] > logits[0])];
        let shown = answer["probability"].as_f64().unwrap();
        let expected = 1.0 / (1.0 + f64::from(-(logits[1] - logits[0]).abs()).exp());
        assert_eq!(answer["label"], label, "{i}: {answer}");
        assert!((shown - expected).abs() < 1e-5, "{i}: {answer} for {logits:?}");
        assert_eq!(answer["probabilities"][label], answer["probability"]);
        assert_eq!(answer["line"].as_u64().unwrap() as usize, 1 + i + i.div_ceil(3), "{answer}");
        assert_eq!(answer["id"], if i % 3 == 0 { json!({ "n": i }) } else { Value::Null });
    }
    // The same from a file.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lines");
    fs::write(&file, lines.concat()).unwrap();
    assert_eq!(run(&args(&packed, &["--input", file.to_str().unwrap()])).events(), answers);
}

#[test]
fn answers_are_spans_of_their_context() {
    let dir = tempfile::tempdir().unwrap();
    let folder = untrained(dir.path(), Some(HeadKind::Span));
    let context = "thé film was very good . the story is dull and the cast is fine . the plot is in the end , that scene";
    let lines = [
        json!({ "question": "is the film good", "context": context, "id": "a" }),
        json!({ "question": "the cast", "context": context.repeat(3) }),
        json!({ "question": "the cast", "context": "" }),
    ];
    let done = given(&args(&folder, &[]), lines.map(|l| l.to_string()).join("\n").as_bytes());
    done.ok();
    let answers = done.events();
    for (answer, context) in answers.iter().zip([context, &context.repeat(3)]) {
        let [start, end] = ["start", "end"].map(|at| answer[at].as_u64().unwrap() as usize);
        let said: String = context.chars().skip(start).take(end - start).collect();
        assert!(!said.is_empty() && answer["answer"] == said.as_str(), "{answer}");
        let p = answer["probability"].as_f64().unwrap();
        assert!(p > 0.0 && p <= 1.0, "{answer}");
    }
    assert_eq!((&answers[0]["id"], &answers[2]["answer"]), (&json!("a"), &json!("")));
    given(&args(&folder, &[]), b"{\"question\": \"a\", \"context\": \"b\"}\n\nwho\n")
        .fails(1, &["standard input:3: is no JSON object", "question"]);
}

#[test]
fn a_model_without_a_head_gives_embeddings_of_length_one() {
    let dir = tempfile::tempdir().unwrap();
    let folder = untrained(dir.path(), None);
    let done = given(&args(&folder, &[]), b"the film\nthe film was very good and warm .\nthe film");
    done.ok();
    let vectors: Vec<Vec<f64>> =
        done.events().iter().map(|e| serde_json::from_value(e["embedding"].clone()).unwrap()).collect();
    for v in &vectors {
        assert_eq!(v.len(), 32);
        assert!((v.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5, "{v:?}");
    }
    assert!(vectors[0] == vectors[2] && vectors[0] != vectors[1]);
}

#[test]
fn bad_lines_are_named_by_their_number() {
    let packed = compressed().join("packed");
    let cases: [(&[u8], &str); 4] = [
        (b"fine\n{\"text\": 3}\n", "standard input:2: has `text`: 3"),
        (b"\n\n{\"txt\": \"a\"}\n", "standard input:3: has a field `txt`"),
        (b"fine\n{\"text\": \"a\"\n", "standard input:2: is no JSON object"),
        (b"fine\nfine\n\xff\xfe\n", "standard input:3: is not UTF-8"),
    ];
    for (text, part) in cases {
        given(&args(&packed, &[]), text).fails(1, &[part]);
    }
    run(&args(&packed, &["--input", "/no/such/file"])).fails(1, &["/no/such/file", "check the path"]);
    run(&args(&packed, &["--max-length", "33"])).fails(1, &["--max-length 33: ", "takes 32 tokens"]);
    given(&args(&packed, &["--max-length", "2"]), b"fine\n").fails(2, &["--max-length 2: ", "at least 3"]);
    // Nothing asked, nothing said.
    let nothing = given(&args(&packed, &[]), b"\n \n");
    assert_eq!((nothing.code, nothing.stdout.as_str()), (Some(0), ""));
    let dense = compressed().join("quantized");
    let before = tree(&dense);
    let fine = |folder: &Path| given(&args(folder, &[]), b"fine\n");
    fine(&dense).fails(1, &[dense.to_str().unwrap(), "needs a packed model", "give the folder packed"]);
    fine(&compressed().join("pruned")).fails(1, &["is 2:4,", "run `gpusq quantize`"]);
    fine(&crate::tiny::dense()).fails(1, &["is dense,", "run `gpusq compress`"]);
    assert!(before == tree(&dense));
}

/// A word is a token, beside two special ones.
#[test]
fn what_is_not_read_of_a_text_is_said() {
    let packed = compressed().join("packed");
    let text = format!("{}\n{}\n", "film ".repeat(8), "film ".repeat(11));
    let done = given(&args(&packed, &["--max-length", "10"]), text.as_bytes());
    done.ok();
    let said: Vec<Value> = done.events().iter().map(|e| e["tokens_dropped"].clone()).collect();
    assert_eq!(said, [Value::Null, json!(3)]);
    assert!(!done.stderr.contains("vocabulary"), "{}", done.stderr);
    // A tokenizer with a few words less is padded, one with many less is another's.
    let dir = tempfile::tempdir().unwrap();
    let mut m = Model::load(&packed).unwrap();
    for (more, odd) in [(100, false), (200, true)] {
        let Some(Weight::Dense(table)) = m.params.get("embed.word") else { panic!("no table") };
        let (rows, width) = (41 + more, table.width());
        let larger = [table.f32(), &vec![0.0; (rows - table.rows()) * width]].concat();
        m.params.insert("embed.word", Weight::Dense(Tensor::from_f32(larger, &[rows, width])));
        m.spec.vocab = rows;
        m.config.json["vocab_size"] = rows.into();
        let folder = dir.path().join(rows.to_string());
        fs::create_dir(&folder).unwrap();
        m.save(&folder, Some(&packed)).unwrap();
        let done = given(&args(&folder, &[]), b"fine\n");
        assert!(done.code == Some(0) && done.events().len() == 1, "{}", done.stderr);
        let note = format!("note: the tokenizer has 41 entries and the model's vocabulary {rows}");
        assert_eq!(done.stderr.contains(&note), odd, "{}", done.stderr);
    }
}

/// However many lines are read ahead.
#[test]
fn lines_before_a_bad_one_are_answered() {
    let packed = compressed().join("packed");
    for good in [2, 37] {
        let text = "fine\n".repeat(good) + "{bad\n" + &"fine\n".repeat(40);
        let done = given(&args(&packed, &["--batch-size", "1"]), text.as_bytes());
        done.fails(1, &[&format!("standard input:{}: ", good + 1)]);
        let lines: Vec<u64> = done.events().iter().filter_map(|e| e["line"].as_u64()).collect();
        assert_eq!(lines, (1..=good as u64).collect::<Vec<_>>());
    }
}

/// A program that writes a line, waits for its answer and writes the next.
#[test]
fn a_line_is_answered_though_no_other_comes() {
    let mut child = program(&args(&compressed().join("packed"), &[]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let (to, answers) = std::sync::mpsc::channel();
    std::thread::spawn(move || stdout.lines().for_each(|line| to.send(line.unwrap()).unwrap()));
    let mut quickest = Duration::MAX;
    for number in 1..=40 {
        let asked = Instant::now();
        writeln!(stdin, "the film was fine").unwrap();
        let answer =
            answers.recv_timeout(Duration::from_secs(60)).expect("an answer while the input is open");
        quickest = quickest.min(asked.elapsed());
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["line"], number);
    }
    // Nothing is waited for before a line is answered.
    assert!(quickest < Duration::from_millis(5), "{quickest:?}");
    drop(stdin);
    assert!(child.wait().unwrap().success());
}

/// Input without an end, of which somebody wanted one answer.
#[test]
fn nothing_more_is_answered_when_nobody_reads() {
    let mut child = program(&args(&compressed().join("packed"), &["--batch-size", "1"]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // Ends when the program has ended and reads no more.
    let writer = std::thread::spawn(move || while stdin.write_all(&b"fine\n".repeat(100)).is_ok() {});
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert!(first.contains("\"line\":1"), "{first}");
    let clock = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if clock.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("it goes on for nobody");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(child.wait().unwrap().success());
    writer.join().unwrap();
}

#[test]
fn bench_times_what_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let packed = compressed().join("packed");
    let words = [
        "bench",
        "--device",
        "cpu",
        "--json",
        "--model",
        packed.to_str().unwrap(),
        "--batch",
        "1,3",
        "--length",
        "8,32",
        "--repeats",
        "3",
        "--out",
        dir.path().join("times").to_str().unwrap(),
    ]
    .map(String::from);
    let done = run(&words);
    done.ok();
    let bench = &done.event("bench")["bench"];
    let series = bench["series"].as_array().unwrap();
    assert_eq!(series.iter().map(|s| s["name"].as_str().unwrap()).collect::<Vec<_>>(), ["gemm", "gemm-mha"]);
    for s in series {
        let cells: Vec<[u64; 3]> = s["cells"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| ["batch", "length", "runs"].map(|key| c[key].as_u64().unwrap()))
            .collect();
        assert_eq!(cells, [[1, 8, 3], [3, 8, 3], [1, 32, 3], [3, 32, 3]]);
        assert!(s["cells"].as_array().unwrap().iter().all(|c| c["median"].as_f64().unwrap() > 0.0));
    }
    assert_eq!(bench["unit"], "ms");
    // A CPU has nothing to keep.
    let loads = bench["loads"].as_array().unwrap();
    assert_eq!(loads.len(), 1, "{loads:?}");
    assert_eq!(
        [&loads[0]["name"], &loads[0]["batch"], &loads[0]["length"]],
        [&json!("cold"), &json!(1), &json!(8)]
    );
    assert!(["open", "read", "prepare", "first"].iter().all(|part| loads[0][part].as_f64().unwrap() > 0.0));
    let written: Value =
        serde_json::from_slice(&fs::read(dir.path().join("times/bench.json")).unwrap()).unwrap();
    assert_eq!(&written, bench);
    assert!(dir.path().join("times/report.html").exists());
    let wrong = |flag: &str, value: &str, code: i32, part: &str| {
        let mut args = words.to_vec();
        args.truncate(6);
        args.extend([flag, value].map(String::from));
        run(&args).fails(code, &[part]);
    };
    wrong("--length", "33", 1, "takes 32 tokens");
    wrong("--batch", "1,x", 2, "as in 1,8,32");
    let texts = |batches: &str| {
        let own = ["--batch", batches, "--length", "32", "--repeats", "2", "--task", "sst2", "--data"];
        let words = words[..6].iter().cloned().chain(own.map(String::from));
        run(&words.chain([data().to_str().unwrap().into()]).collect::<Vec<_>>())
    };
    let done = texts("3,4");
    done.ok();
    let bench = &done.event("bench")["bench"];
    assert_eq!(bench["series"], json!([]));
    let rows = bench["texts"].as_array().unwrap();
    assert_eq!(rows.iter().map(|r| r["batch"].as_u64().unwrap()).collect::<Vec<_>>(), [3, 4]);
    for row in rows {
        assert!(row["padded"].as_f64().unwrap() > 0.0 && row["length"] == 32);
        for batch in row["batches"].as_array().unwrap() {
            let (tokens, size) = (batch["tokens"].as_u64().unwrap(), row["batch"].as_u64().unwrap());
            assert!(
                (5 * size..=13 * size).contains(&tokens) && batch["median"].as_f64().unwrap() > 0.0,
                "{row}"
            );
        }
    }
    let late = texts("1,3000");
    late.fails(1, &["a batch of 3000 from", "give more, or a smaller one"]);
    assert_eq!(late.events().len(), 1, "{}", late.stdout);
    wrong("--task", "sst2", 2, "required arguments");
    let unknown = ["bench", "--json", "--spec", "bert-huge"].map(String::from);
    run(&unknown).fails(2, &["bert-huge", "bert-base"]);
    // Before anything is timed: nothing is shown of it.
    let refused = |model: &Path, out: &Path, parts: &[&str]| {
        let [model, out] = [model, out].map(|p| p.to_str().unwrap());
        let words = ["bench", "--device", "cpu", "--model", model, "--repeats", "1", "--out", out, "--json"];
        let done = run(&words.map(String::from));
        done.fails(1, parts);
        assert_eq!(done.events().len(), 1, "{}", done.stdout);
    };
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    refused(&packed, &file, &[file.to_str().unwrap(), "is not a folder; choose another --out"]);
    refused(&packed, &file.join("below"), &["is not a folder; choose another --out"]);
    let before = tree(&compressed());
    refused(&packed, &compressed(), &["has a report.html already", "--out"]);
    let first = dir.path().join("first");
    fs::create_dir(&first).unwrap();
    fs::write(first.join("bench.json"), "{}").unwrap();
    refused(&packed, &first, &["has a bench.json already", "--out"]);
    refused(&compressed().join("pruned"), &dir.path().join("new"), &["pruned is 2:4", "gpusq bench"]);
    assert!(before == tree(&compressed()) && !dir.path().join("new").exists());
}

#[test]
fn pairs_and_single_texts_are_told_apart_by_the_task() {
    let packed = compressed().join("packed");
    let two = json!({ "text": "a good film", "text_pair": "a bad film" }).to_string();
    given(&args(&packed, &[]), two.as_bytes()).fails(1, &["input:1", "trained on one text (sst2)", "is two"]);
    let dir = tempfile::tempdir().unwrap();
    let pairs = dir.path().join("pairs");
    copy(&packed, &pairs);
    let manifest = pairs.join("gpusq.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"sst2\"", "\"mrpc\"")).unwrap();
    let one = b"{\"text\": \"a film\"}";
    given(&args(&pairs, &[]), one).fails(1, &["input:1", "trained on pairs of texts (mrpc)", "give both"]);
    given(&args(&pairs, &[]), two.as_bytes()).ok();
}

#[test]
fn a_question_that_is_cut_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let packed = untrained(dir.path(), Some(HeadKind::Span));
    let dropped = |words: usize| {
        let question = vec!["film"; words].join(" ");
        let line = json!({ "question": question, "context": "a good film" }).to_string();
        let done = given(&args(&packed, &[]), line.as_bytes());
        done.ok();
        done.events()[0]["tokens_dropped"].as_u64()
    };
    assert_eq!(dropped(3), None);
    let [some, more] = [40, 47].map(|n| dropped(n).unwrap());
    assert!(some > 0 && more == some + 7, "{some} {more}");
}

#[test]
fn a_plan_is_about_gpus() {
    let packed = compressed().join("packed");
    let inspect = |more: &[&str]| {
        let words = ["inspect", packed.to_str().unwrap(), "--json"];
        run(&words.iter().chain(more).map(|s| s.to_string()).collect::<Vec<_>>())
    };
    inspect(&["--plan", "--device", "cpu"]).fails(2, &["--plan is about GPUs"]);
    inspect(&["--length", "8"]).fails(2, &["required arguments"]);
    inspect(&[]).ok();
}
