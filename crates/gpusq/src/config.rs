//! The configuration of a run: every setting with its help text, default and allowed range, read from a
//! preset, a TOML file and flags, in that order.
//!
//! The structs below are the one place where a setting is written down. Its doc comment is the help text
//! of the flag of the same name, and [`settings`] lists them all for a command line to be built from.

mod presets;
mod setting;

use std::ops::{Bound, Range as Span};
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Spanned, Table, Value};

pub use presets::{PRESETS, Preset};
use setting::{Range, Setting, choice, one_of};

use crate::sparsity::Pattern;
use crate::{Error, Result, textfile};

/// File of a run's settings in its output folder.
pub const CONFIG_FILE: &str = "gpusq.toml";

/// One setting of a table: where it lies in the struct and what may be put there.
struct Field<'a> {
    key: &'static str,
    doc: String,
    range: Range,
    slot: &'a mut dyn Setting,
}

/// A struct whose fields are settings (`name: type = default, range;`), with the shared optimiser settings
/// behind them if it has a `..fit`.
macro_rules! table {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[doc = $doc:literal])+ $field:ident: $type:ty = $default:expr $(, $range:expr)?;)*
            $(..$fit:ident = $start:expr)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name {
            $($(#[doc = $doc])+ pub $field: $type,)*
            $(
                /// How its optimiser runs; in a file these keys stand beside the table's own.
                pub $fit: Fit,
            )?
        }

        impl Default for $name {
            fn default() -> Self {
                $name { $($field: $default,)* $($fit: $start,)? }
            }
        }

        impl $name {
            fn fields(&mut self) -> Vec<Field<'_>> {
                #[allow(unused_mut)]
                let mut fields = vec![$(Field {
                    key: stringify!($field),
                    doc: [$($doc),+].map(str::trim).join(" "),
                    range: [$(Range::new($range),)? Range::ANY][0],
                    slot: &mut self.$field,
                }),*];
                $(fields.extend(self.$fit.fields());)?
                fields
            }
        }
    };
}

/// All numbers above `min`.
fn above(min: f64) -> (Bound<f64>, Bound<f64>) {
    (Bound::Excluded(min), Bound::Unbounded)
}

choice! {
    /// How the learning rate moves after the warm-up.
    pub enum Schedule {
        /// Falls in a straight line to 0 at the last step.
        Linear = "linear",
        /// Stays.
        Constant = "constant",
        /// Falls along half a cosine to 0 at the last step.
        Cosine = "cosine",
    }
}

choice! {
    /// What a model is trained and run in.
    pub enum Precision {
        /// bf16 on a GPU, f32 on a CPU.
        Auto = "auto",
        /// 32-bit floats throughout.
        F32 = "f32",
        /// 32-bit floats, but linear maps are trained with operands rounded to TF32 (10 bits of fraction), for tensor
        /// cores. On GPUs.
        Tf32 = "tf32",
        /// Activations and their products in bfloat16; weights, sums and the optimiser in f32. On GPUs.
        Bf16 = "bf16",
    }
}

choice! {
    /// How a step size is chosen from observed values.
    pub enum Method {
        /// The largest magnitude becomes code 127.
        Absmax = "absmax",
        /// A percentile of the magnitudes becomes code 127; what is larger is clipped.
        Percentile = "percentile",
        /// The step size with the least squared error, among 100 between 0.2 and 1 times absmax's.
        Mse = "mse",
    }
}

choice! {
    /// A linear layer of a transformer block, by its place.
    pub enum Site {
        /// Query projection.
        Q = "q",
        /// Key projection.
        K = "k",
        /// Value projection.
        V = "v",
        /// Attention output projection.
        AttnOut = "attn_out",
        /// First feed-forward projection, and the gate where there is one.
        FfnIn = "ffn_in",
        /// Second feed-forward projection.
        FfnOut = "ffn_out",
    }
}

/// `"all"`, `"none"`, a list, or names with commas between them.
impl Setting for Vec<Site> {
    fn set(&mut self, value: &Value, _: Range) -> bool {
        let names: Option<Vec<&str>> = match value {
            Value::String(text) if text == "none" => Some(vec![]),
            Value::String(text) if text == "all" => Some(Site::ALL.iter().map(|site| site.name()).collect()),
            Value::String(text) => Some(text.split(',').map(str::trim).collect()),
            Value::Array(items) => items.iter().map(Value::as_str).collect(),
            _ => None,
        };
        let sites: Option<Vec<Site>> = names.and_then(|names| names.into_iter().map(Site::named).collect());
        let Some(mut sites) = sites else { return false };
        sites.sort();
        sites.dedup();
        *self = sites;
        true
    }

    fn get(&self) -> Value {
        Value::Array(self.iter().map(Setting::get).collect())
    }

    fn allowed(&self, _: Range) -> String {
        let names: Vec<&str> = Site::ALL.iter().map(|site| site.name()).collect();
        format!("\"all\", \"none\" or a list of {}", one_of(&names))
    }
}

table! {
    /// How examples are cut to length.
    pub struct Data {
        /// Longest input in tokens; longer ones are cut, or split into windows where the task does that
        /// ("none": as the model was trained on the task, or the task's own, 128 for GLUE and 384 for SQuAD).
        max_length: Option<usize> = None, 8.0..=65536.0;
    }
}

