//! NVIDIA GPUs: the driver, memory, launches. Everything is looked for at run time, nothing at build time.
//!
//! All work of a [`Gpu`] goes to one stream, so operations run in the order they were asked for and memory that
//! one frees the next may use. Operations have no `Result`: the first failure (out of memory, a fault in a
//! kernel) is kept, later work does nothing, and [`Gpu::check`] hands the failure to whoever runs a step. Who must not
//! wait for others' work, or be stopped by their failures, has a [`Stream`] of its own.

mod arena;
mod blas;
mod kernels;
pub(crate) mod nccl;
mod pool;
pub(crate) mod reduce;
mod replay;
mod stream;
mod tensor_map;

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};
use std::{fmt, ptr};

use rayon::prelude::*;

use crate::Device;
use cudarc::driver::{CudaContext, DriverError, result, sys};

#[cfg(test)]
pub(crate) use arena::variants as copy_variants;
pub use arena::{Arena, Layout, Pinned};
pub use blas::with_tf32;
pub(crate) use kernels::{Source, Variant, source};
pub use kernels::{cache_folder, fnv, versions, write_cached};
pub use replay::Replay;
pub use stream::{Graph, Stream};

use blas::{Blas, Call};
use pool::Pool;
use replay::Work;
use stream::Lane;

/// GPUs with an ordinal beyond this are not opened.
const MOST: usize = 64;

/// Why a GPU could not be used, or stopped working.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CudaError {
    /// No device has this name.
    #[error("unknown device `{0}`; use auto, cpu, cuda or cuda:N with N the number of a GPU")]
    Name(String),
    /// A library is not on this machine.
    #[error("no {library} found (searched {searched}); {remedy}")]
    Library {
        /// What it is, such as `NVIDIA driver`.
        library: &'static str,
        /// File names that were tried.
        searched: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The driver refused something.
    #[error("GPU {ordinal}: {what}: {reason}")]
    Driver {
        /// Which GPU.
        ordinal: usize,
        /// What was asked for.
        what: String,
        /// The driver's words.
        reason: String,
    },
    /// The GPU's memory does not hold what a step needs.
    #[error(
        "GPU {ordinal} is out of memory: {asked} more bytes were asked for, {free} of {total} are free; {remedy}"
    )]
    OutOfMemory {
        /// Which GPU.
        ordinal: usize,
        /// Bytes of the allocation that failed, as far as the driver says what it was.
        asked: usize,
        /// Bytes free on the device when it failed.
        free: usize,
        /// Bytes of the device.
        total: usize,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A kernel or the hardware failed. The driver refuses all further work of the process, on every stream: each later
    /// call gives this error too.
    #[error(
        "GPU {ordinal}: {what}: {reason}; a kernel or the GPU has failed, and the driver takes no more work from this \
         process: start it again"
    )]
    Fault {
        /// Which GPU.
        ordinal: usize,
        /// What was asked for when it showed.
        what: String,
        /// The driver's words.
        reason: String,
    },
    /// A kernel was not accepted by the compiler.
    #[error("the kernels of {source_name} do not compile for {target}: {log}")]
    Compile {
        /// Folder of the operation.
        source_name: &'static str,
        /// Architecture, such as `sm_90a`.
        target: String,
        /// The compiler's words.
        log: String,
    },
}

