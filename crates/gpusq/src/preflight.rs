//! What can be known before the first step: do model, task, tokenizer and machine fit, what will be
//! compressed, what will it need.

use std::path::Path;

use gpusq_tensor::Device;
use serde::Serialize;

use crate::arch;
use crate::config;
use crate::format::atomic::free_space;
use crate::format::packed::beyond_f16;
use crate::forward::Compute;
use crate::model::{Model, compressible};
use crate::params::Weight;
use crate::report::bytes;
use crate::task::{Dataset, Tokenizer};
use crate::train::Step;
use crate::{Error, Result};

/// What a run is about to do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Preflight {
    /// Parameters of the model.
    pub parameters: usize,
    /// Linear maps that will be compressed (none if the run compresses nothing), block numbers replaced by `*`, with how many each name stands for.
    pub compressed: Vec<(String, usize)>,
    /// Their elements.
    pub compressed_parameters: usize,
    /// Linear maps that stay dense, with the reason.
    pub left_dense: Vec<(String, String)>,
    /// Examples to train on and to evaluate; of SQuAD its questions.
    pub examples: (usize, usize),
    /// Model inputs they make: more where a long context is read in windows.
    pub windows: (usize, usize),
    /// Longest example in tokens.
    pub longest: usize,
    /// Processes that train together, each on its device.
    pub processes: usize,
    /// Where and in what it will be trained: `CPU, f32`, or a GPU with its name; by rank 0, if there are several.
    pub device: String,
    /// Bytes of memory that training will need on each device, estimated.
    pub memory: u64,
    /// Bytes of disk the output will need.
    pub disk: u64,
    /// Bytes of disk that the cache of the teachers' outputs will need; 0 if there is none.
    pub teacher_cache: u64,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Checks that `model` can be trained on `train` as each of `fits` says by `devices` devices, under a teacher or not, for
/// `stages` stages as `compute` says into `out`; `compresses` says that they compress. The model is split over `pipeline`
/// of the devices, which is all of them or 1. `cache` is the folder for teachers' outputs with their bytes.
///
/// # Errors
/// [`Error::Mismatch`] if tokenizer or examples do not fit the model, [`Error::Tensor`] if a weight
/// does not fit the packed form, [`Error::File`] if the disk is too
/// full; each says what to do.
pub fn preflight(
    model: &Model,
    tokenizer: &Tokenizer,
    train: &Dataset,
    dev: &Dataset,
    fits: &[&config::Fit],
    devices: usize,
    pipeline: usize,
    teacher: bool,
    stages: u64,
    compresses: bool,
    compute: Compute,
    out: &Path,
    cache: Option<(&Path, u64)>,
) -> Result<Preflight> {
    check_fit(model, tokenizer, &[train, dev])?;
    if compresses {
        check_range(model)?;
    }
    let spec = &model.spec;
    let parameters = spec.weights().iter().map(|(_, s)| s.iter().product::<usize>()).sum::<usize>();
    let (mut compressed, mut compressed_parameters, mut left_dense) =
        (Vec::<(String, usize)>::new(), 0, Vec::new());
    for l in spec.linears().into_iter().filter(|_| compresses) {
        match compressible(&l) {
            None => {
                let parts = l.name.split('.').map(|p| if p.parse::<usize>().is_ok() { "*" } else { p });
                let name = parts.collect::<Vec<_>>().join(".");
                match compressed.iter_mut().find(|(n, _)| *n == name) {
                    Some((_, count)) => *count += 1,
                    None => compressed.push((name, 1)),
                }
                compressed_parameters += l.rows * l.cols;
            }
            Some(reason) => left_dense.push((l.name, reason)),
        }
    }
    let longest = train.examples.iter().chain(&dev.examples).map(|e| e.ids.len()).max().unwrap_or(0);
    let at_a_time = |fit: &config::Fit| fit.at_a_time(train.examples.len(), devices, pipeline);
    let step = |fit: &&config::Fit| Step {
        length: longest,
        teacher,
        quantises: compresses,
        recomputes: fit.gradient_checkpointing,
        accumulates: at_a_time(fit).1,
        pipeline,
        compute,
    };
    let needs = |fit: &&config::Fit| step(fit).bytes(spec, at_a_time(fit).0);
    let most = fits.iter().max_by_key(|fit| needs(fit)).expect("a run trains");
    let memory = needs(most);
    // f32 weights of each stage, and the state (weights and two moments) of the one being trained.
    let disk = 4 * parameters as u64 * (stages + 3);
    let mut warnings = Vec::new();
    if !model.fresh.is_empty() {
        warnings.push(format!("new weights, to be trained: {}", model.fresh.join(", ")));
    }
    let have = match compute.device {
        Device::Cpu => physical_memory(),
        Device::Cuda(gpu) => Some(gpu.memory()),
    };
    if let Some(have) = have.filter(|have| *have < memory) {
        warnings.push(format!(
            "training may need {} of memory and {} has {}; {}",
            bytes(memory),
            compute.device,
            bytes(have),
            step(most).advice(spec, have)
        ));
    }
    if let Some(free) = free_space(out).filter(|free| *free < disk) {
        let message = format!(
            "needs about {} of disk and {} are free; free some or choose another --out",
            bytes(disk),
            bytes(free)
        );
        return Err(Error::file(out, message));
    }
    if let Some((dir, bytes_kept)) = cache {
        // Which of the files there this run reads is not known before it has its teacher.
        if let Some(free) = free_space(dir).filter(|free| *free < bytes_kept) {
            warnings.push(format!(
                "{}: the teacher's outputs take up to about {}, less what is kept already, and {} are free; free some, \
                 choose another --teacher-cache or leave it out",
                dir.display(),
                bytes(bytes_kept),
                bytes(free)
            ));
        }
    }
    Ok(Preflight {
        parameters,
        compressed,
        compressed_parameters,
        left_dense,
        examples: (train.count, dev.count),
        windows: (train.examples.len(), dev.examples.len()),
        longest,
        processes: devices,
        device: compute.to_string(),
        memory,
        disk,
        teacher_cache: cache.map_or(0, |(_, bytes)| bytes),
        warnings,
    })
}

