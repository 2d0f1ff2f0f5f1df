//! Named starting points: the paper's hyper-parameters, a quick trial, and what a small model kept its score with.

/// A named set of settings that differ from the defaults.
pub struct Preset {
    /// What `--preset` takes.
    pub name: &'static str,
    /// For which model, task and machine.
    pub doc: &'static str,
    /// The settings, as in a configuration file.
    pub toml: &'static str,
}

/// Three stages with the same optimiser settings, as the paper's table 6 gives one row for all of a
/// model's training. Its batch sizes are per GPU; `batch_size` counts the examples of a step over all
/// GPUs, so it is their product. The table says "linear with warm-up" but not how long: a tenth of the
/// steps is the usual choice, and not the paper's word. Its "Adam" is taken with decoupled weight decay, as
/// BERT is trained.
macro_rules! table_6 {
    ($name:literal, $for:literal, length $length:literal, rate $rate:literal, epochs $epochs:literal,
     batch $batch:literal = $per_gpu:literal x $gpus:literal) => {
        Preset {
            name: $name,
            doc: concat!($for, " (paper, table 6: batch ", $per_gpu, " on each of ", $gpus, " GPUs)"),
            toml: concat!(
                "[data]\nmax_length = ",
                $length,
                "\n",
                table_6!(stage "train", $rate, $epochs, $batch),
                table_6!(stage "prune", $rate, $epochs, $batch),
                table_6!(stage "quantize", $rate, $epochs, $batch),
            ),
        }
    };
    (stage $stage:literal, $rate:literal, $epochs:literal, $batch:literal) => {
        concat!(
            "[",
            $stage,
            "]\nlearning_rate = ",
            $rate,
            "\nepochs = ",
            $epochs,
            "\nbatch_size = ",
            $batch,
            "\nschedule = \"linear\"\nwarmup = 0.1\nweight_decay = 0.01\n"
        )
    };
}

/// All presets.
#[rustfmt::skip]
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "quick",
        doc: "a first try on a CPU with a model of MiniLM's size and short texts: minutes, not the best score",
        toml: "\
[data]
max_length = 64
[train]
learning_rate = 5e-5
epochs = 2
batch_size = 32
checkpoint_every = 200
[prune]
learning_rate = 5e-5
epochs = 2
batch_size = 32
checkpoint_every = 200
[quantize]
learning_rate = 2e-5
epochs = 1
batch_size = 32
checkpoint_every = 200
calibration_examples = 128
",
    },
    // Measured in results/2026-11-27-h200-minilm.
    Preset {
        name: "minilm-squad",
        doc: "a model of MiniLM's size on 10,000 questions of SQuAD 1.1, trained long and with a large feature loss",
        toml: "\
[data]
max_length = 384
[train]
learning_rate = 1e-4
epochs = 20
[prune]
learning_rate = 2e-4
epochs = 24
[quantize]
learning_rate = 2e-4
epochs = 10
[distill]
gamma = 30.0
attention_features = true
",
    },
    table_6!("bert-base-squad", "BERT-base on SQuAD 1.1", length 384, rate "3.0e-5", epochs 4, batch 24 = 3 x 8),
    table_6!("bert-base-glue", "BERT-base on GLUE", length 128, rate "2.4e-5", epochs 6, batch 128 = 16 x 8),
    table_6!("bert-large-squad", "BERT-large on SQuAD 1.1", length 384, rate "3.0e-5", epochs 4, batch 24 = 3 x 8),
    table_6!("bert-large-glue", "BERT-large on GLUE", length 128, rate "2.4e-5", epochs 6, batch 128 = 16 x 8),
    table_6!("opt-125m-wikitext", "OPT-125M on WikiText-103; no command runs it yet", length 2048, rate "6.0e-4", epochs 15, batch 512 = 16 x 32),
    table_6!("opt-1.3b-wikitext", "OPT-1.3B on WikiText-103; no command runs it yet", length 2048, rate "2.0e-4", epochs 15, batch 1024 = 16 x 64),
    table_6!("opt-2.7b-wikitext", "OPT-2.7B on WikiText-103; no command runs it yet", length 2048, rate "1.6e-4", epochs 15, batch 1024 = 16 x 64),
    table_6!("opt-6.7b-wikitext", "OPT-6.7B on WikiText-103; no command runs it yet", length 2048, rate "1.2e-4", epochs 15, batch 2048 = 16 x 128),
    table_6!("opt-13b-wikitext", "OPT-13B on WikiText-103; no command runs it yet", length 2048, rate "1.0e-4", epochs 15, batch 4096 = 16 x 256),
    table_6!("gpt-125m-wikitext", "GPT-125M on WikiText-103; no command runs it yet", length 2048, rate "6.0e-4", epochs 15, batch 512 = 16 x 32),
    table_6!("gpt-1.3b-wikitext", "GPT-1.3B on WikiText-103; no command runs it yet", length 2048, rate "2.0e-4", epochs 15, batch 1024 = 16 x 64),
    table_6!("gpt-2.7b-wikitext", "GPT-2.7B on WikiText-103; no command runs it yet", length 2048, rate "1.6e-4", epochs 15, batch 1024 = 16 x 64),
    table_6!("gpt-6.7b-wikitext", "GPT-6.7B on WikiText-103; no command runs it yet", length 2048, rate "1.2e-4", epochs 15, batch 2048 = 16 x 128),
    table_6!("gpt-13b-wikitext", "GPT-13B on WikiText-103; no command runs it yet", length 2048, rate "1.0e-4", epochs 15, batch 4096 = 16 x 256),
    table_6!("bart-cnn-dm", "BART on CNN-DM; no command runs it yet", length 1024, rate "5.5e-5", epochs 3, batch 128 = 16 x 8),
    table_6!("bart-xsum", "BART on XSum; no command runs it yet", length 1024, rate "7.0e-5", epochs 3, batch 128 = 16 x 8),
];