/// An NVIDIA GPU that was opened by this process. Copies name the same GPU.
#[derive(Clone, Copy)]
pub struct Gpu(&'static Inner);

struct Inner {
    ordinal: usize,
    /// Architecture kernels are compiled for, such as `sm_90a`.
    target: String,
    context: Arc<CudaContext>,
    /// Where work goes that no [`Stream`] was made for.
    main: Lane,
    /// Lanes whose [`Stream`] is gone.
    idle: Mutex<Vec<&'static Lane>>,
    /// Whose turn it is in [`Gpu::settled`].
    settling: Mutex<()>,
    modules: Mutex<HashMap<Variant, Module>>,
    blas: OnceLock<Blas>,
    pool: Mutex<Pool>,
    /// Who may ask something of the main stream ([`replay::turn`]).
    passes: RwLock<()>,
}

struct Module {
    handle: sys::CUmodule,
    functions: HashMap<&'static str, sys::CUfunction>,
}

// SAFETY: module and function handles may be used from any thread in which the context is current, which
// `Gpu::bind` sees to; the maps that hold them are behind a mutex.
unsafe impl Send for Module {}

thread_local! {
    /// Whose context is the thread's.
    static BOUND: Cell<Option<Gpu>> = const { Cell::new(None) };
}

impl Gpu {
    /// Opens GPU `ordinal`. Opening it again gives the same one.
    pub fn open(ordinal: usize) -> Result<Gpu, CudaError> {
        static OPEN: Mutex<[Option<Gpu>; MOST]> = Mutex::new([None; MOST]);
        let mut open = lock(&OPEN);
        let failed =
            |what: &str, e: DriverError| CudaError::Driver { ordinal, what: what.into(), reason: reason(e) };
        let slot = open.get_mut(ordinal).ok_or_else(|| CudaError::Driver {
            ordinal,
            what: "open".into(),
            reason: format!("GPUs are numbered 0 to {}", MOST - 1),
        })?;
        if let Some(gpu) = slot {
            return Ok(*gpu);
        }
        kernels::need_driver()?;
        kernels::need_compiler()?;
        blas::need()?;
        let context = CudaContext::new(ordinal).map_err(|e| failed("open", e))?;
        // That made it the thread's.
        BOUND.set(None);
        let main = Lane::new(&context).map_err(|e| failed("make a stream", e))?;
        let (major, minor) = context.compute_capability().map_err(|e| failed("ask its architecture", e))?;
        if major < 8 {
            return Err(CudaError::Driver {
                ordinal,
                what: "open".into(),
                reason: format!("architecture sm_{major}{minor} is older than sm_80 (Ampere)"),
            });
        }
        let inner = Inner {
            ordinal,
            target: kernels::target(major, minor),
            context,
            main,
            idle: Mutex::default(),
            settling: Mutex::default(),
            modules: Mutex::default(),
            blas: OnceLock::new(),
            pool: Mutex::default(),
            passes: RwLock::default(),
        };
        // A process has one of these for each GPU, until it ends.
        let gpu = Gpu(Box::leak(Box::new(inner)));
        *slot = Some(gpu);
        Ok(gpu)
    }

    /// Number of this GPU, from 0.
    pub fn ordinal(self) -> usize {
        self.0.ordinal
    }

    /// The vendor's name of it.
    pub fn name(self) -> String {
        self.0.context.name().unwrap_or_else(|_| "unnamed".into())
    }

    /// Bytes of its memory.
    pub fn memory(self) -> u64 {
        self.0.context.total_mem().unwrap_or(0) as u64
    }

    /// The most bytes of tensors that were in use at one time since the last call.
    pub fn peak_memory(self) -> u64 {
        lock(&self.0.pool).peak() as u64
    }

    /// Bytes of its memory that nobody has, of whatever process.
    pub fn free_memory(self) -> u64 {
        let free = self.bind().and_then(|()| result::mem_get_info());
        free.map_or(0, |(free, _)| free as u64)
    }

    /// Whether kernels for it have Hopper's own instructions.
    pub(crate) fn is_hopper(self) -> bool {
        self.0.target == "sm_90a"
    }

    /// Bytes of shared memory that one block may have.
    pub(crate) fn shared_memory(self) -> usize {
        use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as MOST;
        self.0.context.attribute(MOST).map_or(0, |n| n as usize)
    }

    /// Multiprocessors it has.
    pub(crate) fn multiprocessors(self) -> usize {
        use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as COUNT;
        self.0.context.attribute(COUNT).map_or(1, |n| n as usize)
    }

    /// Whether kernels may use Hopper's own instructions (wgmma, TMA).
    pub(crate) fn hopper(self) -> bool {
        self.0.target == "sm_90a"
    }

    /// Waits for all work asked for so far and hands over the first failure since the last call. After
    /// out-of-memory the GPU works again; after a fault in a kernel the driver refuses all further work
    /// ([`CudaError::Fault`]).
    pub fn check(self) -> Result<(), CudaError> {
        replay::end(self);
        self.attempt("finish", |gpu| gpu.lane().synchronize());
        self.lane().take_failure().map_or(Ok(()), Err)
    }

    /// Where the thread's work goes.
    fn lane(self) -> &'static Lane {
        stream::current(self).unwrap_or(&self.0.main)
    }

    fn stream(self) -> sys::CUstream {
        self.lane().stream()
    }

    /// Runs `f` with this GPU's context current, unless the GPU has failed; keeps the first failure.
    fn attempt(self, what: &str, f: impl FnOnce(Gpu) -> Result<(), DriverError>) -> bool {
        if self.failed() {
            return false;
        }
        let _turn = replay::turn(self);
        match self.bind().and_then(|()| f(self)) {
            Ok(()) => true,
            Err(e) => {
                self.fail(self.refused(what, 0, e));
                false
            }
        }
    }

    /// Runs `f` on the main stream while no other caller of this does, waits for what it asked for and hands over what
    /// failed in it: a failure that another thread took away would leave `f`'s tensors without memory and nobody told.
    ///
    /// # Errors
    /// The first failure since the last check.
    pub fn settled<R>(self, f: impl FnOnce() -> R) -> Result<R, CudaError> {
        let _alone = lock(&self.0.settling);
        let out = f();
        self.check()?;
        Ok(out)
    }

    fn fail(self, e: CudaError) {
        self.lane().fail(e);
    }

    /// Uninitialised memory.
    pub(crate) fn allocate(self, bytes: usize) -> Memory {
        let memory = |at| Memory { gpu: self, at, bytes, whole: None };
        if bytes == 0 || self.failed() {
            return memory(0);
        }
        // What is free may still be in use by work of the main stream, and a graph would keep the address.
        assert!(
            stream::current(self).is_none(),
            "memory is allocated before a stream is used, not while it is"
        );
        let _turn = replay::turn(self);
        let mut pool = lock(&self.0.pool);
        let class = match pool.take(bytes) {
            Ok(at) => return memory(at),
            Err(class) => class,
        };
        // SAFETY: the context lives as long as the process.
        let ask = || self.bind().and_then(|()| unsafe { result::malloc_sync(class) });
        let got = match ask() {
            // Memory of other classes may be what is missing.
            Err(e) if e.0 == EXHAUSTED => self.reclaim(&mut pool).and_then(|()| ask()),
            other => other,
        };
        let e = match got {
            Ok(at) => {
                pool.made(at);
                return memory(at);
            }
            Err(e) => e,
        };
        pool.give(bytes, None);
        drop(pool);
        self.fail(self.refused(&format!("allocate {bytes} bytes"), bytes, e));
        memory(0)
    }

    /// Why the driver did not do `what`, for which `bytes` were needed as far as is known.
    fn refused(self, what: &str, bytes: usize, e: DriverError) -> CudaError {
        let (ordinal, what) = (self.0.ordinal, what.into());
        let (free, total) = result::mem_get_info().unwrap_or((0, 0));
        match e.0 {
            code if code == EXHAUSTED || (code == UNNAMED && total > 0 && free < SCARCE) => {
                CudaError::OutOfMemory { ordinal, asked: bytes, free, total, remedy: "lower the batch size" }
            }
            code if FAULTS.contains(&code) => CudaError::Fault { ordinal, what, reason: reason(e) },
            _ => CudaError::Driver { ordinal, what, reason: reason(e) },
        }
    }

    /// Hands memory that nobody uses back to the driver, for those who do not allocate through the pool.
    fn reclaim(self, pool: &mut Pool) -> Result<(), DriverError> {
        // A graph that is still to be launched may use it.
        replay::end(self);
        self.0.main.synchronize()?;
        for at in pool.drain() {
            // SAFETY: nobody uses it, and all work that did is done.
            unsafe { result::free_sync(at) }?;
        }
        Ok(())
    }

    fn failed(self) -> bool {
        self.lane().failed()
    }

    /// Makes this GPU's context the thread's, if it is not.
    fn bind(self) -> Result<(), DriverError> {
        if BOUND.get() == Some(self) {
            return Ok(());
        }
        self.0.context.bind_to_thread()?;
        BOUND.set(Some(self));
        Ok(())
    }

    /// A copy of `data` on the GPU.
    pub(crate) fn upload<T: Plain>(self, data: &[T]) -> Memory {
        self.upload_of(data, data.len())
    }

    /// [`Gpu::upload`] of `data` that is longer, up to `most` elements, when the same is asked for again ([`Replay`]).
    pub(crate) fn upload_of<T: Plain>(self, data: &[T], most: usize) -> Memory {
        // SAFETY: numbers are bytes.
        let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), size_of_val(data)) };
        if !data.is_empty()
            && let Some(memory) = replay::upload(self, bytes, most * size_of::<T>())
        {
            return memory;
        }
        let memory = self.allocate(size_of_val(data));
        if memory.at != 0 {
            // SAFETY: `memory` has the size of `data`; pageable host memory is read before the call returns.
            self.attempt("copy to the GPU", |gpu| unsafe {
                result::memcpy_htod_async(memory.at, data, gpu.stream())
            });
        }
        memory
    }

    /// Starts kernel `name` of `source`. The caller answers for the arguments being what the kernel declares.
    pub(crate) fn launch(
        self,
        source: impl Into<Variant>,
        name: &'static str,
        grid: Grid,
        arguments: &[Arg],
    ) {
        self.start(source.into(), name, grid, arguments, false);
    }

    /// [`Gpu::launch`] of a kernel that may be started while the one before it still runs (Hopper and newer): all its
    /// blocks call `after_previous` before they read or write what other kernels write.
    pub(crate) fn launch_early(
        self,
        source: impl Into<Variant>,
        name: &'static str,
        grid: Grid,
        arguments: &[Arg],
    ) {
        self.start(source.into(), name, grid, arguments, !self.0.target.starts_with("sm_8"));
    }

    fn start(self, source: Variant, name: &'static str, grid: Grid, arguments: &[Arg], early: bool) {
        if grid.blocks.contains(&0) || self.failed() {
            return;
        }
        let work =
            || Work::Launch { variant: source.clone(), name, grid, arguments: arguments.to_vec(), early };
        if replay::takes(self, work) {
            return;
        }
        let function = match self.function(source, name) {
            Ok(f) => f,
            Err(e) => return self.fail(e),
        };
        let [x, y, z] = grid.blocks;
        let launch = |gpu: Gpu, pointers: &mut [*mut c_void]| {
            // SAFETY: each kernel's launcher sits beside its source and passes what it declares; every pointer
            // argument comes from a live `Memory` of this stream, so that it is not reused before the kernel ran.
            unsafe {
                if grid.shared > 48 << 10 {
                    result::function::set_function_attribute(
                        function,
                        sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                        grid.shared as i32,
                    )?;
                }
                let stream = gpu.stream();
                if !early {
                    let threads = (grid.threads, 1, 1);
                    return result::launch_kernel(
                        function,
                        (x, y, z),
                        threads,
                        grid.shared,
                        stream,
                        pointers,
                    );
                }
                let mut attribute: sys::CUlaunchAttribute = std::mem::zeroed();
                attribute.id =
                    sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
                attribute.value.programmaticStreamSerializationAllowed = 1;
                let how = sys::CUlaunchConfig {
                    gridDimX: x,
                    gridDimY: y,
                    gridDimZ: z,
                    blockDimX: grid.threads,
                    blockDimY: 1,
                    blockDimZ: 1,
                    sharedMemBytes: grid.shared,
                    hStream: stream,
                    attrs: &raw mut attribute,
                    numAttrs: 1,
                };
                sys::cuLaunchKernelEx(&how, function, pointers.as_mut_ptr(), ptr::null_mut()).result()
            }
        };
        self.attempt(name, |gpu| Arg::passed(arguments, |pointers| launch(gpu, pointers)));
    }

    /// Compiles and loads what is not loaded yet, on all threads: one after the other takes seconds each.
    pub(crate) fn prepare(self, variants: &[Variant]) {
        let known = |v: &&Variant| lock(&self.0.modules).contains_key(*v);
        let new: Vec<&Variant> = variants.iter().filter(|v| !known(v)).collect();
        // Failures come up when the kernel is launched.
        new.par_iter().for_each(|variant| {
            let _ = kernels::cubin(variant, &self.0.target);
        });
    }

    fn function(self, variant: Variant, name: &'static str) -> Result<sys::CUfunction, CudaError> {
        let mut modules = lock(&self.0.modules);
        self.bind().map_err(|e| self.refused("use it", 0, e))?;
        let source = variant.source;
        if !modules.contains_key(&variant) {
            let cubin = kernels::cubin(&variant, &self.0.target)?;
            // SAFETY: `cubin` is a whole ELF image that outlives the call; the driver copies it.
            let load = || unsafe { result::module::load_data(cubin.as_ptr().cast()) };
            let handle = match load() {
                Err(e) if e.0 == EXHAUSTED => self.reclaim(&mut lock(&self.0.pool)).and_then(|()| load()),
                other => other,
            };
            let what = || format!("load the kernels of {}", source.name);
            let handle = handle.map_err(|e| self.refused(&what(), cubin.len(), e))?;
            modules.insert(variant.clone(), Module { handle, functions: HashMap::new() });
        }
        let module = modules.get_mut(&variant).expect("inserted above");
        if let Some(f) = module.functions.get(name) {
            return Ok(*f);
        }
        let symbol = CString::new(name).expect("kernel names have no NUL");
        // SAFETY: the module is loaded and never unloaded.
        let f = unsafe { result::module::get_function(module.handle, symbol) }
            .map_err(|e| self.refused(&format!("find kernel {name} of {}", source.name), 0, e))?;
        module.functions.insert(name, f);
        Ok(f)
    }

    /// `c = alpha * a b + beta * c`, summed in f32.
    pub(crate) fn gemm(self, product: &Product) {
        if product.m == 0 || product.n == 0 || self.failed() {
            return;
        }
        let call = Call::of(product);
        if !replay::takes(self, || Work::Multiply(call)) {
            self.multiply(&call);
        }
    }

    fn multiply(self, call: &Call) {
        if !self.attempt("multiply matrices", |_| Ok(())) {
            return;
        }
        let _turn = replay::turn(self);
        if let Err(e) = self.blas().and_then(|blas| blas.multiply(self, call)) {
            self.fail(e);
        }
    }

    fn zero(self, at: u64, bytes: usize) {
        // SAFETY: the range is an allocation, as whoever asked saw to.
        self.attempt("clear memory", |gpu| unsafe { result::memset_d8_async(at, 0, bytes, gpu.stream()) });
    }

    fn copy(self, to: u64, from: u64, bytes: usize) {
        // SAFETY: both ranges are within their allocations, as whoever asked saw to.
        self.attempt("copy", |gpu| unsafe { result::memcpy_dtod_async(to, from, bytes, gpu.stream()) });
    }

    fn copied(self, to: u64, from: u64, bytes: usize) {
        if !replay::takes(self, || Work::Copy { to, from, bytes }) {
            self.copy(to, from, bytes);
        }
    }

    /// cuBLASLt, opened when it is first needed. What failed to open is tried again the next time.
    fn blas(self) -> Result<&'static Blas, CudaError> {
        static OPENING: Mutex<()> = Mutex::new(());
        let _one = lock(&OPENING);
        if let Some(blas) = self.0.blas.get() {
            return Ok(blas);
        }
        let blas = Blas::open(self)?;
        Ok(self.0.blas.get_or_init(|| blas))
    }
}