table! {
    /// How an optimiser runs: AdamW with a schedule, for any of the stages.
    pub struct Fit {
        /// Passes over the training split.
        epochs: usize = 3, 1.0..=10_000.0;
        /// Optimiser steps after which to stop, wherever the epoch is ("none": as many as the epochs have).
        max_steps: Option<usize> = None, 1.0..=1e9;
        /// Examples for one optimiser step, over all devices together.
        batch_size: usize = 32, 1.0..=65536.0;
        /// Examples that a device computes at a time; the gradients of a larger batch are summed over several such
        /// steps (gradient accumulation), which takes less memory and trains the same ("none": all of its batch; of a
        /// pipeline as many as make two parts of the batch for each process).
        micro_batch_size: Option<usize> = None, 1.0..=65536.0;
        /// Largest learning rate, reached at the end of the warm-up.
        learning_rate: f64 = 3e-5, (Bound::Excluded(0.0), Bound::Included(1.0));
        /// Fraction of the steps during which the learning rate rises from 0.
        warmup: f64 = 0.1, 0.0..=1.0;
        /// How the learning rate moves after the warm-up: linear (falls to 0), constant or cosine.
        schedule: Schedule = Schedule::Linear;
        /// Decoupled weight decay of matrices; biases and norms are not decayed.
        weight_decay: f64 = 0.01, 0.0..=1.0;
        /// Decay of AdamW's running mean of the gradient.
        beta1: f64 = 0.9, 0.0..=0.99999;
        /// Decay of AdamW's running mean of the squared gradient.
        beta2: f64 = 0.999, 0.0..=0.99999;
        /// Added to the root of the second moment in AdamW's denominator.
        eps: f64 = 1e-8, 1e-20..=1.0;
        /// Gradients with a larger global l2 norm are scaled down to it ("none": never).
        max_grad_norm: Option<f64> = Some(1.0), above(0.0);
        /// Probability that dropout zeroes an element ("none": as the model's config.json says).
        dropout: Option<f64> = None, 0.0..=0.95;
        /// Whether a step keeps only each block's input and computes the block again for the backward pass: less memory,
        /// about a third more time, the same result.
        gradient_checkpointing: bool = false;
        /// Whether every epoch has the batches of the first, in another order, and not new ones: what --teacher-cache keeps
        /// in the first epoch serves the others then.
        fixed_batches: bool = false;
        /// Steps between checkpoints that --resume continues from (0: none before the stage ends).
        checkpoint_every: usize = 500, 0.0..=1e9;
        /// Steps between two points of the recorded loss curve.
        log_every: usize = 10, 1.0..=1e6;
    }
}

impl Fit {
    /// Of `examples` or more, how many each of `devices` computes at a time, and whether it does so several times for
    /// a batch. Each has the whole model, or `pipeline` of them have it together.
    pub fn at_a_time(&self, examples: usize, devices: usize, pipeline: usize) -> (usize, bool) {
        let own = self.batch_size.min(examples).max(1).div_ceil(devices / pipeline);
        let most = self.micro_batch(own, pipeline);
        (most, most < own)
    }

    /// Of `own` examples, how many a device computes at a time, one of `pipeline` that the model is split over. More
    /// parts wait less for the first and the last of them, and fill a GPU less: two for each of these were faster than four
    /// (`results/2026-11-26-h200x4-pipeline.txt`).
    pub fn micro_batch(&self, own: usize, pipeline: usize) -> usize {
        let most = if pipeline > 1 { own.div_ceil(2 * pipeline) } else { own };
        self.micro_batch_size.unwrap_or(most).min(own).max(1)
    }

    /// Defaults of the stages that compress. The teacher is not dropped out, and a student that is cannot follow it:
    /// dropout cost up to 3 points there (`results/`).
    fn of_compression() -> Fit {
        Fit { dropout: Some(0.0), ..Fit::default() }
    }
}

table! {
    /// Dense fine-tuning, before any compression.
    pub struct Train {
        ..fit = Fit::default()
    }
}

table! {
    /// The pruning stage: masks, then training what is left.
    pub struct Prune {
        /// By what the surviving weights are chosen: magnitude, or wanda, which also weighs the size of
        /// their inputs.
        criterion: &'static str = "magnitude";
        /// What survives of the attention probabilities, kept:of neighbouring keys ("none": everything, the
        /// paper's GEMM variant; a pattern gives its GEMM-MHA variant).
        attention: Option<Pattern> = None;
        /// Steps after which the masks are chosen anew by magnitude (0: never, the masks of the start stay).
        mask_update_every: usize = 0, 0.0..=1e9;
        /// Running loss at which the stage ends early, the paper's delta_prune ("none": runs all epochs).
        stop_loss: Option<f64> = None, above(0.0);
        ..fit = Fit::of_compression()
    }
}

