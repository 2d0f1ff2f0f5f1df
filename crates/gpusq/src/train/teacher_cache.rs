//! A teacher's outputs on disk, so that they are computed once for each batch and not in every epoch or run.
//!
//! `DIR/D/K.safetensors` has what the loss reads of a teacher for one part of a batch. `D` is a digest of everything that
//! decides those bits besides the inputs (weights, specification, device, element type, the program's own file), `K` one of
//! the inputs.
//! Outputs of an example depend on its batch in their last bits (sums over padding, kernels chosen by size), so a part is
//! found again only as it was: that is why training with a cache has the bits of training without.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gpusq_tensor::{Device, Tape, Tensor, cuda};

use super::batch::epoch;
use crate::config;
use crate::distill::{Mix, is_feature};
use crate::format::safetensors::{Checkpoint, checksum, write_checksummed};
use crate::forward::{Compute, Inputs, Output, Tokens};
use crate::model::Model;
use crate::outdir::{Digest, digest_model};
use crate::params::Weight;
use crate::report::Machine;
use crate::spec::TransformerSpec;
use crate::task::{Dataset, HeadKind};
use crate::{Error, Result};

/// Of the logits; taps have names of their own.
const LOGITS: &str = "logits";

/// Metadata keys: what decided the outputs, and the inputs' checksum.
const OF: &str = "of";
const INPUTS: &str = "inputs_crc32";

/// How often a cache was used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// Parts of batches whose outputs were read.
    pub read: usize,
    /// Parts whose outputs were computed and written.
    pub written: usize,
    /// Parts whose file was damaged, or held other outputs; computed and counted as those that had none.
    pub damaged: usize,
    /// Parts whose outputs were computed and could not be written: the disk is full, for example.
    pub lost: usize,
    /// Why the first of them could not.
    pub why: Option<String>,
}

/// The outputs of one teacher.
pub(super) struct TeacherCache {
    folder: PathBuf,
    /// What decides the outputs, besides the inputs.
    of: String,
    device: Device,
    uses: RefCell<Uses>,
}

impl TeacherCache {
    /// That of `teacher` in the folder `dir`, for what `mix` reads.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub(super) fn open(dir: &Path, teacher: &Model, mix: &Mix, compute: Compute) -> Result<Self> {
        let machine = match compute.device {
            Device::Cpu => Machine::current(0, "").cpu,
            Device::Cuda(gpu) => format!("{}, {}", gpu.name(), cuda::versions()),
        };
        let (element, tf32, spec) = (compute.element, compute.tf32, &teacher.spec);
        let of = format!(
            "program {}, {machine}, {element:?}, tf32 {tf32}, {:?}, {spec:?}, weights {:016x} {:016x}",
            program()?,
            mix.taps(),
            digest_model(teacher),
            digest_masks(teacher)
        );
        let mut digest = Digest::new();
        digest.text(&of);
        let folder = dir.join(format!("{:016x}", digest.value()));
        std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        Ok(TeacherCache { folder, of, device: compute.device, uses: RefCell::default() })
    }

    pub(super) fn uses(&self) -> Uses {
        self.uses.borrow().clone()
    }

    /// What the loss reads of the teacher's outputs for `inputs`, as constants on `tape`: from disk, or what `compute`
    /// gives, which is kept there. A file that is damaged is written again; one that cannot be written is counted.
    ///
    /// # Errors
    /// A GPU that failed.
    pub(super) fn outputs(
        &self,
        tape: &Tape,
        inputs: &Inputs,
        compute: impl FnOnce() -> Output,
    ) -> Result<Output> {
        let (key, sum) = digest_inputs(inputs);
        let path = self.folder.join(format!("{key:016x}.safetensors"));
        if let Some(kept) = self.read(&path, &sum) {
            self.uses.borrow_mut().read += 1;
            let mut taps: BTreeMap<_, _> =
                kept.into_iter().map(|(name, t)| (name, tape.constant(t.to(self.device)))).collect();
            let logits = taps.remove(LOGITS).expect("looked for when it was read");
            return Ok(Output { logits, taps });
        }
        self.uses.borrow_mut().damaged += usize::from(path.is_file());
        let mut out = compute();
        out.taps.retain(|name, _| is_feature(name));
        let on_host = |(name, t): (&str, &Tensor)| (name.to_string(), t.to(Device::Cpu));
        let taps = out.taps.iter().map(|(name, v)| (name.as_str(), v.value()));
        let all: Vec<_> = taps.chain([(LOGITS, out.logits.value())]).map(on_host).collect();
        // A GPU that failed left zeros.
        self.device.check()?;
        let metadata = [(OF.to_string(), self.of.clone()), (INPUTS.to_string(), sum)];
        let mut uses = self.uses.borrow_mut();
        match write_checksummed(&path, &all, &metadata.into()) {
            Ok(()) => uses.written += 1,
            // Training goes on without what would only have saved time.
            Err(e) => {
                uses.lost += 1;
                uses.why.get_or_insert_with(|| e.to_string());
            }
        }
        Ok(out)
    }

    /// The tensors in `path`; `None` if there is no such file, or not as it was written, or one of other inputs.
    fn read(&self, path: &Path, sum: &str) -> Option<BTreeMap<String, Tensor>> {
        let file = Checkpoint::open_file(path).ok()?;
        let says = |key: &str, value: &str| file.metadata().get(key).is_some_and(|v| v == value);
        if !says(OF, &self.of) || !says(INPUTS, sum) || file.info(LOGITS).is_none() {
            return None;
        }
        file.names().map(|name| Some((name.to_string(), file.raw(name).ok()?))).collect()
    }
}

