//! The command line: every command's flags, and what they mean, in one place.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use gpusq::arch::labels;
use gpusq::bench::SIZES;
use gpusq::config::{self, Config, Precision, SettingInfo};
use gpusq::forward::Compute;
use gpusq::hub;
use gpusq::model::{Model, Stage};
use gpusq::reproduce::{EXPERIMENTS, Experiment};
use gpusq::spec::Head;
use gpusq::task::{Dataset, HeadKind, Split, TASKS, Task, Tokenizer};
use gpusq::tensor::Device;
use gpusq::tensor::cuda::CudaError;
use gpusq::{Error, Result};

use crate::ranks::{COMMANDS, LAUNCHED};

/// The whole command line.
pub(crate) fn command() -> Command {
    let tasks: Vec<String> = TASKS.iter().map(|t| format!("  {:6} {}", t.name, t.about)).collect();
    let tasks = format!("Tasks:\n{}", tasks.join("\n"));
    let presets: Vec<String> = config::PRESETS.iter().map(|p| format!("  {:18} {}", p.name, p.doc)).collect();
    let footer = format!("{tasks}\n\nPresets:\n{}", presets.join("\n"));
    let variants = |e: &Experiment| {
        let labels: Vec<String> = e.variants.iter().map(|v| format!("           {}", v.label)).collect();
        format!("  {:8} {}:\n{}", e.name, e.about, labels.join("\n"))
    };
    let experiments: Vec<String> = EXPERIMENTS.iter().map(variants).collect();
    let experiments = format!(
        "Experiments, with what each compresses, once with every seed:\n{}\n\n{REPRODUCE_WRITES}\n\n{footer}",
        experiments.join("\n")
    );
    Command::new("gpusq")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Compress transformer language models to 2:4 sparse INT8 (GPUSQ-TLM) and run the result")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .after_help("Start with `gpusq demo`: it needs no files and takes a few minutes.")
        .subcommand(
            training("finetune", "Train a dense model on a task (no compression)")
                .after_help(footer.clone()),
        )
        .subcommand(
            training("compress", "Prune, quantise and pack a fine-tuned model, with a report")
                .arg(no_distill())
                .arg(attention())
                .after_help(footer.clone()),
        )
        .subcommand(
            training("prune", "First stage alone: 2:4 weights, trained under the dense model")
                .arg(no_distill())
                .after_help(footer.clone()),
        )
        .subcommand(
            training("quantize", "Second stage alone: INT8, trained under the pruned model")
                .arg(no_distill())
                .after_help(footer),
        )
        .subcommand(
            Command::new("eval")
                .about("Score a model of any stage; packed ones run in the engine")
                .args([model(), task().required(false), data(), split(), device(), json()])
                .arg(max_length())
                .arg(batch_size())
                .after_help(tasks),
        )
        .subcommand(
            Command::new("inspect")
                .about("Say what a checkpoint is, what would be compressed, its sizes and whether it is sound")
                .arg(Arg::new("model").value_name("DIR").required(true).help("Model folder of any stage, or a hub name"))
                .arg(Arg::new("plan").long("plan").action(ArgAction::SetTrue).help("Say instead which kernels a GPU runs a packed model with, and what they and others take"))
                .args([batches("1,8,32").requires("plan"), lengths().requires("plan"), device().requires("plan")])
                .arg(json()),
        )
        .subcommand(
            Command::new("run")
                .about("Text in, what a packed model says about it out: labels, answers or embeddings, a JSON line each")
                .args([model(), device(), json()])
                .arg(Arg::new("input").long("input").short('i').value_name("FILE").default_value("-").help("Lines to read; - is standard input"))
                .arg(max_length())
                .arg(batch_size())
                .after_help(RUN_READS),
        )
        .subcommand(
            Command::new("bench")
                .about("Time a packed model, or random weights of a known size, beside what it is compared to")
                .args([model().required_unless_present("spec").required(false).conflicts_with("spec"), device(), json()])
                .arg(Arg::new("spec").long("spec").value_name("SIZE").help(sizes()))
                .args([batches("1,8,32,128"), lengths()])
                .arg(Arg::new("repeats").long("repeats").value_name("N").value_parser(value_parser!(u16).range(1..)).default_value("50").help("Timed runs of each"))
                .args([
                    task().required(false).requires("data").help("Time batches of this task's texts instead, as they are and padded to each length (names: gpusq eval --help)"),
                    data().required(false).requires("task"),
                    split().requires("task"),
                    Arg::new("tokenizer").long("tokenizer").value_name("DIR").requires("task").help("Folder with the tokenizer for the texts (default: the model's)"),
                ])
                .arg(out().help("Folder for bench.json and report.html"))
                .arg(Arg::new("first-answer").long("first-answer").action(ArgAction::SetTrue).hide(true))
                .after_help(BENCH_TIMES),
        )
        .subcommand(
            training("reproduce", "An accuracy table or plot of the paper, from runs with several seeds")
                .after_help(experiments),
        )
        .subcommand(
            Command::new("launch")
                .about("Train on several GPUs of this host: a training command as one process for each")
                .arg(Arg::new("gpus").long("gpus").value_name("N").required(true).value_parser(value_parser!(u16).range(1..=64)).help("GPUs to use, numbers 0 to N-1 (with --device cpu in COMMAND: processes)"))
                .arg(Arg::new("command").value_name("COMMAND").required(true).num_args(1..).trailing_var_arg(true).allow_hyphen_values(true).value_parser(value_parser!(OsString)).help("finetune, prune, quantize or compress, with its arguments"))
                .after_help(LAUNCH),
        )
        .subcommand(
            Command::new("demo")
                .about("Train, compress and score a small model on generated text; needs no files and no network")
                .arg(out().required(false).default_value("gpusq-demo").help("Folder to write; must be empty or not exist"))
                .arg(seed())
                .arg(device())
                .arg(precision())
                .arg(json()),
        )
}

