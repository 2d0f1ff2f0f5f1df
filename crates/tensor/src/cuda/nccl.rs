//! Sums over GPUs, and tensors from one to another, by NCCL, found at run time.
//!
//! cudarc has bindings too, but looks for names under which no current NCCL is installed (`libnccl.so.2`), and the few
//! functions that are needed are soon declared.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use libloading::Library;

use super::{CudaError, DriverError, Gpu, lock, replay, result, sys};
use crate::group::GroupError;
use crate::{DType, Tensor};

/// Bytes of what the processes of a communicator share.
pub(crate) const ID_BYTES: usize = 128;

/// File names, the one that every installation has first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`, `ncclFloat32` and `ncclSum`.
const U8: c_int = 1;
const F32: c_int = 7;
const SUM: c_int = 0;

#[repr(C)]
#[derive(Clone, Copy)]
struct Id([c_char; ID_BYTES]);

type Comm = *mut c_void;

/// The functions, as `nccl.h` declares them since version 2.7.
struct Api {
    get_unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, Id, c_int) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, sys::CUstream) -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, sys::CUstream) -> c_int,
    recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, sys::CUstream) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Since 2.13: the last error's own words.
    get_last_error: Option<unsafe extern "C" fn(Comm) -> *const c_char>,
    _library: Library,
}

/// NCCL, loaded once.
fn api() -> Result<&'static Api, CudaError> {
    static API: OnceLock<Result<Api, String>> = OnceLock::new();
    let missing = |why: &String| CudaError::Library {
        library: "NCCL",
        searched: format!("LD_LIBRARY_PATH and the system's folders for {}: {why}", NAMES.join(", ")),
        remedy: "install it (the system's package libnccl2, or the wheel nvidia-nccl-cu13), and name its folder in \
                 LD_LIBRARY_PATH; one GPU needs none",
    };
    API.get_or_init(load).as_ref().map_err(missing)
}

fn load() -> Result<Api, String> {
    let mut reasons = Vec::new();
    for name in NAMES {
        // SAFETY: loading NCCL runs its initialisers, which are made for it.
        match unsafe { Library::new(name) } {
            Ok(library) => return functions(library).map_err(|e| format!("{name}: {e}")),
            Err(e) => reasons.push(e.to_string()),
        }
    }
    Err(reasons.join("; "))
}

fn functions(library: Library) -> Result<Api, libloading::Error> {
    // SAFETY: the types are those of nccl.h, and the library lives as long as they do.
    unsafe {
        Ok(Api {
            get_unique_id: *library.get(b"ncclGetUniqueId")?,
            comm_init_rank: *library.get(b"ncclCommInitRank")?,
            comm_abort: *library.get(b"ncclCommAbort")?,
            comm_get_async_error: *library.get(b"ncclCommGetAsyncError")?,
            all_reduce: *library.get(b"ncclAllReduce")?,
            send: *library.get(b"ncclSend")?,
            recv: *library.get(b"ncclRecv")?,
            group_start: *library.get(b"ncclGroupStart")?,
            group_end: *library.get(b"ncclGroupEnd")?,
            get_error_string: *library.get(b"ncclGetErrorString")?,
            get_last_error: library.get(b"ncclGetLastError").ok().map(|f| *f),
            _library: library,
        })
    }
}

/// A communicator that another thread may abort.
struct Handle(Comm);

// SAFETY: NCCL's communicators belong to no thread; a mutex keeps calls apart.
unsafe impl Send for Handle {}

/// A stream beside the main one.
struct Side {
    stream: sys::CUstream,
    /// The main stream's work that it waits for, and its own.
    before: sys::CUevent,
    done: sys::CUevent,
    /// Whether it has work that the main stream does not wait for yet.
    pending: AtomicBool,
}

// SAFETY: handles of a context belong to no thread.
unsafe impl Send for Side {}
// SAFETY: they are used while the communicator is locked.
unsafe impl Sync for Side {}