table! {
    /// The quantisation stage: step sizes from calibration, then training weights and step sizes.
    pub struct Quantize {
        /// How the activations' step sizes are first chosen: absmax, percentile or mse.
        calibration: Method = Method::Percentile;
        /// Percent of the magnitudes that the percentile method does not clip.
        percentile: f64 = 99.99, (Bound::Excluded(50.0), Bound::Included(100.0));
        /// Training examples that activations are observed on.
        calibration_examples: usize = 512, 1.0..=1e6;
        /// How the weights' step sizes are first chosen, one for each output row: absmax, percentile or mse.
        weights: Method = Method::Mse;
        /// Linear layers whose output is quantised too, as in the paper's figure 2, except ffn_out: its outliers
        /// do not fit one step size for the whole tensor, and nothing that runs needs its codes.
        outputs: Vec<Site> = vec![Site::Q, Site::K, Site::V, Site::AttnOut, Site::FfnIn];
        /// Largest learning rate of the step sizes, on the same schedule; a step changes them by about this
        /// fraction.
        scale_learning_rate: f64 = 1e-3, 0.0..=1.0;
        /// Running loss at which the stage ends early, the paper's delta_calibrate ("none": runs all epochs).
        stop_loss: Option<f64> = None, above(0.0);
        ..fit = Fit::of_compression()
    }
}

table! {
    /// The loss of the pruning and quantisation stages: alpha * hard + beta * soft + gamma * feature (paper,
    /// equations 6 and 7).
    pub struct Distill {
        /// Whether a teacher is used; without one only the hard loss with labels is left.
        enabled: bool = true;
        /// Weight of the hard loss: cross-entropy with the labels.
        alpha: f64 = 1.0, 0.0..;
        /// Weight of the soft loss: KL divergence from the teacher's logits.
        beta: f64 = 10.0, 0.0..;
        /// Weight of the feature loss: mean squared error of block outputs and of the final projection.
        gamma: f64 = 1.0, 0.0..;
        /// Temperature that both models' logits are divided by in the soft loss.
        temperature: f64 = 2.0, 0.01..=1000.0;
        /// Whether the feature loss compares attention outputs too.
        attention_features: bool = false;
    }
}

macro_rules! seed_doc {
    () => {
        "Seed of everything random: order of examples, dropout, new heads."
    };
}

macro_rules! precision_doc {
    () => {
        "What models are trained in: f32, tf32 (on GPUs; f32 whose linear maps round operands to TF32), bf16 (on GPUs; weights, sums and the optimiser stay f32), or auto, bf16 on a GPU and f32 on a CPU; scores are taken in f32 in any case."
    };
}

impl Prune {
    /// Refuses settings that are each allowed and not together.
    pub(crate) fn check(&self) -> Result<()> {
        if self.mask_update_every > 0 && self.criterion != "magnitude" {
            return Err(Error::Config(format!(
                "prune.mask_update_every chooses masks by magnitude and prune.criterion is `{}`; set one of them to its default",
                self.criterion
            )));
        }
        Ok(())
    }
}

impl Distill {
    /// As [`Prune::check`].
    pub(crate) fn check(&self) -> Result<()> {
        if self.enabled && self.alpha == 0.0 && self.beta == 0.0 && self.gamma == 0.0 {
            let message = "distill.alpha, beta and gamma are all 0, which trains nothing; raise one of them";
            return Err(Error::Config(message.into()));
        }
        Ok(())
    }
}

/// Everything that decides a run apart from its model, task and data.
///
/// Serialises as the tables of a configuration file; reading back is as strict as [`Config::load`].
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    #[doc = seed_doc!()]
    pub seed: u64,
    #[doc = precision_doc!()]
    pub precision: Precision,
    /// `[data]`
    pub data: Data,
    /// `[train]`
    pub train: Train,
    /// `[prune]`
    pub prune: Prune,
    /// `[quantize]`
    pub quantize: Quantize,
    /// `[distill]`
    pub distill: Distill,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            seed: 42,
            precision: Precision::Auto,
            data: Data::default(),
            train: Train::default(),
            prune: Prune::default(),
            quantize: Quantize::default(),
            distill: Distill::default(),
        }
    }
}

/// A setting as a command line or a help page shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct SettingInfo {
    /// Table (empty for the top level).
    pub table: &'static str,
    /// Key in that table.
    pub key: &'static str,
    /// Help text.
    pub doc: String,
    /// What may be put there, to complete "must be ...".
    pub allowed: String,
    /// The default, as text that [`Config::set`] takes.
    pub default: String,
}

impl SettingInfo {
    /// `table.key`, what [`Config::set`] takes.
    pub fn name(&self) -> String {
        dotted(self.table, self.key)
    }
}

/// All settings, in the order of [`Config::to_toml`].
pub fn settings() -> Vec<SettingInfo> {
    let mut config = Config::default();
    let tables = config.tables().into_iter();
    let info = |table, field: Field<'_>| SettingInfo {
        table,
        key: field.key,
        allowed: field.slot.allowed(field.range),
        default: match field.slot.get() {
            Value::String(text) => text,
            other => written(&other),
        },
        doc: field.doc,
    };
    tables.flat_map(|(table, fields)| fields.into_iter().map(move |field| info(table, field))).collect()
}

