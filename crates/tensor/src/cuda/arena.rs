//! Memory that is there before work starts: an arena on the GPU, and host memory that copies need not wait for.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use cudarc::driver::result;

use super::stream::keep;
use super::{Arg, CudaError, Gpu, Grid, Memory, Plain, Source, reason};
use crate::{DType, Tensor};

static SOURCE: Source = Source { name: "copy", text: include_str!("copy.cu") };

/// Copies up to this size are a kernel's, which starts early; the copy engine takes some 3 us to be handed the work and to hand
/// it on, but reads and writes host memory in larger pieces.
const SMALL: usize = 1 << 20;

/// Where tensors begin; what kernels and cuBLASLt like best.
const ALIGNMENT: usize = 256;

/// GPU memory that tensors are laid out in, any number of times: two layouts share it.
#[derive(Clone)]
pub struct Arena(Arc<Memory>);

impl Arena {
    /// `bytes` of memory.
    ///
    /// # Errors
    /// There is not so much, or the GPU had failed before.
    pub fn new(gpu: Gpu, bytes: usize) -> Result<Arena, CudaError> {
        Ok(Arena(Arc::new(gpu.settled(|| gpu.allocate(bytes))?)))
    }

    /// A layout from the start of the memory on.
    pub fn start(&self) -> Layout {
        Layout { arena: self.clone(), at: 0 }
    }
}

/// Lays tensors out one after the other.
pub struct Layout {
    arena: Arena,
    at: usize,
}

impl Layout {
    /// Bytes that a tensor takes in a layout.
    pub fn bytes(dtype: DType, shape: &[usize]) -> usize {
        (shape.iter().product::<usize>() * dtype.size()).next_multiple_of(ALIGNMENT)
    }

    /// The next tensor, with unspecified content. Panics if the arena has no room for it.
    pub fn tensor(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        let whole = &self.arena.0;
        let bytes = shape.iter().product::<usize>() * dtype.size();
        assert!(self.at + bytes <= whole.bytes, "an arena of {} bytes is too small", whole.bytes);
        let at = if whole.at == 0 { 0 } else { whole.at + self.at as u64 };
        let part = Memory { gpu: whole.gpu, at, bytes, whole: Some(whole.clone()) };
        self.at += Layout::bytes(dtype, shape);
        Tensor::on_gpu(dtype, part, shape)
    }
}

/// Host memory that a GPU reads and writes itself.
pub(super) struct Locked {
    at: *mut std::ffi::c_void,
    gpu: Gpu,
}

// SAFETY: an address of memory of the process.
unsafe impl Send for Locked {}
// SAFETY: as above; what is behind it belongs to the one `Pinned`.
unsafe impl Sync for Locked {}

impl Locked {
    /// What the GPU knows it by: the same address.
    fn address(&self) -> Arg {
        Arg::Pointer(self.at as u64)
    }
}

/// Copies `bytes` from one to the other, one of which is host memory.
fn copy(gpu: Gpu, to: Arg, from: Arg, bytes: usize) {
    gpu.launch_early(&SOURCE, "copy", Grid::elements(bytes.div_ceil(16)), &[to, from, bytes.into()]);
}

/// For the test that compiles every kernel.
#[cfg(test)]
pub(crate) fn variants() -> Vec<super::Variant> {
    vec![(&SOURCE).into()]
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: allocated by `malloc_host`, freed once.
        let _ = self.gpu.bind().and_then(|()| unsafe { result::free_host(self.at) });
    }
}

/// Numbers in host memory that a GPU copies itself, so that copies can be part of a [`super::Graph`]. They are not to be
/// touched while a copy is under way, that is inside [`super::Stream::run`].
pub struct Pinned<T> {
    memory: Arc<Locked>,
    length: usize,
    of: std::marker::PhantomData<T>,
}

impl<T: Plain> Pinned<T> {
    /// `length` zeros.
    ///
    /// # Errors
    /// The driver gives no such memory.
    pub fn new(gpu: Gpu, length: usize) -> Result<Self, CudaError> {
        let bytes = (length * size_of::<T>()).max(1);
        // SAFETY: the context lives as long as the process.
        let got = gpu.bind().and_then(|()| unsafe { result::malloc_host(bytes, 0) });
        let at =
            got.map_err(|e| match gpu.refused(&format!("allocate {bytes} bytes of host memory"), 0, e) {
                // The GPU's own memory is another matter.
                CudaError::OutOfMemory { ordinal, .. } => CudaError::Driver {
                    ordinal,
                    what: format!("allocate {bytes} bytes of host memory"),
                    reason: reason(e),
                },
                other => other,
            })?;
        // SAFETY: `bytes` were just allocated.
        unsafe { at.cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { memory: Arc::new(Locked { at, gpu }), length, of: std::marker::PhantomData })
    }

    /// Copies the first elements to `to`, as many as it has, without waiting.
    pub fn upload(&self, to: &Tensor) {
        let (memory, from) = (to.memory(), self.part(to));
        if memory.address() == 0 {
            return;
        }
        let gpu = self.memory.gpu;
        match size_of_val(from) {
            0..=SMALL => copy(gpu, memory.into(), self.memory.address(), size_of_val(from)),
            // SAFETY: both have the bytes of `to`; the graph or whoever runs keeps them.
            _ => drop(gpu.attempt("copy to the GPU", |gpu| unsafe {
                result::memcpy_htod_async(memory.address(), from, gpu.stream())
            })),
        }
        keep(&self.memory);
    }

    /// Copies `from` to the first elements, without waiting.
    pub fn download(&mut self, from: &Tensor) {
        let memory = from.memory();
        let part = self.part(from);
        let (length, bytes) = (part.len(), size_of_val(part));
        if memory.address() == 0 {
            return;
        }
        let to = self.memory.address();
        match bytes {
            0..=SMALL => copy(memory.gpu(), to, memory.into(), bytes),
            // SAFETY: as above.
            _ => drop(memory.gpu().attempt("copy from the GPU", |gpu| unsafe {
                result::memcpy_dtoh_async(&mut self[..length], memory.address(), gpu.stream())
            })),
        }
        keep(&self.memory);
    }

    fn part(&self, t: &Tensor) -> &[T] {
        assert_eq!(t.dtype().size(), size_of::<T>(), "element type of a copy");
        &self[..t.len()]
    }
}

impl<T: Plain> Deref for Pinned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: allocated with this length, initialised, and any bytes make a `T`.
        unsafe { std::slice::from_raw_parts(self.memory.at.cast(), self.length) }
    }
}

impl<T: Plain> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; a graph holds the memory and does not look at it on the host.
        unsafe { std::slice::from_raw_parts_mut(self.memory.at.cast(), self.length) }
    }
}