/// What the driver says when memory is used up.
const EXHAUSTED: sys::CUresult = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;

/// What a driver (580) was seen to call it where memory was full and a kernel was launched that had been compiled before,
/// and the free memory below which it is taken for exhaustion. Why it is not called that was not found out.
const UNNAMED: sys::CUresult = sys::CUresult::CUDA_ERROR_UNKNOWN;
const SCARCE: usize = 32 << 20;

/// What it says of kernels and hardware that failed, from when on it says nothing else.
const FAULTS: [sys::CUresult; 11] = [
    sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
    sys::CUresult::CUDA_ERROR_LAUNCH_FAILED,
    sys::CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
    sys::CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION,
    sys::CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
    sys::CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE,
    sys::CUresult::CUDA_ERROR_INVALID_PC,
    sys::CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR,
    sys::CUresult::CUDA_ERROR_ASSERT,
    sys::CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
    sys::CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE,
];

pub(crate) use blas::{Factor, Operand, Product};
pub(crate) use tensor_map::TensorMap;

impl Device {
    /// Every device of this machine that can be used, the CPU first.
    pub fn all() -> Vec<Device> {
        let count = match kernels::need_driver() {
            Ok(()) => CudaContext::device_count().unwrap_or(0) as usize,
            Err(_) => 0,
        };
        let gpus = (0..count).filter_map(|ordinal| Gpu::open(ordinal).ok()).map(Device::Cuda);
        std::iter::once(Device::Cpu).chain(gpus).collect()
    }