/// Checks that every example of `data` can go through `model`.
///
/// # Errors
/// [`Error::File`] of the model's folder: a vocabulary that is too large. [`Error::Mismatch`]: an example too long,
/// or none.
pub fn check_fit(model: &Model, tokenizer: &Tokenizer, data: &[&Dataset]) -> Result<()> {
    let spec = &model.spec;
    let folder = model.config.path().parent().unwrap_or(model.config.path());
    let largest =
        data.iter().flat_map(|d| &d.examples).flat_map(|e| &e.ids).max().copied().unwrap_or(0) as usize;
    if tokenizer.vocab_size() > spec.vocab || largest >= spec.vocab {
        let message = format!(
            "the tokenizer has {} entries and the model's vocabulary {}; use the tokenizer the model was trained with",
            tokenizer.vocab_size(),
            spec.vocab
        );
        return Err(Error::file(folder, message));
    }
    let limit = spec.max_length();
    for d in data {
        if d.examples.is_empty() {
            return Err(Error::Mismatch(format!("the {} split of {} has no example", d.split, d.name)));
        }
        let segment = d.examples.iter().flat_map(|e| &e.types).max().copied().unwrap_or(0) as usize;
        if let Some(types) = spec.stacks().map(|(_, s)| s.embed.types).find(|&t| t > 0 && segment >= t) {
            let message = format!(
                "the tokenizer gives segment {segment} and the model has {types}; use the tokenizer the model was trained with"
            );
            return Err(Error::file(folder, message));
        }
        if let Some(e) = d.examples.iter().find(|e| e.ids.len() > limit) {
            return Err(Error::Mismatch(format!(
                "an example has {} tokens and the model takes {limit}; set data.max_length to at most {limit}",
                e.ids.len()
            )));
        }
    }
    Ok(())
}

/// Refuses weights that the f16 of a packed model cannot hold, before hours of training end at them.
fn check_range(model: &Model) -> Result<()> {
    for (name, weight) in model.params.iter() {
        let (Weight::Dense(t) | Weight::Masked { value: t, .. }) = weight else { continue };
        let Some(x) = beyond_f16(t).filter(|_| t.shape().len() >= 2) else { continue };
        let entries = (arch::find(&model.config)?.tensors)(&model.spec);
        let stored = entries.into_iter().find(|e| e.ours == name).map_or(name.to_string(), |e| e.theirs);
        let file = model.config.path().with_file_name("model.safetensors");
        let folder = model.config.path().parent().unwrap_or(&file);
        let message = format!(
            "holds {x:e}, and a packed model keeps f16, at most 65504; clip the weight, or train the model again \
             with a lower learning rate or more weight decay"
        );
        return Err(Error::tensor(if file.is_file() { &file } else { folder }, stored, message));
    }
    Ok(())
}

/// Bytes of memory of this machine, where the system says.
fn physical_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