/// What was asked for.
///
/// # Errors
/// What the command line has wrong, also in the command that `gpusq launch` is to start: once, rather than by each of
/// its processes.
pub(crate) fn parse(line: &[OsString]) -> std::result::Result<ArgMatches, clap::Error> {
    let matches = command().try_get_matches_from(line).map_err(|e| advised(e, line.get(1)))?;
    if let Some(("launch", m)) = matches.subcommand() {
        let words: Vec<&OsString> = m.get_many("command").expect("required").collect();
        if COMMANDS.iter().any(|c| words[0] == *c) {
            let inner = line[..1].iter().chain(words.iter().copied());
            command().try_get_matches_from(inner).map_err(|e| advised(e, words.first().copied()))?;
        }
    }
    Ok(matches)
}

/// An error about an unknown flag of a command, with the settings that may be meant: a setting of several tables is
/// known by none of its short names, and what is like a flag may be without effect on the command.
fn advised(mut e: clap::Error, command: Option<&OsString>) -> clap::Error {
    let Some(command) = command.and_then(|c| c.to_str()).filter(|_| e.kind() == ErrorKind::UnknownArgument)
    else {
        return e;
    };
    let said = |kind| match e.get(kind) {
        Some(ContextValue::String(flag)) => Some(flag.trim_start_matches('-').replace('-', "_")),
        _ => None,
    };
    let all = config::settings();
    let like = said(ContextKind::SuggestedArg);
    if all.iter().any(|s| like.as_deref() == Some(&s.name()) && reads(command, s)) {
        return e;
    }
    let with_key_of = |name: String| {
        let key = name.rsplit('.').next().unwrap_or_default();
        let found = all.iter().filter(|s| s.key == key && !s.table.is_empty() && reads(command, s));
        found.map(|s| format!("--{}", s.name().replace('_', "-"))).collect::<Vec<_>>()
    };
    let names = [said(ContextKind::InvalidArg), like.filter(|name| name.contains('.'))];
    if let Some(meant) = names.into_iter().flatten().map(with_key_of).find(|found| !found.is_empty()) {
        e.insert(ContextKind::SuggestedArg, ContextValue::Strings(meant));
    }
    e
}