    /// The CPU (`cpu`), a GPU (`cuda`, `cuda:1`), or the first GPU if there is one that can be used (`auto`). Says
    /// why the CPU was taken where `auto` found no GPU.
    ///
    /// # Errors
    /// A name that is none of these; a GPU that was asked for and cannot be used.
    pub fn named(name: &str) -> Result<(Device, Option<CudaError>), CudaError> {
        match name {
            "cpu" => Ok((Device::Cpu, None)),
            "auto" => Ok(Gpu::open(0).map_or_else(|e| (Device::Cpu, Some(e)), |g| (Device::Cuda(g), None))),
            "cuda" => Ok((Device::Cuda(Gpu::open(0)?), None)),
            _ => match name.strip_prefix("cuda:").and_then(|n| n.parse().ok()) {
                Some(ordinal) => Ok((Device::Cuda(Gpu::open(ordinal)?), None)),
                None => Err(CudaError::Name(name.into())),
            },
        }
    }

    /// Hands over the first failure of work on this device since the last call, after all of it is done. A CPU has
    /// none.
    ///
    /// # Errors
    /// As [`Gpu::check`].
    pub fn check(self) -> Result<(), CudaError> {
        match self {
            Device::Cpu => Ok(()),
            Device::Cuda(gpu) => gpu.check(),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("CPU"),
            Device::Cuda(gpu) => write!(f, "GPU {} ({})", gpu.ordinal(), gpu.name()),
        }
    }
}