impl Config {
    /// The settings of `preset`, over them those of the file `path`, over them `overrides`: pairs of a
    /// dotted key (`prune.epochs`; `-` is read as `_`) and a value without TOML's quotes.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::Line`] if it is not TOML, has an unknown key (the
    /// nearest known one and all valid ones are named), or a value of the wrong kind or out of range (both
    /// what was found and what is allowed are named); [`Error::Config`] for the same in `overrides` and for
    /// an unknown preset, and for settings that exclude each other.
    pub fn load(path: Option<&Path>, preset: Option<&str>, overrides: &[(String, String)]) -> Result<Self> {
        let mut config = Config::default();
        if let Some(name) = preset {
            let known = PRESETS.iter().find(|preset| preset.name == name).ok_or_else(|| {
                let names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
                let nearest = nearest(name, names.iter().map(|n| (n.to_string(), *n, 0)));
                let all = names.join(", ");
                Error::Config(format!("unknown preset `{name}`; did you mean `{nearest}`? Presets: {all}"))
            })?;
            config.apply(Path::new(known.name), known.toml)?;
        }
        if let Some(path) = path {
            config.apply(path, &textfile::text(path)?)?;
        }
        for (key, value) in overrides {
            config.set(key, value)?;
        }
        config.prune.check()?;
        config.distill.check()?;
        config.check_checkpointing()?;
        Ok(config)
    }

    /// Refuses features that would have to be kept, from blocks that keep nothing.
    pub(crate) fn check_checkpointing(&self) -> Result<()> {
        let d = &self.distill;
        for (table, fit) in [("prune", &self.prune.fit), ("quantize", &self.quantize.fit)] {
            if d.enabled && d.attention_features && fit.gradient_checkpointing {
                return Err(Error::Config(format!(
                    "distill.attention_features keeps what lies inside of blocks, and {table}.gradient_checkpointing keeps \
                     nothing there; set one of them to its default"
                )));
            }
        }
        Ok(())
    }

    /// Sets the setting with the dotted `key` from text such as a flag has: `set("prune.epochs", "3")`.
    ///
    /// # Errors
    /// [`Error::Config`] as [`Config::load`] says.
    pub fn set(&mut self, key: &str, text: &str) -> Result<()> {
        let key = key.replace('-', "_");
        let (table, key) = key.split_once('.').unwrap_or(("", &key));
        // A number, a list or a truth value as in TOML; anything else is text, without its quotes.
        let toml = format!("value = {text}").parse::<Table>().ok();
        let value = toml.filter(|table| table.len() == 1).and_then(|mut table| table.remove("value"));
        let plain = Value::String(text.to_owned());
        self.assign(table, key, &value.unwrap_or_else(|| plain.clone()), text)
            .or_else(|error| self.assign(table, key, &plain, text).map_err(|_| error))
            .map_err(Error::Config)
    }

    /// The whole configuration as a commented file that [`Config::load`] reads back to the same.
    pub fn to_toml(&self) -> String {
        let mut config = self.clone();
        let mut text = String::new();
        for (table, fields) in config.tables() {
            if !table.is_empty() {
                text += &format!("\n[{table}]\n");
            }
            for field in fields {
                let comment = format!("# {}\n", field.doc);
                // The optimiser settings that three tables share are explained in the first.
                if !text.contains(&comment) {
                    text += &comment;
                }
                text += &format!("{} = {}\n", field.key, written(&field.slot.get()));
            }
        }
        text
    }

    fn tables(&mut self) -> Vec<(&'static str, Vec<Field<'_>>)> {
        let range = Range::ANY;
        let seed = Field { key: "seed", doc: seed_doc!().into(), range, slot: &mut self.seed };
        let doc = precision_doc!().into();
        let precision = Field { key: "precision", doc, range, slot: &mut self.precision };
        vec![
            ("", vec![seed, precision]),
            ("data", self.data.fields()),
            ("train", self.train.fields()),
            ("prune", self.prune.fields()),
            ("quantize", self.quantize.fields()),
            ("distill", self.distill.fields()),
        ]
    }

    /// Reads `text`, the content of `path`.
    fn apply(&mut self, path: &Path, text: &str) -> Result<()> {
        let at = |span: Span<usize>, message: String| {
            let line = 1 + text[..span.start.min(text.len())].matches('\n').count();
            Error::line(path, line, message)
        };
        let file = DeTable::parse(text).map_err(|error| {
            let reason = error.message().replace('\n', "; ");
            at(error.span().unwrap_or(0..0), format!("not valid TOML: {reason}"))
        })?;
        let mut assign = |table: &str, key: &Spanned<_>, value: &Spanned<DeValue<'_>>| {
            let key: &toml::de::DeString<'_> = key.as_ref();
            let found = text.get(value.span()).unwrap_or_default();
            // A number that does not fit fails here; it is then refused as what it looks like.
            let plain = Value::deserialize(ValueDeserializer::from(value.clone()))
                .unwrap_or_else(|_| Value::Table(Table::new()));
            self.assign(table, key, &plain, found)
        };
        for (key, value) in file.get_ref() {
            match value.get_ref() {
                DeValue::Table(_) if !table_names().contains(&key.get_ref().as_ref()) => {
                    return Err(at(key.span(), unknown(key.get_ref(), "")));
                }
                DeValue::Table(table) => {
                    for (inner, value) in table {
                        assign(key.get_ref(), inner, value).map_err(|message| at(inner.span(), message))?;
                    }
                }
                _ => assign("", key, value).map_err(|message| at(key.span(), message))?,
            }
        }
        Ok(())
    }

    /// Puts `value`, written as `found`, into a setting. The error is a sentence without a place.
    fn assign(
        &mut self,
        table: &str,
        key: &str,
        value: &Value,
        found: &str,
    ) -> std::result::Result<(), String> {
        let mut fields =
            self.tables().into_iter().filter(|(name, _)| *name == table).flat_map(|(_, fields)| fields);
        let Some(field) = fields.find(|field| field.key == key) else {
            return Err(unknown(table, key));
        };
        if field.slot.set(value, field.range) {
            return Ok(());
        }
        let found = match found.char_indices().nth(60) {
            Some((end, _)) => format!("{}...", &found[..end]),
            None => found.to_owned(),
        };
        let (name, allowed) = (dotted(table, key), field.slot.allowed(field.range));
        Err(format!("`{name}` is {found}; it must be {allowed}"))
    }
}

