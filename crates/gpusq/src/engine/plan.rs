//! Which kernel computes each linear map: measured on the GPU at hand, and remembered on disk.
//!
//! Time does not depend on values, so a plan serves every model with the same shapes on the same GPU, driver and version
//! of the kernels.

use std::collections::BTreeMap;
use std::path::PathBuf;

use gpusq_tensor::cuda::{self, Gpu};
use serde::{Deserialize, Serialize};

/// Where in a network a map stands. All blocks have the same shapes and so the same kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Queries, keys and values.
    Qkv,
    /// What follows attention.
    AttentionOut,
    /// First projection of the feed-forward.
    FfnIn,
    /// Second projection of the feed-forward.
    FfnOut,
    /// The dense layer of a classifier.
    HeadDense,
    /// The last map.
    HeadOut,
}

/// One measured choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Which map.
    pub place: Place,
    /// Whether it is computed for the first token of each sequence only.
    pub first: bool,
    /// Rows it is computed for at a time.
    pub tokens: usize,
    /// Outputs and inputs.
    pub shape: [usize; 2],
    /// How many of the network's maps it stands for.
    pub maps: usize,
    /// Whether times are those of the map and the norm behind it, which some kernels compute together.
    pub norm: bool,
    /// The kernel that is used, one of `times`.
    pub kernel: String,
    /// Whether that multiplies the 2:4 weight rather than its dense twin.
    pub sparse: bool,
    /// Every kernel that was tried.
    pub times: Vec<Time>,
}

/// What one kernel took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Time {
    /// Its name.
    pub kernel: String,
    /// Whether it multiplies a 2:4 weight.
    pub sparse: bool,
    /// Microseconds for one map: the median of several runs.
    pub microseconds: f64,
}

impl Row {
    /// The fastest of the kernels of one kind.
    pub fn best(&self, sparse: bool) -> Option<&Time> {
        let own = self.times.iter().filter(|t| t.sparse == sparse);
        own.min_by(|a, b| a.microseconds.total_cmp(&b.microseconds))
    }

    /// Why no sparse kernel is used, if none is.
    pub fn why_dense(&self) -> Option<String> {
        let (dense, sparse) = (self.best(false)?, self.best(true)?);
        (!self.sparse).then(|| {
            format!(
                "the dense {} took {:.1} us, the fastest sparse one ({}) {:.1} us",
                dense.kernel, dense.microseconds, sparse.kernel, sparse.microseconds
            )
        })
    }
}

/// The plans of a network on one GPU, by the tokens and sequences they were measured at.
#[derive(Default)]
pub(super) struct Plans {
    file: Option<PathBuf>,
    known: BTreeMap<String, Vec<Row>>,
}

impl Plans {
    /// What earlier processes have measured for a network that `shape` describes. A file that cannot be read counts as
    /// none: it is made again.
    pub(super) fn load(gpu: Gpu, shape: &str) -> Plans {
        let own = format!("{} {} {shape}", cuda::versions(), gpusq_tensor::ops::sparse_linear::version());
        let name: String = gpu
            .name()
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
            .collect();
        let file = cuda::cache_folder()
            .map(|folder| folder.join(format!("plans/{name}-{:016x}.json", cuda::fnv(own.as_bytes()))));
        let read = |file: &PathBuf| serde_json::from_slice(&std::fs::read(file).ok()?).ok();
        Plans { known: file.as_ref().and_then(read).unwrap_or_default(), file }
    }

    pub(super) fn get(&self, tokens: usize, sequences: usize) -> Option<&Vec<Row>> {
        self.known.get(&key(tokens, sequences))
    }

    /// Keeps a plan, on disk too if that takes it.
    pub(super) fn insert(&mut self, tokens: usize, sequences: usize, rows: Vec<Row>) {
        self.known.insert(key(tokens, sequences), rows);
        // A cache that cannot be written costs time and nothing else.
        if let Some(file) = &self.file {
            let text = serde_json::to_vec_pretty(&self.known).expect("plain data serialises");
            let _ = cuda::write_cached(file, &text);
        }
    }
}

fn key(tokens: usize, sequences: usize) -> String {
    format!("{tokens} tokens, {sequences} sequences")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dense_choice_says_why() {
        let time = |kernel: &str, sparse, microseconds| Time { kernel: kernel.into(), sparse, microseconds };
        let times = vec![time("a", true, 9.0), time("b", true, 7.04), time("c", false, 6.5)];
        let row = |sparse| Row {
            place: Place::FfnIn,
            first: false,
            tokens: 16,
            shape: [8, 8],
            maps: 2,
            norm: false,
            kernel: "c".into(),
            sparse,
            times: times.clone(),
        };
        assert_eq!(
            row(false).why_dense().unwrap(),
            "the dense c took 6.5 us, the fastest sparse one (b) 7.0 us"
        );
        assert_eq!(row(true).why_dense(), None);
    }
}