impl PartialEq for Gpu {
    fn eq(&self, other: &Gpu) -> bool {
        ptr::eq(self.0, other.0)
    }
}

impl Eq for Gpu {}

impl Hash for Gpu {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.ordinal.hash(state);
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({})", self.0.ordinal)
    }
}

/// GPU memory, for others to use when it is dropped.
pub(crate) struct Memory {
    gpu: Gpu,
    /// 0 if nothing was allocated: no bytes asked for, or the GPU has failed.
    at: sys::CUdeviceptr,
    bytes: usize,
    /// What this is a part of, if it is.
    whole: Option<Arc<Memory>>,
}

impl Memory {
    /// Whether nothing could be allocated.
    pub(crate) fn missing(&self) -> bool {
        self.at == 0 && self.bytes != 0
    }

    /// `bytes` bytes of `whole` from `offset` on. Parts are written on their own: whoever divides an allocation sees to
    /// it that they do not overlap, and no longer uses the whole.
    pub(crate) fn part(whole: &Arc<Memory>, offset: usize, bytes: usize) -> Memory {
        assert!(offset + bytes <= whole.bytes, "{bytes} bytes at {offset} of {}", whole.bytes);
        let at = if whole.at == 0 { 0 } else { whole.at + offset as u64 };
        Memory { gpu: whole.gpu, at, bytes, whole: Some(whole.clone()) }
    }