/// A value as TOML, small numbers with an exponent.
fn written(value: &Value) -> String {
    match value {
        Value::Float(x) if *x != 0.0 && x.abs() < 1e-3 => format!("{x:e}"),
        value => value.to_string(),
    }
}

fn dotted(table: &str, key: &str) -> String {
    if table.is_empty() { key.to_owned() } else { format!("{table}.{key}") }
}

/// The tables of a file, in order.
fn table_names() -> Vec<&'static str> {
    let mut config = Config::default();
    config.tables().into_iter().map(|(table, _)| table).filter(|table| !table.is_empty()).collect()
}

/// What to say about a table or key that does not exist.
fn unknown(table: &str, key: &str) -> String {
    let (settings, tables) = (settings(), table_names());
    let listed = tables.iter().map(|table| format!("[{table}]")).collect::<Vec<_>>().join(", ");
    let as_tables = tables.iter().map(|table| (format!("[{table}]"), *table, 0));
    if !table.is_empty() && !tables.contains(&table) {
        let nearest = nearest(table, as_tables);
        return format!("unknown table [{table}]; did you mean {nearest}? Tables: {listed}");
    }
    if table.is_empty() && tables.contains(&key) {
        return format!("`{key}` is a table; put its settings under [{key}]");
    }
    // A key of another table is named only if it is nearer than every key of this one.
    let known = settings.iter().map(|s| match s.table == table {
        true => (s.key.to_owned(), s.key, 0),
        false => (s.name(), s.key, 1),
    });
    if table.is_empty() {
        let nearest = nearest(key, known.chain(as_tables));
        return format!(
            "unknown key `{key}` outside a table; did you mean `{nearest}`? Valid there: seed, precision, and the tables {listed}"
        );
    }
    let nearest = nearest(key, known);
    let keys: Vec<&str> = settings.iter().filter(|s| s.table == table).map(|s| s.key).collect();
    format!("unknown key `{key}` in [{table}]; did you mean `{nearest}`? Valid keys: {}", keys.join(", "))
}

/// Of `(shown, compared, handicap)` what is shown of the one whose compared text is fewest edits (and the
/// handicap) away from `word`; the first one of equals. Initials (`lr`) are no edit away, and one word of several
/// (`batch`) is one.
fn nearest<'a>(word: &str, candidates: impl Iterator<Item = (String, &'a str, usize)>) -> String {
    let initials = |text: &str| text.split('_').filter_map(|part| part.chars().next()).collect::<String>();
    let distance = |(_, text, handicap): &(String, &str, usize)| {
        let edits = match text {
            _ if word.len() > 1 && initials(text) == word => 0,
            _ if text.split('_').any(|part| part == word) => 1,
            _ => strsim::damerau_levenshtein(word, text),
        };
        edits + handicap
    };
    candidates.min_by_key(distance).map(|(shown, ..)| shown).unwrap_or_default()
}

impl Serialize for Config {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut config = self.clone();
        let mut root = Table::new();
        for (table, fields) in config.tables() {
            let values = fields.into_iter().map(|field| (field.key.to_owned(), field.slot.get()));
            match table {
                "" => root.extend(values),
                _ => drop(root.insert(table.to_owned(), Value::Table(values.collect()))),
            }
        }
        root.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let mut config = Config::default();
        for (name, value) in Table::deserialize(deserializer)? {
            let settings = match value {
                Value::Table(table) => {
                    table.into_iter().map(|(key, value)| (name.clone(), key, value)).collect()
                }
                value => vec![(String::new(), name, value)],
            };
            for (table, key, value) in settings {
                let found = value.to_string();
                config.assign(&table, &key, &value, &found).map_err(serde::de::Error::custom)?;
            }
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn read(text: &str) -> Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(Some(&path), None, &[])
    }

    /// The error of a file with this text, with its folder left out.
    fn complaint(text: &str) -> String {
        let message = read(text).unwrap_err().to_string();
        message[message.find("run.toml").unwrap()..].to_owned()
    }

    fn set(key: &str, value: &str) -> (String, String) {
        (key.to_owned(), value.to_owned())
    }