/// Makes the folder `dir` if there is none, for a run to find out before it starts.
///
/// # Errors
/// One that cannot be made or written.
pub fn writable(dir: &Path) -> Result<()> {
    let made = std::fs::create_dir_all(dir).and_then(|()| tempfile::tempfile_in(dir).map(drop));
    made.map_err(|e| {
        let dir = dir.display();
        Error::Config(format!(
            "the teacher's cache {dir}: {e}; nothing can be kept there, give another folder or leave it out"
        ))
    })
}

/// A checksum of the running program: another build may compute other bits.
fn program() -> Result<String> {
    // Linux knows the file still when another one has its name.
    let bytes = std::fs::read("/proc/self/exe").or_else(|_| std::fs::read(std::env::current_exe()?));
    Ok(checksum(&bytes.map_err(Error::io(Path::new("the running program")))?))
}

/// What a teacher's weights are beside the values that [`digest_model`] reads.
fn digest_masks(teacher: &Model) -> u64 {
    let mut d = Digest::new();
    for (_, weight) in teacher.params.iter() {
        let (mask, scale) = match weight {
            Weight::Masked { mask, .. } => (Some(mask), None),
            Weight::Fake { mask, scale, .. } => (Some(mask), Some(scale)),
            Weight::Dense(_) | Weight::Packed(_) => (None, None),
        };
        mask.iter().flat_map(|m| m.u8()).for_each(|&kept| d.word(u32::from(kept)));
        scale.iter().flat_map(|s| s.f32()).for_each(|s| d.word(s.to_bits()));
    }
    d.value()
}

/// A digest and a checksum, which miss different mistakes.
fn digest_inputs(inputs: &Inputs) -> (u64, String) {
    let mut words: Vec<u32> = Vec::new();
    for t in std::iter::once(&inputs.tokens).chain(&inputs.target) {
        let Tokens { batch, length, ids, types, mask } = t;
        words.extend([*batch as u32, *length as u32, types.len() as u32, u32::from(mask.is_some())]);
        words.extend(ids.iter().chain(types));
        words.extend(mask.iter().flatten().map(|&m| u32::from(m)));
    }
    let mut digest = Digest::new();
    words.iter().for_each(|&w| digest.word(w));
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    (digest.value(), checksum(&bytes))
}

/// Bytes of the outputs that training on `data` as `fit` says keeps of a teacher with the specification `spec`.
pub fn bytes(
    spec: &TransformerSpec,
    data: &Dataset,
    fit: &config::Fit,
    seed: u64,
    mix: &Mix,
    compute: Compute,
) -> u64 {
    let taps = mix.taps();
    let widths = spec.stacks().map(|(_, s)| {
        let attention = if taps.attention { s.heads * s.head_dim } else { 0 };
        s.layers * (if taps.blocks { s.hidden } else { 0 } + attention)
    });
    let features = widths.sum::<usize>() * compute.element.size();
    // Of each token, and of each sequence.
    let (of_token, of_sequence) = match data.head {
        HeadKind::Classes(n) => (features, 4 * n),
        HeadKind::Value => (features, 4),
        HeadKind::Span => (features + 8, 0),
    };
    let steps = super::total_steps(fit, data.examples.len());
    let per_epoch = data.examples.len().div_ceil(fit.batch_size);
    let epochs = if fit.fixed_batches { 1 } else { steps.div_ceil(per_epoch) };
    let batches = (0..epochs).flat_map(|e| epoch(&data.examples, fit, seed, e)).take(steps);
    let of_batch = |which: Vec<usize>| {
        let length = which.iter().map(|&i| data.examples[i].ids.len()).max().unwrap_or(0);
        (which.len() * (length * of_token + of_sequence)) as u64
    };
    batches.map(of_batch).sum()
}