    pub(crate) fn gpu(&self) -> Gpu {
        self.gpu
    }

    /// For a table of addresses that a kernel reads; the memory must outlive its launch.
    pub(crate) fn address(&self) -> u64 {
        self.at
    }

    pub(crate) fn zero(&self) {
        let Memory { gpu, at, bytes, .. } = *self;
        if at != 0 && !replay::takes(gpu, || Work::Zero { at, bytes }) {
            gpu.zero(at, bytes);
        }
    }

    /// Copies `from` to the bytes from `offset` on.
    pub(crate) fn put(&self, offset: usize, from: &Memory) {
        assert!(offset + from.bytes <= self.bytes, "{} bytes at {offset} of {}", from.bytes, self.bytes);
        if self.at != 0 && from.at != 0 {
            self.gpu.copied(self.at + offset as u64, from.at, from.bytes);
        }
    }

    /// Waits for the work before it and copies to the host; zeros if the GPU has failed.
    pub(crate) fn download<T: Plain>(&self) -> Vec<T> {
        let mut out = vec![T::default(); self.bytes / size_of::<T>()];
        if self.at != 0 {
            replay::end(self.gpu);
            // SAFETY: `out` has the allocation's size, and any bytes make a `T`.
            self.gpu.attempt("copy from the GPU", |gpu| {
                unsafe { result::memcpy_dtoh_async(&mut out, self.at, gpu.stream()) }?;
                gpu.lane().synchronize()
            });
        }
        out
    }
}