    #[test]
    fn an_unknown_key_names_place_nearest_and_valid_keys() {
        assert_eq!(
            complaint("seed = 1\n\n[distill]\nalpha = 2\ntemprature = 3\n"),
            "run.toml:5: unknown key `temprature` in [distill]; did you mean `temperature`? Valid keys: enabled, \
             alpha, beta, gamma, temperature, attention_features"
        );
        // Transposed letters are one edit; the shared optimiser keys count as the table's own.
        let message = complaint("[train]\nepcohs = 3\n");
        assert!(
            message.starts_with(
                "run.toml:2: unknown key `epcohs` in [train]; did you mean `epochs`? Valid keys: "
            ),
            "{message}"
        );
        assert!(message.contains("learning_rate") && !message.contains("criterion"), "{message}");
    }

    #[test]
    fn usual_short_names_are_understood() {
        for (table, word, key) in [
            ("prune", "lr", "learning_rate"),
            ("train", "bs", "batch_size"),
            ("train", "wd", "weight_decay"),
            ("train", "batch", "batch_size"),
            ("distill", "lr", "train.learning_rate"),
            ("train", "beta", "beta1"),
            ("train", "ep", "eps"),
        ] {
            let message = complaint(&format!("[{table}]\n{word} = 3\n"));
            assert!(message.contains(&format!("did you mean `{key}`?")), "{word}: {message}");
        }
    }

    #[test]
    fn a_key_in_the_wrong_table_is_answered_with_the_right_one() {
        let message = complaint("[train]\nmask_update_every = 3\n");
        assert!(message.contains("did you mean `prune.mask_update_every`?"), "{message}");
        let message = complaint("[distill.alpha]\nx = 3\n");
        assert!(message.contains("`distill.alpha` is"), "{message}");
    }

    #[test]
    fn an_unknown_table_or_top_level_key_names_the_nearest() {
        assert_eq!(
            complaint("\n[prun]\nepochs = 3\n"),
            "run.toml:2: unknown table [prun]; did you mean [prune]? Tables: [data], [train], [prune], [quantize], \
             [distill]"
        );
        assert_eq!(
            complaint("sed = 3\n"),
            "run.toml:1: unknown key `sed` outside a table; did you mean `seed`? Valid there: seed, precision, and the tables \
             [data], [train], [prune], [quantize], [distill]"
        );
        assert!(complaint("epochs = 3\n").contains("did you mean `train.epochs`?"));
        assert_eq!(
            complaint("train = 3\n"),
            "run.toml:1: `train` is a table; put its settings under [train]"
        );
        assert_eq!(
            complaint("[[train]]\n"),
            "run.toml:1: `train` is a table; put its settings under [train]"
        );
    }

    /// What was found and what is allowed, for each kind of setting.
    #[test]
    fn a_wrong_value_names_what_was_found_and_what_is_allowed() {
        for (table, line, rest) in [
            ("train", "epochs = \"three\"", "is \"three\"; it must be a whole number from 1 to 10000"),
            ("train", "epochs = 0", "is 0; it must be a whole number from 1 to 10000"),
            ("train", "epochs = 1.5", "is 1.5; it must be a whole number from 1 to 10000"),
            (
                "train",
                "epochs = 99999999999999999999",
                "is 99999999999999999999; it must be a whole number from 1 to 10000",
            ),
            ("train", "learning_rate = 0", "is 0; it must be a number above 0 and at most 1"),
            ("train", "learning_rate = nan", "is nan; it must be a number above 0 and at most 1"),
            ("train", "learning_rate = true", "is true; it must be a number above 0 and at most 1"),
            ("train", "warmup = 1.1", "is 1.1; it must be a number from 0 to 1"),
            ("train", "beta2 = 1", "is 1; it must be a number from 0 to 0.99999"),
            ("train", "dropout = 1.0", "is 1.0; it must be \"none\" or a number from 0 to 0.95"),
            ("train", "max_steps = 0", "is 0; it must be \"none\" or a whole number from 1 to 1000000000"),
            (
                "train",
                "schedule = \"linera\"",
                "is \"linera\"; it must be \"linear\", \"constant\" or \"cosine\"",
            ),
            ("prune", "criterion = \"l2\"", "is \"l2\"; it must be \"magnitude\" or \"wanda\""),
            (
                "prune",
                "attention = \"4:4\"",
                "is \"4:4\"; it must be \"none\" or keep:of with 0 < keep < of and `of` a power of two up to 256, for \
                 example \"2:4\"",
            ),
            ("prune", "stop_loss = 0", "is 0; it must be \"none\" or a number above 0"),
            (
                "quantize",
                "outputs = [\"q\", \"x\"]",
                "is [\"q\", \"x\"]; it must be \"all\", \"none\" or a list of \"q\", \"k\", \"v\", \"attn_out\", \"ffn_in\" \
                 or \"ffn_out\"",
            ),
            ("distill", "enabled = 1", "is 1; it must be true or false"),
            ("distill", "gamma = -1", "is -1; it must be a number of at least 0"),
        ] {
            let key = line.split_once(" = ").unwrap().0;
            let expected = format!("run.toml:3: `{table}.{key}` {rest}");
            assert_eq!(complaint(&format!("# a run\n[{table}]\n{line}\n")), expected);
        }
        assert_eq!(
            complaint("seed = -1"),
            "run.toml:1: `seed` is -1; it must be a whole number from 0 to 9223372036854775807"
        );
        let long = format!("[train]\nschedule = \"{}\"", "x".repeat(1000));
        assert!(complaint(&long).len() < 200);
    }

