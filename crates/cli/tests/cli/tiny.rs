//! A BERT of two layers, forty words and a few dozen sentences, and the program run on them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use gpusq::arch::{self, Config};
use gpusq::format::safetensors::{Checkpoint, write_safetensors};
use gpusq::model::{Model, Stage};
use gpusq::params::{Params, Weight};
use gpusq::tensor::{Tensor, normal};
use serde_json::Value;
use tempfile::TempDir;

const GOOD: [&str; 8] = ["good", "great", "fine", "warm", "bright", "moving", "funny", "wise"];
const BAD: [&str; 8] = ["bad", "dull", "cold", "flat", "slow", "stale", "loud", "weak"];
const OTHER: [&str; 20] = [
    "the", "a", "film", "story", "is", "was", "very", "and", "its", "cast", "plot", "in", "of", "end",
    "this", "that", "scene", "so", "it", ".",
];
const CONFIG: &str = r#"{
  "model_type": "bert", "vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 2,
  "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 32, "type_vocab_size": 2,
  "hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1
}"#;
const SETTINGS: &str = "\
[train]\nepochs = 12\nbatch_size = 8\nlearning_rate = 5e-3\ncheckpoint_every = 4\nlog_every = 3
[prune]\nepochs = 4\nbatch_size = 8\nlearning_rate = 1e-3\ncheckpoint_every = 4\nlog_every = 3
[quantize]\nepochs = 4\nbatch_size = 8\nlearning_rate = 1e-3\ncheckpoint_every = 4\nlog_every = 3
calibration_examples = 16\n";

/// The folder all inputs are in; it goes when the tests end, as far as the system cleans up.
pub(crate) fn root() -> &'static Path {
    static ROOT: OnceLock<TempDir> = OnceLock::new();
    ROOT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        write_model(&dir.path().join("model"));
        write_data(&dir.path().join("data"));
        std::fs::write(dir.path().join("settings.toml"), SETTINGS).unwrap();
        dir
    })
    .path()
}

/// The model without a head, as the hub would give it.
pub(crate) fn model() -> PathBuf {
    root().join("model")
}

/// SST-2's layout.
pub(crate) fn data() -> PathBuf {
    root().join("data")
}

/// Few steps, many checkpoints.
pub(crate) fn settings() -> PathBuf {
    root().join("settings.toml")
}

/// The model fine-tuned by the program, once for all tests.
pub(crate) fn dense() -> PathBuf {
    static DONE: OnceLock<()> = OnceLock::new();
    let dir = root().join("dense");
    DONE.get_or_init(|| run(&train("finetune", &model(), &dir)).ok());
    dir
}

/// All stages of [`dense`], by the program, once for all tests.
pub(crate) fn compressed() -> PathBuf {
    static DONE: OnceLock<()> = OnceLock::new();
    let dir = root().join("compressed");
    let from = dense();
    DONE.get_or_init(|| run(&train("compress", &from, &dir)).ok());
    dir
}

fn write_model(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    let config = Config::parse(&dir.join("config.json"), CONFIG).unwrap();
    let spec = (arch::find(&config).unwrap().spec)(&config).unwrap();
    let mut params = Params::new();
    for (i, (name, shape)) in spec.weights().into_iter().enumerate() {
        let value = match shape.len() {
            2 => normal(&shape, 0.05, 7 + i as u64),
            _ if name.ends_with("norm.weight") => Tensor::from_f32(vec![1.0; shape[0]], &shape),
            _ => Tensor::zeros(&shape),
        };
        params.insert(name, Weight::Dense(value));
    }
    let (fresh, unused) = (Vec::new(), Vec::new());
    let (stage, attention, task, max_length) = (Stage::Dense, None, None, None);
    let model = Model { spec, params, config, stage, attention, task, max_length, fresh, unused };
    model.save(dir, None).unwrap();
    // Other programs' checkpoints have no manifest.
    std::fs::remove_file(dir.join("gpusq.json")).unwrap();
    without_checksums(dir);
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let words: Vec<&str> = special.into_iter().chain(GOOD).chain(BAD).chain(OTHER).collect();
    assert_eq!(words.len(), 41, "as CONFIG says");
    std::fs::write(dir.join("vocab.txt"), words.join("\n") + "\n").unwrap();
}