impl Side {
    fn new(gpu: Gpu) -> Result<Side, DriverError> {
        gpu.bind()?;
        let event = || result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING);
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        Ok(Side { stream, before: event()?, done: event()?, pending: AtomicBool::new(false) })
    }

    /// What is asked of it from now on waits for the work that was asked of the main stream.
    fn follow(&self, gpu: Gpu) -> Result<(), DriverError> {
        // SAFETY: events and streams live as long as the process.
        unsafe {
            result::event::record(self.before, gpu.stream())?;
            result::stream::wait_event(
                self.stream,
                self.before,
                sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
            )
        }
    }

    /// Work of its own that the main stream will have to wait for.
    fn asked(&self) -> Result<(), DriverError> {
        self.pending.store(true, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { result::event::record(self.done, self.stream) }
    }

    /// What is asked of the main stream from now on waits for what was asked of this one.
    fn join(&self, gpu: Gpu) -> Result<(), DriverError> {
        if !self.pending.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        // SAFETY: as above.
        unsafe {
            result::stream::wait_event(
                gpu.stream(),
                self.done,
                sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT,
            )
        }
    }
}

/// This process's part of a communicator over the GPUs of a group.
pub(crate) struct Nccl {
    gpu: Gpu,
    api: &'static Api,
    side: Side,
    /// `None` once it is aborted.
    comm: Mutex<Option<Handle>>,
}

fn driver(gpu: Gpu, e: DriverError) -> CudaError {
    CudaError::Driver { ordinal: gpu.ordinal(), what: "use it".into(), reason: super::reason(e) }
}

fn accepted(code: c_int) -> bool {
    matches!(code, SUCCESS | IN_PROGRESS)
}

fn failed(gpu: Gpu, api: &Api, what: &str, code: c_int) -> CudaError {
    // SAFETY: both give texts that live on, or none.
    let words = unsafe {
        let text = |p: *const c_char| match p.is_null() {
            true => String::new(),
            false => CStr::from_ptr(p).to_string_lossy().into_owned(),
        };
        let last = api.get_last_error.map_or(String::new(), |f| text(f(std::ptr::null_mut())));
        [text((api.get_error_string)(code)), last]
    };
    let words: Vec<&str> = words.iter().map(|w| w.trim()).filter(|w| !w.is_empty()).collect();
    CudaError::Driver { ordinal: gpu.ordinal(), what: format!("NCCL: {what}"), reason: words.join(": ") }
}

impl Nccl {
    /// What all processes of a communicator give to [`Nccl::join`]; one makes it.
    pub(crate) fn id() -> Result<[u8; ID_BYTES], CudaError> {
        let api = api()?;
        let mut id = Id([0; ID_BYTES]);
        // SAFETY: writes the 128 bytes.
        let code = unsafe { (api.get_unique_id)(&mut id) };
        if code != SUCCESS {
            return Err(CudaError::Library {
                library: "network that NCCL can use",
                // SAFETY: a text that lives on.
                searched: unsafe { CStr::from_ptr((api.get_error_string)(code)) }
                    .to_string_lossy()
                    .into_owned(),
                remedy: "name an interface in NCCL_SOCKET_IFNAME; NCCL_DEBUG=WARN tells more",
            });
        }
        Ok(id.0.map(|c| c as u8))
    }