/// What `gpusq bench` times, for its help.
const BENCH_TIMES: &str = "\
On a GPU a run is one launch of the batch's CUDA graph: tokens to the GPU, every layer, outputs back; runs follow each
other without a pause. Timed are the same weights dense in f16 (by cuBLASLt), dense in INT8, and 2:4 in INT8 with dense
and with sparse attention. Nothing is padded. On a CPU it is the last two.

With --task, batches of its texts are timed in 2:4 INT8, drawn at random (the same each time), beside batches of as many
texts of the full length, which is what padding would cost.

Last comes what a program takes from its start to its first answer; on a GPU cold, where nothing but the kernels is in the
cache and the plan is measured first, and warm, where the plan is there too. The folder was read before.";

/// The sizes of `gpusq bench --spec`, for its help.
fn sizes() -> String {
    let all: Vec<String> = SIZES.iter().map(|s| format!("{} ({})", s.name, s.doc)).collect();
    format!("Random weights of a size: {}", all.join(", "))
}

/// What `gpusq run` reads and writes, for its help.
const RUN_READS: &str = "\
A line is plain text, or a JSON object: {\"text\": ...}, {\"text\": ..., \"text_pair\": ...}, or for a model that
answers questions {\"question\": ..., \"context\": ...}; an \"id\" comes back with the answer. A model that was trained on
pairs of texts takes pairs alone, and one that was trained on single texts takes these. Each line that is not empty
gives one JSON line, in their order: \"label\" with \"probabilities\", \"value\" of a regression, \"answer\" with
\"start\" and \"end\" in characters of the context, or, of a model without a head, the \"embedding\": the mean of the
hidden states, of length 1; \"tokens_dropped\" says that a text or question is longer than the model takes, and by how
much. Lines are read ahead and batched by length; those that have come are answered at once. A line that cannot be read
ends the run, after the answers to those before it.";

/// How else processes are started, for the help of `gpusq launch`.
const LAUNCH: &str = "\
Example: gpusq launch --gpus 2 compress --model bert --task mrpc --data glue/MRPC --out small

batch_size stays the number of examples for one step of all GPUs together; each takes its part. Losses and results are
those of one GPU, but for rounding. A process that fails ends all, and --resume goes on from the last checkpoint, on
any number of GPUs.

With --pipeline-parallel-size N in COMMAND each GPU has a part of the model's blocks instead, teacher and student, and
the batch goes through them in parts of micro_batch_size, forward and back in turn (1F1B): for models whose training
does not fit one GPU. The model itself must fit, to be calibrated and scored. It takes all N GPUs, and models with one
stack of blocks. Results are those of one GPU with the same micro_batch_size, but for rounding.
Example: gpusq launch --gpus 2 compress --pipeline-parallel-size 2 --model bert --task mrpc --data glue/MRPC --out small

On several hosts, start the training command itself once for each GPU, by SLURM, MPI, Kubernetes or torchrun's
`--no-python`, with these variables: RANK (0 to WORLD_SIZE-1), LOCAL_RANK (the GPU of the host), WORLD_SIZE (processes
in all), MASTER_ADDR and MASTER_PORT (host of rank 0 and a free port there). Rank 0 alone writes to --out; model and data
must be readable by all, and the network between them is trusted. GPUSQ_JOIN_TIMEOUT is how many seconds processes
wait for each other at the start (300).";

/// What `gpusq reproduce` leaves, for its help.
const REPRODUCE_WRITES: &str = "\
A model whose head is not trained for the task is fine-tuned first, with each seed ([train]); a trained one is
taken as it is. OUT/report.html has the table and a plot, table.md the table, reproduce.json every single score;
each run has its own report in OUT/seedN/NAME. The table compares each model with the dense one of the same seed,
and says whether its mean is below that by more than the spread, the sample standard deviation over the seeds.
With --resume finished runs are not repeated, and --seeds may name more.";

/// The table whose settings a command takes without the table's name too.
fn own_table(command: &str) -> Option<&'static str> {
    match command {
        "finetune" => Some("train"),
        "prune" => Some("prune"),
        "quantize" => Some("quantize"),
        _ => None,
    }
}