impl Clone for Memory {
    fn clone(&self) -> Self {
        let copy = self.gpu.allocate(self.bytes);
        if self.at != 0 && copy.at != 0 {
            self.gpu.copied(copy.at, self.at, self.bytes);
        }
        copy
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.at != 0 && self.whole.is_none() {
            lock(&self.gpu.0.pool).give(self.bytes, Some(self.at));
        }
    }
}

/// Element types that may cross between host and GPU as bytes.
///
/// # Safety
/// Any bytes must make a value.
pub unsafe trait Plain: Copy + Default {}

// SAFETY: numbers without invalid bit patterns.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for half::f16 {}
// SAFETY: as above.
unsafe impl Plain for half::bf16 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u8 {}

/// Threads of a launch.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
}

impl Grid {
    /// For a kernel that strides over `n` elements: enough blocks to fill any GPU.
    pub(crate) fn elements(n: usize) -> Grid {
        Grid::blocks(n.div_ceil(256).min(1 << 14))
    }

    /// For a kernel that strides over `n` elements by packs of at least four.
    pub(crate) fn packs(n: usize) -> Grid {
        Grid::elements(n.div_ceil(4))
    }

    /// `n` blocks of 256 threads.
    pub(crate) fn blocks(n: usize) -> Grid {
        Grid {
            blocks: [u32::try_from(n).expect("a launch has fewer than 2^32 blocks"), 1, 1],
            threads: 256,
            shared: 0,
        }
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Arg {
    Pointer(u64),
    I32(i32),
    U32(u32),
    /// `long long`
    Long(i64),
    U64(u64),
    F32(f32),
    /// `const __grid_constant__ TensorMap`
    Map(TensorMap),
}

impl Arg {
    /// The value in the low bytes, as the driver reads it (little-endian, like every host with these GPUs). A tensor map
    /// is longer and read where it is.
    fn bits(self) -> u64 {
        match self {
            Arg::Pointer(p) | Arg::U64(p) => p,
            Arg::I32(v) => v as u32 as u64,
            Arg::U32(v) => v as u64,
            Arg::Long(v) => v as u64,
            Arg::F32(v) => v.to_bits() as u64,
            Arg::Map(_) => 0,
        }
    }

    /// `f` of where the driver reads each of `arguments`.
    fn passed<R>(arguments: &[Arg], f: impl FnOnce(&mut [*mut c_void]) -> R) -> R {
        let mut values: Vec<u64> = arguments.iter().map(|a| a.bits()).collect();
        let place = |(argument, bits): (&Arg, &mut u64)| match argument {
            Arg::Map(map) => ptr::from_ref(map).cast_mut().cast(),
            _ => ptr::from_mut(bits).cast(),
        };
        f(&mut arguments.iter().zip(&mut values).map(place).collect::<Vec<_>>())
    }
}

impl From<&Memory> for Arg {
    fn from(m: &Memory) -> Arg {
        Arg::Pointer(m.at)
    }
}

impl From<i32> for Arg {
    fn from(v: i32) -> Arg {
        Arg::I32(v)
    }
}

impl From<u32> for Arg {
    fn from(v: u32) -> Arg {
        Arg::U32(v)
    }
}

impl From<u64> for Arg {
    fn from(v: u64) -> Arg {
        Arg::U64(v)
    }
}

impl From<f32> for Arg {
    fn from(v: f32) -> Arg {
        Arg::F32(v)
    }
}

/// Sizes are `long long` in kernels.
impl From<usize> for Arg {
    fn from(v: usize) -> Arg {
        Arg::Long(v as i64)
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

fn reason(e: DriverError) -> String {
    match (e.error_name(), e.error_string()) {
        (Ok(n), Ok(s)) => format!("{} ({})", s.to_string_lossy(), n.to_string_lossy()),
        _ => format!("{e:?}"),
    }
}
