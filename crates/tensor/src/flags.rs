//! Booleans that many operations read: which positions are no padding.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex};

use crate::cuda::{Gpu, Memory};

/// Booleans in host memory, and on a GPU once an operation there has asked for them. Clones share both.
#[derive(Clone)]
pub struct Flags(Arc<Shared>);

struct Shared {
    host: Vec<bool>,
    on_gpu: Mutex<Option<Arc<Memory>>>,
}

impl Flags {
    /// As bytes 0 and 1 on `gpu`.
    pub(crate) fn on(&self, gpu: Gpu) -> Arc<Memory> {
        let mut on_gpu = self.0.on_gpu.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(memory) = &*on_gpu {
            assert!(memory.gpu() == gpu, "flags are used on two GPUs; make them for each");
            return memory.clone();
        }
        let bytes: Vec<u8> = self.0.host.iter().map(|&b| u8::from(b)).collect();
        let memory = Arc::new(gpu.upload(&bytes));
        // Where the GPU has failed there is none, and the next try may find some.
        *on_gpu = Some(memory.clone()).filter(|m| !m.missing());
        memory
    }
}

impl From<Vec<bool>> for Flags {
    fn from(host: Vec<bool>) -> Self {
        Flags(Arc::new(Shared { host, on_gpu: Mutex::default() }))
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