/// Whether a setting has an effect on a training command.
fn reads(command: &str, s: &SettingInfo) -> bool {
    match (command, s.table) {
        (_, "" | "data") | ("reproduce", _) => true,
        ("compress", "prune" | "quantize") | ("compress" | "prune" | "quantize", "distill") => true,
        // Criteria that look at inputs are given the examples of calibration.
        ("prune", "quantize") => s.key == "calibration_examples",
        (_, table) => own_table(command) == Some(table),
    }
}

/// A training command.
fn training(name: &'static str, about: &'static str) -> Command {
    let command = Command::new(name).about(about);
    let command = match name {
        "reproduce" => command.args([experiment(), seeds(), keep_models()]),
        "finetune" => command.args([seed(), pipeline()]),
        _ => command.args([seed(), pipeline(), teacher_cache().conflicts_with("pipeline")]),
    };
    let mut c = command.args([
        model(),
        task(),
        data(),
        out().required(true),
        Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(value_parser!(PathBuf))
            .help("Settings (TOML); flags override it"),
        Arg::new("preset")
            .long("preset")
            .value_name("NAME")
            .help("Named settings that the file and flags override"),
        device(),
        precision(),
        Arg::new("resume").long("resume").action(ArgAction::SetTrue).help(
            "Continue the interrupted run in --out, with the same command; starts one if there is none",
        ),
        json(),
    ]);
    for s in config::settings() {
        if s.table.is_empty() {
            continue;
        }
        let full = s.name().replace('_', "-");
        let help = format!("{} [default: {}]", s.doc, s.default);
        let mut arg = Arg::new(s.name());
        arg = match own_table(name) == Some(s.table) {
            true => arg.long(s.key.replace('_', "-")).alias(full),
            false => arg.long(full),
        };
        c = c.arg(
            arg.value_name("VALUE")
                .help(help)
                .help_heading("Settings (also keys of the file)")
                .hide_short_help(true)
                // One without effect is there to be refused by name, rather than as a word nobody knows.
                .hide(!reads(name, &s))
                .allow_hyphen_values(true),
        );
    }
    c
}

fn model() -> Arg {
    Arg::new("model").long("model").short('m').value_name("DIR").required(true).help(
        "Model folder (config.json, model.safetensors, tokenizer), or a hub name such as bert-base-uncased",
    )
}

fn task() -> Arg {
    Arg::new("task")
        .long("task")
        .short('t')
        .value_name("TASK")
        .required(true)
        .help("What to train and score on (list below)")
}

fn data() -> Arg {
    Arg::new("data")
        .long("data")
        .short('d')
        .value_name("DIR")
        .required(true)
        .value_parser(value_parser!(PathBuf))
        .help("Folder with the task's files (train.tsv and dev.tsv, or SQuAD's JSON)")
}

fn split() -> Arg {
    Arg::new("split").long("split").value_name("SPLIT").default_value("dev").help("train or dev")
}

fn out() -> Arg {
    Arg::new("out")
        .long("out")
        .short('o')
        .value_name("DIR")
        .value_parser(value_parser!(PathBuf))
        .help("Folder to write; must be empty or not exist, except with --resume")
}

fn seed() -> Arg {
    Arg::new("seed")
        .long("seed")
        .value_name("N")
        .allow_hyphen_values(true)
        .help("Seed of everything random [default: 42]")
}

fn device() -> Arg {
    Arg::new("device")
        .long("device")
        .value_name("DEVICE")
        .default_value("auto")
        .help("Where models are trained and run: cpu, cuda, cuda:1, or auto, a GPU if there is one")
}