    #[test]
    fn what_is_not_toml_names_the_line() {
        let message = complaint("[train]\nepochs = 3\nbatch_size 4\n");
        assert!(message.starts_with("run.toml:3: not valid TOML: "), "{message}");
        let message = complaint("[train]\nepochs = 3\nepochs = 4\n");
        assert!(message.starts_with("run.toml:3: not valid TOML: duplicate key"), "{message}");
        let missing = Config::load(Some(Path::new("no/such/run.toml")), None, &[]).unwrap_err().to_string();
        assert!(
            missing.starts_with("no/such/run.toml: ") && missing.ends_with("; check the path"),
            "{missing}"
        );
    }

    #[test]
    fn flags_go_over_the_file_and_the_file_over_the_preset() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "prune.epochs = 7\n[train]\nepochs = 8\nbatch_size = 5\n").unwrap();
        let preset = Some("bert-base-squad");
        let both = Config::load(Some(&path), preset, &[set("train.epochs", "9")]).unwrap();
        assert_eq!((both.train.fit.epochs, both.train.fit.batch_size), (9, 5));
        assert_eq!((both.prune.fit.epochs, both.quantize.fit.epochs), (7, 4));
        assert_eq!((both.data.max_length, both.prune.fit.batch_size), (Some(384), 24));
        // Later flags go over earlier ones.
        let twice = Config::load(None, None, &[set("seed", "1"), set("seed", "2")]).unwrap();
        assert_eq!(twice.seed, 2);
        assert_eq!(Config::load(None, None, &[]).unwrap(), Config::default());
    }

    #[test]
    fn flags_take_text_without_quotes() {
        let mut config = Config::default();
        for (key, value) in [
            ("train.schedule", "cosine"),
            ("train.learning-rate", "1e-3"),
            ("train.max_steps", "20"),
            ("prune.attention", "2:8"),
            ("quantize.outputs", "ffn_out,q, q"),
            ("quantize.fit", "1"),
            ("distill.enabled", "false"),
        ] {
            let result = config.set(key, value);
            assert_eq!(result.is_err(), key == "quantize.fit", "{key}");
        }
        assert_eq!(config.train.fit.schedule, Schedule::Cosine);
        assert_eq!(config.train.fit.learning_rate, 1e-3);
        assert_eq!(config.train.fit.max_steps, Some(20));
        assert_eq!(config.prune.attention, Some(Pattern::new(2, 8).unwrap()));
        assert_eq!(config.quantize.outputs, [Site::Q, Site::FfnOut]);
        assert!(!config.distill.enabled);
        let without = Config::default().quantize.outputs;
        assert!(!without.contains(&Site::FfnOut) && without.len() == Site::ALL.len() - 1, "the default");
        // "none" and "all" undo what a file set; a pattern that looks like a time of day is one all the same.
        config.set("train.max_steps", "none").unwrap();
        config.set("prune.attention", "12:32").unwrap();
        config.set("quantize.outputs", "none").unwrap();
        assert_eq!((config.train.fit.max_steps, config.quantize.outputs.len()), (None, 0));
        assert_eq!(config.prune.attention, Some(Pattern::new(12, 32).unwrap()));
        config.set("quantize.outputs", "all").unwrap();
        config.set("prune.attention", "none").unwrap();
        assert_eq!((config.prune.attention, &config.quantize.outputs[..]), (None, Site::ALL));

        assert_eq!(
            config.set("train.epochs", "three").unwrap_err().to_string(),
            "`train.epochs` is three; it must be a whole number from 1 to 10000"
        );
        let message = config.set("prune.epoch", "3").unwrap_err().to_string();
        assert!(message.starts_with("unknown key `epoch` in [prune]; did you mean `epochs`?"), "{message}");
        let message = config.set("prun.epochs", "3").unwrap_err().to_string();
        assert!(message.starts_with("unknown table [prun]; did you mean [prune]?"), "{message}");
        assert!(config.set("train.epochs", "3\nseed = 4").is_err());
    }

    #[test]
    fn the_resolved_text_and_json_read_back_to_the_same() {
        let changed = [
            set("seed", "9223372036854775807"),
            set("train.max_steps", "17"),
            set("train.learning_rate", "0.00012345678901234567"),
            set("prune.attention", "1:4"),
            set("prune.criterion", "wanda"),
            set("quantize.outputs", "none"),
            set("quantize.stop_loss", "0.5"),
            set("distill.attention_features", "true"),
        ];
        for overrides in [&[][..], &changed] {
            let config = Config::load(None, Some("quick"), overrides).unwrap();
            let text = config.to_toml();
            assert_eq!(read(&text).unwrap(), config, "{text}");
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config, "{json}");
            let sections: Vec<&str> = text.split("\n[").collect();
            assert!(sections[0].starts_with("# Seed of everything random"), "{text}");
            for setting in settings() {
                let section = sections.iter().find(|s| s.starts_with(&format!("{}]", setting.table)));
                let text = section.unwrap_or(&sections[0]);
                assert!(text.contains(&format!("\n{} = ", setting.key)), "{} is missing", setting.name());
            }
        }
        let error = serde_json::from_str::<Config>("{\"train\":{\"epochz\":3}}").unwrap_err().to_string();
        assert!(error.starts_with("unknown key `epochz` in [train]; did you mean `epochs`?"), "{error}");
    }

    #[test]
    fn every_setting_is_documented_and_takes_its_default() {
        let settings = settings();
        let names: BTreeSet<String> = settings.iter().map(SettingInfo::name).collect();
        assert_eq!(names.len(), settings.len());
        let mut config = Config::default();
        for setting in &settings {
            assert!(setting.doc.ends_with(['.', ')']), "{}: {}", setting.name(), setting.doc);
            assert!(!setting.allowed.is_empty());
            config.set(&setting.name(), &setting.default).unwrap();
        }
        assert_eq!(config, Config::default());
        let warmup = settings.iter().find(|setting| setting.name() == "prune.warmup").unwrap();
        assert_eq!(warmup.doc, "Fraction of the steps during which the learning rate rises from 0.");
        let eps = settings.iter().find(|setting| setting.name() == "train.eps").unwrap();
        assert_eq!(eps.default, "1e-8");
        assert_eq!((warmup.default.as_str(), warmup.allowed.as_str()), ("0.1", "a number from 0 to 1"));
    }

    #[test]
    fn presets_read_and_have_different_names() {
        let names: BTreeSet<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        assert_eq!(names.len(), PRESETS.len());
        for preset in PRESETS {
            assert!(!preset.doc.is_empty());
            let config = Config::load(None, Some(preset.name), &[]).unwrap();
            assert_ne!(config, Config::default(), "{}", preset.name);
        }
        assert_eq!(
            Config::load(None, Some("bert-base-sqad"), &[])
                .unwrap_err()
                .to_string()
                .split_once('?')
                .unwrap()
                .0,
            "unknown preset `bert-base-sqad`; did you mean `bert-base-squad`"
        );
    }

    /// What the README's figures for SQuAD were measured with.
    #[test]
    fn a_small_model_on_squad_learns_long_from_features() {
        let config = Config::load(None, Some("minilm-squad"), &[]).unwrap();
        let (d, default) = (&config.distill, Distill::default());
        assert_eq!((d.gamma, d.attention_features), (30.0, true));
        assert_eq!((d.alpha, d.beta, d.temperature), (default.alpha, default.beta, default.temperature));
        let of = |f: &Fit| (f.learning_rate, f.epochs, f.batch_size);
        assert_eq!(of(&config.train.fit), (1e-4, 20, 32));
        assert_eq!(of(&config.prune.fit), (2e-4, 24, 32));
        assert_eq!(of(&config.quantize.fit), (2e-4, 10, 32));
    }

    /// The paper's table 6: name, learning rate, epochs, batch per GPU, GPUs.
    #[test]
    fn presets_hold_the_papers_table_6() {
        for (name, rate, epochs, batch, gpus) in [
            ("bert-base-squad", 3.0e-5, 4, 3, 8),
            ("bert-base-glue", 2.4e-5, 6, 16, 8),
            ("bert-large-squad", 3.0e-5, 4, 3, 8),
            ("bert-large-glue", 2.4e-5, 6, 16, 8),
            ("opt-125m-wikitext", 6.0e-4, 15, 16, 32),
            ("opt-1.3b-wikitext", 2.0e-4, 15, 16, 64),
            ("opt-2.7b-wikitext", 1.6e-4, 15, 16, 64),
            ("opt-6.7b-wikitext", 1.2e-4, 15, 16, 128),
            ("opt-13b-wikitext", 1.0e-4, 15, 16, 256),
            ("gpt-125m-wikitext", 6.0e-4, 15, 16, 32),
            ("gpt-1.3b-wikitext", 2.0e-4, 15, 16, 64),
            ("gpt-2.7b-wikitext", 1.6e-4, 15, 16, 64),
            ("gpt-6.7b-wikitext", 1.2e-4, 15, 16, 128),
            ("gpt-13b-wikitext", 1.0e-4, 15, 16, 256),
            ("bart-cnn-dm", 5.5e-5, 3, 16, 8),
            ("bart-xsum", 7.0e-5, 3, 16, 8),
        ] {
            let config = Config::load(None, Some(name), &[]).unwrap();
            for fit in [&config.train.fit, &config.prune.fit, &config.quantize.fit] {
                assert_eq!(
                    (fit.learning_rate, fit.epochs, fit.batch_size),
                    (rate, epochs, batch * gpus),
                    "{name}"
                );
                assert_eq!((fit.schedule, fit.weight_decay), (Schedule::Linear, 0.01));
                assert!(fit.warmup > 0.0);
            }
            let doc = PRESETS.iter().find(|preset| preset.name == name).unwrap().doc;
            assert!(doc.ends_with(&format!("batch {batch} on each of {gpus} GPUs)")), "{doc}");
            // GLUE and SQuAD are the tasks that can be trained on.
            let runs = name.ends_with("-glue") || name.ends_with("-squad");
            assert_eq!(!doc.contains("no command runs it yet"), runs, "{doc}");
        }
        assert_eq!(PRESETS.len(), 18, "a preset beside `quick` and `minilm-squad` that is not checked here");
    }
}
