//! Booleans that many operations read: which positions are no padding.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex};

use crate::cuda::{Gpu, Memory};

/// Booleans in host memory, and on each GPU once an operation there has asked for them. Clones share all.
#[derive(Clone)]
pub struct Flags(Arc<Shared>);

struct Shared {
    host: Vec<bool>,
    on_gpus: Mutex<Vec<Arc<Memory>>>,
}

impl Flags {
    /// As bytes 0 and 1 on `gpu`.
    pub(crate) fn on(&self, gpu: Gpu) -> Arc<Memory> {
        let mut on_gpus = self.0.on_gpus.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(memory) = on_gpus.iter().find(|m| m.gpu() == gpu) {
            return memory.clone();
        }
        let bytes: Vec<u8> = self.0.host.iter().map(|&b| u8::from(b)).collect();
        let memory = Arc::new(gpu.upload(&bytes));
        // Where the GPU has failed there is none, and the next try may find some.
        if !memory.missing() {
            on_gpus.push(memory.clone());
        }
        memory
    }
}

impl From<Vec<bool>> for Flags {
    fn from(host: Vec<bool>) -> Self {
        Flags(Arc::new(Shared { host, on_gpus: Mutex::default() }))
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