fn pipeline() -> Arg {
    Arg::new("pipeline")
        .long("pipeline-parallel-size")
        .value_name("P")
        .value_parser(value_parser!(u16).range(1..=64))
        .default_value("1")
        .help("Split the model's blocks over this many processes, all there are (see `gpusq launch`), for models that do not fit one GPU; 1: each has the whole model")
}

fn teacher_cache() -> Arg {
    Arg::new("teacher-cache")
        .long("teacher-cache")
        .value_name("DIR")
        .value_parser(value_parser!(PathBuf))
        .help("Keep the teacher's outputs in this folder and read them where a batch comes again: in later runs with the same seed, data, batch size and teacher, and with --prune.fixed-batches and --quantize.fixed-batches (of a command of one stage --fixed-batches) in later epochs; the same result")
}

fn batches(default: &'static str) -> Arg {
    Arg::new("batch").long("batch").value_name("N,N,...").default_value(default).help("Sequences at a time")
}

fn lengths() -> Arg {
    Arg::new("length")
        .long("length")
        .value_name("N,N,...")
        .default_value("128,384")
        .help("Tokens of each sequence")
}

fn max_length() -> Arg {
    Arg::new("max-length")
        .long("max-length")
        .visible_alias("data.max-length")
        .value_name("TOKENS")
        .value_parser(value_parser!(usize))
        .help("Longest input (default: as the model was trained, or the task's own)")
}

fn batch_size() -> Arg {
    Arg::new("batch-size")
        .long("batch-size")
        .value_name("N")
        .value_parser(value_parser!(u16).range(1..))
        .default_value("32")
        .help("Examples at a time")
}

fn experiment() -> Arg {
    Arg::new("experiment").value_name("EXPERIMENT").required(true).help("Which (list below)")
}

fn seeds() -> Arg {
    Arg::new("seeds")
        .long("seeds")
        .value_name("N,N,...")
        .default_value("1,2,3")
        .help("Seeds that everything is repeated with")
}

fn keep_models() -> Arg {
    Arg::new("keep-models")
        .long("keep-models")
        .action(ArgAction::SetTrue)
        .help("Keep the compressed models of finished runs too, not only their reports")
}

fn precision() -> Arg {
    Arg::new("precision").long("precision").value_name("PRECISION").help(
        "f32, tf32 (GPUs; f32 with linear maps in TF32), bf16 (GPUs; weights, sums and optimiser stay f32) or auto: bf16 \
         on a GPU, f32 on a CPU [default: auto]",
    )
}

fn json() -> Arg {
    Arg::new("json")
        .long("json")
        .action(ArgAction::SetTrue)
        .help("One JSON object per line on standard output")
}

fn no_distill() -> Arg {
    Arg::new("no-distill")
        .long("no-distill")
        .action(ArgAction::SetTrue)
        .help("Labels only, without a teacher (for comparison)")
}

fn attention() -> Arg {
    Arg::new("attention")
        .long("attention")
        .value_name("KEEP:OF")
        .help("Sparse attention too (GEMM-MHA), such as 2:4; short for --prune.attention")
}