fn write_data(dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    let rows = |n: usize, seed: usize| {
        let mut text = String::from("sentence\tlabel\n");
        for i in 0..n {
            // Both classes use all their words in both splits.
            let (k, good) = (i / 2 * 3 + seed, i % 2 == 0);
            let word = |j: usize| if good { GOOD[j % 8] } else { BAD[j % 8] };
            let other = |j: usize| OTHER[j % 19];
            let tail = vec![other(k + 3); i % 5].join(" ");
            text += &format!(
                "{} {} {} {} {tail} .\t{}\n",
                other(k),
                word(k),
                other(k + 5),
                word(k + 2),
                u8::from(good)
            );
        }
        text
    };
    std::fs::write(dir.join("train.tsv"), rows(64, 0)).unwrap();
    std::fs::write(dir.join("dev.tsv"), rows(24, 3)).unwrap();
}

/// The arguments of a training command with the small settings.
pub(crate) fn train(command: &str, from: &Path, out: &Path) -> Vec<String> {
    let paths = [from, &data(), out, &settings()].map(|p| p.to_str().unwrap().to_string());
    let [from, data, out, config] = paths;
    [
        command, "--model", &from, "--task", "sst2", "--data", &data, "--out", &out, "--config", &config,
        "--json",
    ]
    .map(String::from)
    .to_vec()
}

/// The program, apart from the settings of whoever runs the tests.
pub(crate) fn program(args: &[String]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_gpusq"));
    for name in ["HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "all_proxy"] {
        c.env_remove(name).env_remove(name.to_uppercase());
    }
    for name in ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
        c.env_remove(name);
    }
    // No test reaches the network or the user's own downloads.
    c.env("HF_HOME", root().join("hub")).env("HF_HUB_OFFLINE", "1");
    c.args(args);
    c
}

/// What a run left behind.
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs to the end.
pub(crate) fn run(args: &[String]) -> Done {
    finish(&mut program(args))
}

/// Runs `command` to the end; what goes elsewhere than to this process is not among its output.
pub(crate) fn finish(command: &mut Command) -> Done {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Done { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

impl Done {
    /// It worked and wrote JSON lines only.
    #[track_caller]
    pub(crate) fn ok(&self) {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stderr, "", "{}", self.stdout);
        self.events();
    }

    /// Every line of standard output, each of which must be JSON.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<Value> {
        let parse = |l: &str| serde_json::from_str(l).unwrap_or_else(|e| panic!("not JSON ({e}): {l}"));
        self.stdout.lines().map(parse).collect()
    }

    /// The last event called `name`.
    #[track_caller]
    pub(crate) fn event(&self, name: &str) -> Value {
        let all = self.events();
        all.into_iter().rfind(|e| e["event"] == name).unwrap_or_else(|| panic!("no {name}: {}", self.stdout))
    }

    /// It failed with `code` and exactly one line that says `parts`, on standard error and as JSON.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, parts: &[&str]) {
        let all = format!("{}{}", self.stdout, self.stderr);
        assert_eq!(self.code, Some(code), "{all}");
        assert!(!all.contains("panicked"), "{all}");
        let lines: Vec<&str> = self.stderr.lines().collect();
        let errors: Vec<&&str> = lines.iter().filter(|l| l.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{all}");
        // Only what the command-line parser says has its usage behind it.
        assert!(lines.len() == 1 || self.stderr.contains("--help"), "{all}");
        for part in parts {
            assert!(errors[0].contains(part), "`{part}` is not in: {}", errors[0]);
        }
        let event = self.event("error");
        assert_eq!(event["message"].as_str().unwrap(), errors[0].trim_start_matches("error: "));
    }
}

