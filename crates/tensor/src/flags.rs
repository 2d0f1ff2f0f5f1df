//! Booleans that many operations read: which positions are no padding.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use crate::cuda::{Gpu, Memory};

/// Booleans in host memory, and on a GPU once an operation there has asked for them. Clones share both.
#[derive(Clone)]
pub struct Flags(Arc<Shared>);

struct Shared {
    host: Vec<bool>,
    on_gpu: OnceLock<Memory>,
}

impl Flags {
    /// As bytes 0 and 1 on `gpu`.
    pub(crate) fn on(&self, gpu: Gpu) -> &Memory {
        let bytes = || self.0.host.iter().map(|&b| u8::from(b)).collect::<Vec<u8>>();
        let memory = self.0.on_gpu.get_or_init(|| gpu.upload(&bytes()));
        assert!(memory.gpu() == gpu, "flags are used on two GPUs; make them for each");
        memory
    }
}

impl From<Vec<bool>> for Flags {
    fn from(host: Vec<bool>) -> Self {
        Flags(Arc::new(Shared { host, on_gpu: OnceLock::new() }))
    }
}

impl From<&[bool]> for Flags {
    fn from(host: &[bool]) -> Self {
        host.to_vec().into()
    }
}

impl Deref for Flags {
    type Target = [bool];
    fn deref(&self) -> &[bool] {
        &self.0.host
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} flags", self.iter().filter(|&&b| b).count(), self.len())
    }
}