/// The settings that the flags, file and preset of a training command give. A file may hold settings for
/// other commands; a flag may not.
pub(crate) fn settings(command: &str, m: &ArgMatches) -> Result<Config> {
    let mut overrides = Vec::new();
    for s in config::settings() {
        if let Some(v) = m.try_get_one::<String>(&s.name()).ok().flatten() {
            if !reads(command, &s) {
                let others =
                    ["finetune", "prune", "quantize", "compress"].into_iter().filter(|c| reads(c, &s));
                let others: Vec<String> = others.map(|c| format!("`gpusq {c}`")).collect();
                return Err(Error::Config(format!(
                    "--{} has no effect on `gpusq {command}`; it is a setting of {}",
                    s.name().replace('_', "-"),
                    others.join(", ")
                )));
            }
            overrides.push((s.name(), v.clone()));
        }
    }
    if m.try_get_one::<bool>("no-distill").ok().flatten() == Some(&true) {
        overrides.push(("distill.enabled".into(), "false".into()));
    }
    if let Some(v) = m.try_get_one::<String>("attention").ok().flatten() {
        overrides.push(("prune.attention".into(), v.clone()));
    }
    for name in ["seed", "precision"] {
        if let Some(v) = m.try_get_one::<String>(name).ok().flatten() {
            overrides.push((name.into(), v.clone()));
        }
    }
    let file = m.get_one::<PathBuf>("config").map(PathBuf::as_path);
    Config::load(file, m.get_one::<String>("preset").map(String::as_str), &overrides)
}

/// The numbers of `--seeds`.
pub(crate) fn chosen_seeds(m: &ArgMatches) -> Result<Vec<u64>> {
    let text = m.get_one::<String>("seeds").expect("has a default");
    let mut seeds = Vec::new();
    for word in text.split(',') {
        // One that the settings of a run can hold.
        let seed = word.trim().parse().ok().filter(|n| i64::try_from(*n).is_ok());
        let wrong = |what: String| {
            Error::Config(format!(
                "--seeds {text}: {what}; give whole numbers with commas between, as in 1,2,3"
            ))
        };
        let seed: u64 = seed.ok_or_else(|| wrong(format!("`{word}` is no seed")))?;
        if seeds.contains(&seed) {
            return Err(wrong(format!("{seed} is there twice")));
        }
        seeds.push(seed);
    }
    Ok(seeds)
}

/// Whole numbers from 1 on, with commas between.
pub(crate) fn numbers(m: &ArgMatches, name: &str) -> Result<Vec<usize>> {
    let text = m.get_one::<String>(name).expect("has a default");
    let number = |word: &str| word.trim().parse().ok().filter(|n| (1..=1 << 16).contains(n));
    let all: Option<Vec<usize>> = text.split(',').map(number).collect();
    all.ok_or_else(|| {
        Error::Config(format!(
            "--{name} {text}: give whole numbers from 1 to 65536 with commas between, as in 1,8,32"
        ))
    })
}

/// Refuses flags for what `experiment` sets itself. A file may hold such settings, as for other commands.
pub(crate) fn refuse_settings_of(experiment: &Experiment, m: &ArgMatches) -> Result<()> {
    let given = |name: &str| m.try_get_one::<String>(name).ok().flatten().is_some();
    match config::settings().iter().map(SettingInfo::name).find(|name| experiment.sets(name) && given(name)) {
        None => Ok(()),
        Some(name) => Err(Error::Config(format!(
            "--{} has no effect on `gpusq reproduce {}`, which sets it itself for each of its runs; leave it out",
            name.replace('_', "-"),
            experiment.name
        ))),
    }
}

/// The folder of `--model`, downloaded if it is a hub name.
pub(crate) fn model_dir(m: &ArgMatches) -> Result<PathBuf> {
    hub::resolve(m.get_one::<String>("model").expect("required"))
}

/// `precision` on the device of `--device`, and why that is the CPU where a GPU was looked for.
/// Of several processes on a host, `local` is the number of this one.
pub(crate) fn compute(
    m: &ArgMatches,
    precision: Precision,
    local: Option<usize>,
) -> Result<(Compute, Option<String>)> {
    let (device, why) = match (local, m.get_one::<String>("device").expect("has a default").as_str()) {
        (None, _) | (_, "cpu") => device_of(m)?,
        (Some(local), name @ ("auto" | "cuda")) => match Device::named(&format!("cuda:{local}")) {
            Ok((device, _)) => (device, None),
            // `gpusq launch` is asked for GPUs by number.
            Err(e) if name == "auto" && std::env::var_os(LAUNCHED).is_some() => {
                return Err(Error::Config(format!(
                    "{e}; to train with several processes on the CPU, add --device cpu"
                )));
            }
            // Where there are GPUs, one too few of them is a mistake.
            Err(_) if name == "auto" && Device::named("auto").is_ok_and(|(d, _)| d == Device::Cpu) => {
                device_of(m)?
            }
            Err(e) => return Err(Error::Device(e)),
        },
        (Some(_), name) => {
            return Err(Error::Config(format!(
                "--device {name} is one GPU for several processes; use --device cuda, and each takes the GPU of its \
                 LOCAL_RANK"
            )));
        }
    };
    Ok((Compute::new(device, precision)?, why))
}