/// A run to kill: its events as they come.
pub(crate) struct Running {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

pub(crate) fn start(args: &[String]) -> Running {
    let mut child = program(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    Running { child, lines }
}

/// Starts a run into `out`, which does not exist, and kills it after the last of `events`. Again from the
/// start where the run was quicker than the kill.
#[track_caller]
pub(crate) fn killed(args: &[String], out: &Path, events: &[&dyn Fn(&Value) -> bool]) {
    for _ in 0..10 {
        let mut run = start(args);
        events.iter().for_each(|e| run.wait_for(e));
        if run.kill() {
            return;
        }
        std::fs::remove_dir_all(out).unwrap();
    }
    panic!("the run always ended before it was killed");
}

impl Running {
    /// Waits for an event that `wanted` takes.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, wanted: impl Fn(&Value) -> bool) {
        for line in self.lines.by_ref() {
            if wanted(&serde_json::from_str(&line.unwrap()).unwrap()) {
                return;
            }
        }
        panic!("the run ended without the event");
    }

    /// Shows `watch` all that is still to come, until the run ends.
    pub(crate) fn wait_for_end(mut self, mut watch: impl FnMut(&Value)) {
        for line in self.lines.by_ref() {
            watch(&serde_json::from_str(&line.unwrap()).unwrap());
        }
        self.child.wait().unwrap();
    }

    /// kill -9. Gives whether it was still running.
    pub(crate) fn kill(mut self) -> bool {
        self.child.kill().unwrap();
        !self.child.wait().unwrap().success()
    }

    /// Holds it where it is.
    pub(crate) fn pause(&self) {
        let status = Command::new("kill").args(["-STOP", &self.child.id().to_string()]).status();
        assert!(status.unwrap().success());
    }
}

/// Every file below `dir` with its bytes.
pub(crate) fn tree(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn add(root: &Path, dir: &Path, all: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            if path.is_dir() {
                all.insert(format!("{name}/"), Vec::new());
                add(root, &path, all);
            } else {
                all.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    let mut all = BTreeMap::new();
    if dir.exists() {
        add(dir, dir, &mut all);
    }
    all
}

/// Asserts that two output folders hold the same, but for the files that hold times.
#[track_caller]
pub(crate) fn assert_same(a: &Path, b: &Path) {
    let (a, b) = (tree(a), tree(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    assert!(a.contains_key("run.json") && a.contains_key("report.html"));
    for (name, bytes) in &a {
        let timed = ["run.json", "report.html"].contains(&name.as_str());
        assert!(timed || *bytes == b[name], "{name} differs");
    }
}

/// Writes the weights in `dir` again without checksums, as other programs do: what a test then changes in them
/// is for the checks behind.
pub(crate) fn without_checksums(dir: &Path) {
    for file in ["model.safetensors", "model.gpusq.safetensors"].map(|name| dir.join(name)) {
        if file.exists() {
            let read = Checkpoint::open_file(&file).unwrap();
            let tensors: Vec<_> = read.names().map(|n| (n.to_string(), read.raw(n).unwrap())).collect();
            write_safetensors(&file, &tensors, read.metadata()).unwrap();
        }
    }
}

/// Copies a folder.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for (name, bytes) in tree(from) {
        match name.strip_suffix('/') {
            Some(folder) => std::fs::create_dir_all(to.join(folder)).unwrap(),
            None => std::fs::write(to.join(name), bytes).unwrap(),
        }
    }
}

/// Asserts that the model folder `single` holds the model of `stage`, and nothing unfinished.
#[track_caller]
pub(crate) fn assert_same_stage(single: &Path, stage: &Path) {
    for name in ["model.safetensors", "gpusq.json", "curve.json", "config.json", "vocab.txt"] {
        assert!(
            std::fs::read(single.join(name)).unwrap() == std::fs::read(stage.join(name)).unwrap(),
            "{name}"
        );
    }
    let left: Vec<String> =
        tree(single).into_keys().filter(|n| n.starts_with('.') || n.contains("state")).collect();
    assert_eq!(left, [""; 0]);
}