    /// Waits for all `size` processes. `given_up` says whether one of them is lost.
    pub(crate) fn join(
        gpu: Gpu,
        id: [u8; ID_BYTES],
        rank: usize,
        size: usize,
        given_up: impl Fn() -> Option<GroupError>,
    ) -> Result<Nccl, GroupError> {
        let api = api()?;
        // What was asked of the GPU before is not mixed up with this.
        gpu.check()?;
        let id = Id(id.map(|b| b as c_char));
        let (done, joined) = channel();
        // In a thread of its own: a lost process could leave it waiting.
        thread::spawn(move || {
            let mut comm = std::ptr::null_mut();
            let code = match gpu.bind() {
                // SAFETY: the context is this thread's, and `comm` outlives the call.
                Ok(()) => unsafe { (api.comm_init_rank)(&mut comm, size as c_int, id, rank as c_int) },
                Err(_) => 1,
            };
            // Nobody waits any more where the group has given up.
            let _ = done.send((code, Handle(comm)));
        });
        loop {
            match joined.recv_timeout(Duration::from_millis(50)) {
                Ok((SUCCESS, comm)) => {
                    let side = Side::new(gpu).map_err(|e| driver(gpu, e))?;
                    return Ok(Nccl { gpu, api, side, comm: Mutex::new(Some(comm)) });
                }
                Ok((code, _)) => {
                    let what = format!("join {size} GPUs as rank {rank}");
                    return Err(given_up().unwrap_or(failed(gpu, api, &what, code).into()));
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(error) = given_up() {
                        return Err(error);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => unreachable!("the thread sends before it ends"),
            }
        }
    }

    /// Replaces f32 tensors by their sums over all processes: one call for all of them, behind the work that was asked
    /// for before; `beside` what is asked for afterwards, until the next sum that is not.
    pub(crate) fn sum(&self, tensors: &mut [&mut Tensor], beside: bool) -> Result<(), CudaError> {
        let memory = tensors.iter_mut().map(|t| {
            assert_eq!(t.dtype(), DType::F32, "sums are of f32 tensors");
            (t.len(), t.memory_mut().address())
        });
        let memory: Vec<(usize, u64)> = memory.filter(|(n, at)| *n > 0 && *at != 0).collect();
        self.grouped("sum over all ranks", beside, |api, comm, stream| {
            let mut codes = memory.iter().map(|&(n, at)| {
                let at = at as *mut c_void;
                // SAFETY: the memory has `n` floats, which this stream alone works on.
                unsafe { (api.all_reduce)(at, at, n, F32, SUM, comm, stream) }
            });
            codes.find(|code| !accepted(*code)).unwrap_or(SUCCESS)
        })
    }

    /// Sends tensors to other processes and fills tensors with what others send, all at once, behind the work that was
    /// asked for before. Of two processes, one receives from the other in the order that is sent in.
    pub(crate) fn exchange(
        &self,
        sent: &[(usize, &Tensor)],
        received: &mut [(usize, Tensor)],
    ) -> Result<(), CudaError> {
        let of = |t: &Tensor| (t.len() * t.dtype().size(), t.memory().address());
        let sent: Vec<_> = sent.iter().map(|(rank, t)| (*rank, of(t))).collect();
        let received: Vec<_> = received
            .iter_mut()
            .map(|(rank, t)| {
                t.memory_mut();
                (*rank, of(t))
            })
            .collect();
        self.grouped("exchange with other ranks", false, |api, comm, stream| {
            let sends = sent.iter().map(|&(rank, (bytes, at))| {
                // SAFETY: the memory has `bytes` bytes, and this stream alone writes them.
                unsafe { (api.send)(at as *const c_void, bytes, U8, rank as c_int, comm, stream) }
            });
            let receipts = received.iter().map(|&(rank, (bytes, at))| {
                // SAFETY: the memory has `bytes` bytes, which this stream alone works on.
                unsafe { (api.recv)(at as *mut c_void, bytes, U8, rank as c_int, comm, stream) }
            });
            sends.chain(receipts).find(|code| !accepted(*code)).unwrap_or(SUCCESS)
        })
    }

    /// Calls `ask` between the begin and the end of a group of NCCL's operations.
    fn grouped(
        &self,
        what: &str,
        beside: bool,
        ask: impl FnOnce(&Api, Comm, sys::CUstream) -> c_int,
    ) -> Result<(), CudaError> {
        let Nccl { gpu, api, .. } = *self;
        let comm = lock(&self.comm);
        let Some(Handle(comm)) = &*comm else { return Ok(()) };
        if gpu.failed() {
            return Ok(());
        }
        replay::end(gpu);
        let _turn = replay::turn(gpu);
        gpu.bind().map_err(|e| driver(gpu, e))?;
        let stream = if beside { self.side.stream } else { gpu.stream() };
        let order = if beside { self.side.follow(gpu) } else { self.side.join(gpu) };
        order.map_err(|e| driver(gpu, e))?;
        let check = |code: c_int| if accepted(code) { Ok(()) } else { Err(failed(gpu, api, what, code)) };
        // SAFETY: takes nothing.
        check(unsafe { (api.group_start)() })?;
        let asked = check(ask(api, *comm, stream));
        // SAFETY: ends what was begun above, also after an error.
        check(unsafe { (api.group_end)() }).and(asked)?;
        if beside {
            self.side.asked().map_err(|e| driver(gpu, e))?;
        }
        let mut code = SUCCESS;
        // SAFETY: writes one number.
        check(unsafe { (api.comm_get_async_error)(*comm, &mut code) })?;
        check(code)
    }

    /// Ends what waits for lost processes. Sums since then are worth nothing.
    pub(crate) fn abort(&self) {
        if let Some(Handle(comm)) = lock(&self.comm).take() {
            // SAFETY: nobody uses it any more. What it answers changes nothing.
            unsafe { (self.api.comm_abort)(comm) };
        }
    }
}