/// The device of `--device`, and why that is the CPU where a GPU was looked for.
pub(crate) fn device_of(m: &ArgMatches) -> Result<(Device, Option<String>)> {
    let (device, why) =
        Device::named(m.get_one::<String>("device").expect("has a default")).map_err(|e| match e {
            CudaError::Name(_) => Error::Config(e.to_string()),
            e => Error::Device(e),
        })?;
    Ok((device, why.map(|e| format!("no GPU is used: {e}"))))
}

/// A model's folder, tokenizer and weights.
pub(crate) fn load_model(dir: &Path) -> Result<(Model, Tokenizer)> {
    let model = Model::load(dir)?;
    let tokenizer = Tokenizer::load(dir)?;
    Ok((model, tokenizer))
}

/// Refuses a model that the engine does not run, and says where there is one that it does.
pub(crate) fn need_packed(model: &Model, dir: &Path, command: &str) -> Result<()> {
    let remedy = match model.stage {
        Stage::PackedF16 | Stage::PackedInt8 => return Ok(()),
        Stage::Dense => "run `gpusq compress` on it and give the folder packed in its output",
        Stage::Pruned => "run `gpusq quantize` on it and give the folder packed in its output",
        Stage::Quantized => "give the folder packed that the same command wrote, in this one or beside it",
    };
    let (dir, stage) = (dir.display(), model.stage.title());
    Err(Error::Mismatch(format!("{dir} is {stage}, and `gpusq {command}` needs a packed model; {remedy}")))
}

/// Refuses a model whose head was never trained, or for something else than `task`: tasks with as many classes
/// have the same head.
pub(crate) fn need_trained_head(model: &Model, dir: &Path, task: &Task) -> Result<()> {
    let fits = match (&model.spec.head, task.head) {
        (Head::Classify { outputs, .. }, HeadKind::Classes(n)) => *outputs == n,
        (Head::Classify { outputs, .. }, HeadKind::Value) => *outputs == 1,
        (Head::Span, HeadKind::Span) => true,
        _ => false,
    };
    if let Some(other) = model.task.as_deref().filter(|t| *t != task.name) {
        return Err(Error::Mismatch(format!(
            "{} was trained on {other} and has no trained head for {}; use --task {other} with its data, or run \
             `gpusq finetune` on it for {} first",
            dir.display(),
            task.name,
            task.name
        )));
    }
    if fits && model.fresh.is_empty() {
        return check_labels(model, dir, task);
    }
    Err(Error::Mismatch(format!(
        "{} has no trained head for {}; run `gpusq finetune` on it first and use its output",
        dir.display(),
        task.name
    )))
}

/// Refuses a classifier that has the task's labels in another order than the task's data.
fn check_labels(model: &Model, dir: &Path, task: &Task) -> Result<()> {
    let plain = |s: &str| s.to_lowercase().replace([' ', '-'], "_");
    let theirs: Vec<String> = labels(&model.config).iter().map(|l| plain(l)).collect();
    let ours: Vec<String> = task.labels.iter().map(|l| plain(l)).collect();
    let same_names = theirs.len() == ours.len() && ours.iter().all(|l| theirs.contains(l));
    if !same_names || theirs == ours {
        return Ok(());
    }
    Err(Error::Mismatch(format!(
        "{} has its outputs in the order {}, and {} needs {}; reorder the classifier's rows and id2label, or run \
         `gpusq finetune` on it",
        dir.join("config.json").display(),
        theirs.join(", "),
        task.name,
        ours.join(", ")
    )))
}

/// Reads a split of the task, at the length that is set, else the one the model was trained on the task with,
/// else the task's own, as far as the model allows.
pub(crate) fn load_data(
    task: &'static Task,
    dir: &Path,
    split: Split,
    tokenizer: &Tokenizer,
    max_length: Option<usize>,
    model: &Model,
) -> Result<Dataset> {
    let limit = model.spec.max_length();
    let trained = model.max_length.filter(|_| model.task.as_deref() == Some(task.name));
    task.load(dir, split, tokenizer, max_length.or(trained).unwrap_or(task.max_len).min(limit))
}

/// Refuses a length that is set and that the model does not take. `settings` are those that `m` gives.
pub(crate) fn check_length(m: &ArgMatches, settings: &Config, model: &Model) -> Result<()> {
    let limit = model.spec.max_length();
    let Some(asked) = settings.data.max_length.filter(|n| *n > limit) else { return Ok(()) };
    let preset = m.get_one::<String>("preset").map(String::as_str);
    let of_preset = Config::load(None, preset, &[])?.data.max_length == Some(asked);
    let flag = m.get_one::<String>("data.max_length").is_some();
    Err(Error::Mismatch(match preset.filter(|_| of_preset && !flag) {
        Some(name) => format!(
            "the preset `{name}` is for models that take {asked} tokens and this one takes {limit}; add \
             --data.max-length {limit}"
        ),
        None => {
            format!(
                "data.max_length is {asked} and the model takes {limit} tokens; set it to at most {limit}"
            )
        }
    }))
}

/// The command line as it was typed, quoted for a shell.
pub(crate) fn typed() -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    let quote = |a: String| match !a.is_empty() && a.chars().all(plain) {
        true => a,
        false => format!("'{}'", a.replace('\'', "'\\''")),
    };
    let mut words: Vec<String> =
        std::env::args_os().map(|a| quote(a.to_string_lossy().into_owned())).collect();
    if let Some(program) = words.first_mut() {
        *program = "gpusq".into();
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use gpusq::arch::Config as ModelConfig;
    use gpusq::task::task;

    use super::*;

    /// What is said of a classifier whose configuration names its outputs so.
    fn checked(name: &str, labels: &[&str]) -> Result<()> {
        let text = r#"{"model_type": "bert", "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 1, "intermediate_size": 4, "max_position_embeddings": 4, "type_vocab_size": 2}"#;
        let mut model = Model::random(ModelConfig::parse(Path::new("config.json"), text)?, 1)?;
        model.set_labels(labels);
        check_labels(&model, Path::new("m"), task(name)?)
    }

    #[test]
    fn labels_in_the_tasks_order_are_taken_however_they_are_written() {
        for labels in [
            ["not_equivalent", "equivalent"],
            ["NOT EQUIVALENT", "Equivalent"],
            ["Not-Equivalent", "EQUIVALENT"],
            // Names that say nothing.
            ["LABEL_0", "LABEL_1"],
        ] {
            checked("mrpc", &labels).unwrap();
        }
        checked("mrpc", &[]).unwrap();
    }

    #[test]
    fn labels_in_another_order_are_refused() {
        let message = |name, labels: &[&str]| checked(name, labels).unwrap_err().to_string();
        let error = message("mnli", &["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]);
        assert!(error.starts_with(&Path::new("m").join("config.json").display().to_string()), "{error}");
        for part in ["contradiction, neutral, entailment", "mnli needs entailment, neutral, contradiction"] {
            assert!(error.contains(part), "{error}");
        }
        for other in ["not_equivalent", "Not-Equivalent", "NOT EQUIVALENT"] {
            assert!(message("mrpc", &["Equivalent", other]).contains("order equivalent, not_equivalent"));
        }
    }
}
