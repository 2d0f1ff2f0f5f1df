//! Streams of their own, and graphs of what is launched on them.
//!
//! A thread inside [`Stream::run`] launches on that stream, and what fails there is that run's failure. Memory is not
//! allocated there: a graph keeps the addresses it was captured with.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::arena::Locked;
use super::{CudaError, EXHAUSTED, Gpu, lock};

/// A stream, and the first failure of what was asked of it.
pub(super) struct Lane {
    stream: Arc<CudaStream>,
    failure: Mutex<Option<CudaError>>,
    /// Whether there is a failure, to ask often.
    has_failed: AtomicBool,
    /// What cuBLASLt may use beside the operands: products in two streams run at the same time.
    workspace: OnceLock<sys::CUdeviceptr>,
}

thread_local! {
    /// Where the thread launches, if that is not a GPU's main stream.
    static CURRENT: Cell<Option<(Gpu, &'static Lane)>> = const { Cell::new(None) };
    /// Host memory that the capture under way copies from and to.
    static CAPTURED: RefCell<Option<Vec<Arc<Locked>>>> = const { RefCell::new(None) };
}

/// The thread's stream on `gpu`, if it is inside [`Stream::run`].
pub(super) fn current(gpu: Gpu) -> Option<&'static Lane> {
    CURRENT.get().filter(|(own, _)| *own == gpu).map(|(_, lane)| lane)
}

/// Keeps host memory for as long as the graph that is being captured.
pub(super) fn keep(memory: &Arc<Locked>) {
    CAPTURED.with_borrow_mut(|kept| {
        if let Some(kept) = kept {
            kept.push(memory.clone());
        }
    });
}

impl Lane {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Lane, DriverError> {
        Ok(Lane {
            stream: context.new_stream()?,
            failure: Mutex::default(),
            has_failed: AtomicBool::new(false),
            workspace: OnceLock::new(),
        })
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    pub(super) fn synchronize(&self) -> Result<(), DriverError> {
        // SAFETY: the stream lives as long as the lane.
        unsafe { result::stream::synchronize(self.stream()) }
    }

    pub(super) fn fail(&self, e: CudaError) {
        lock(&self.failure).get_or_insert(e);
        self.has_failed.store(true, Ordering::Relaxed);
    }

    pub(super) fn failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }

    pub(super) fn take_failure(&self) -> Option<CudaError> {
        let failure = lock(&self.failure).take();
        self.has_failed.store(false, Ordering::Relaxed);
        failure
    }

    /// `bytes` for cuBLASLt, always as many.
    pub(super) fn workspace(&self, gpu: Gpu, bytes: usize) -> Result<sys::CUdeviceptr, CudaError> {
        if let Some(at) = self.workspace.get() {
            return Ok(*at);
        }
        // Not from the pool, which is for work of the main stream.
        // SAFETY: the context lives as long as the process.
        let ask = || gpu.bind().and_then(|()| unsafe { result::malloc_sync(bytes) });
        let got = match ask() {
            Err(e) if e.0 == EXHAUSTED => gpu.reclaim(&mut lock(&gpu.0.pool)).and_then(|()| ask()),
            other => other,
        };
        let at = got.map_err(|e| gpu.refused("allocate what cuBLASLt works in", bytes, e))?;
        // Work on a lane is asked for by one thread at a time, on the main stream by holders of cuBLASLt's plans.
        Ok(*self.workspace.get_or_init(|| at))
    }
}

/// A stream of a GPU for work that does not wait for others' work and does not fail with it.
pub struct Stream {
    gpu: Gpu,
    lane: &'static Lane,
}

impl Stream {
    /// A new stream, once all work on the GPU's main stream is done: what that wrote can be read here.
    ///
    /// # Errors
    /// A failure on the main stream since the last check; what the driver refuses.
    pub fn new(gpu: Gpu) -> Result<Stream, CudaError> {
        gpu.check()?;
        gpu.bind().map_err(|e| gpu.refused("use it", 0, e))?;
        let idle = lock(&gpu.0.idle).pop();
        let lane = match idle {
            Some(lane) => lane,
            // As many live on as were in use at one time.
            None => {
                let lane = Lane::new(&gpu.0.context).map_err(|e| gpu.refused("make a stream", 0, e))?;
                Box::leak(Box::new(lane))
            }
        };
        Ok(Stream { gpu, lane })
    }

    /// The GPU.
    pub fn gpu(&self) -> Gpu {
        self.gpu
    }

    /// Launches what `f` asks for on this stream, waits for it and hands over what failed.
    ///
    /// # Errors
    /// The first failure. After a fault in a kernel the driver refuses all further work of the process
    /// ([`CudaError::Fault`]).
    pub fn run<R>(&mut self, f: impl FnOnce() -> R) -> Result<R, CudaError> {
        let out = self.entered(f);
        self.entered(|| self.gpu.check())?;
        Ok(out)
    }

    /// [`Stream::run`] without waiting.
    fn entered<R>(&self, f: impl FnOnce() -> R) -> R {
        /// Gives the thread its stream back, after a panic too.
        struct Back(Option<(Gpu, &'static Lane)>);
        impl Drop for Back {
            fn drop(&mut self) {
                CURRENT.set(self.0);
            }
        }
        let _back = Back(CURRENT.replace(Some((self.gpu, self.lane))));
        f()
    }

    /// A graph of what `f` launches. Nothing runs; `f` must have run once before, so that its kernels are compiled and
    /// loaded. The tensors it works on must outlive the graph.
    ///
    /// # Errors
    /// What fails in `f`, and what cannot be part of a graph: waiting for the GPU, copies from memory that is not
    /// [`super::Pinned`].
    pub fn capture(&mut self, f: impl FnOnce()) -> Result<Graph, CudaError> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as RELAXED;
        let gpu = self.gpu;
        CAPTURED.set(Some(Vec::new()));
        let graph = self.entered(|| {
            let mut graph = None;
            // SAFETY: the stream lives as long as the lane.
            if gpu.attempt("begin a graph", |gpu| unsafe {
                result::stream::begin_capture(gpu.stream(), RELAXED)
            }) {
                f();
                // SAFETY: as above; ended also where `f` failed.
                match unsafe { result::stream::end_capture(self.lane.stream()) } {
                    Ok(g) if !g.is_null() => graph = Some(g),
                    Ok(_) => {}
                    Err(e) => gpu.fail(gpu.refused("end a graph", 0, e)),
                }
            }
            graph
        });
        let kept = CAPTURED.take().unwrap_or_default();
        let mut exec = None;
        if let Some(graph) = graph {
            self.entered(|| {
                gpu.attempt("make a graph ready", |gpu| {
                    // SAFETY: the graph was just captured; the copy that runs does not need it.
                    exec =
                        Some(unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) }?);
                    unsafe { result::graph::upload(exec.expect("set above"), gpu.stream()) }
                });
            });
            // SAFETY: nobody uses it any more.
            let _ = unsafe { result::graph::destroy(graph) };
        }
        let graph = exec.map(|exec| Graph { gpu, exec, _kept: kept });
        self.entered(|| gpu.check())?;
        Ok(graph.expect("without a failure there is a graph"))
    }

    /// Milliseconds on the GPU of each of `repeats` runs of `f`, which follow each other without a pause.
    ///
    /// # Errors
    /// As [`Stream::run`].
    pub fn times(&mut self, repeats: usize, mut f: impl FnMut()) -> Result<Vec<f64>, CudaError> {
        let gpu = self.gpu;
        let mut events: Vec<Event> = Vec::new();
        self.run(|| {
            for _ in 0..repeats {
                events.extend(Event::record(gpu));
                f();
            }
            events.extend(Event::record(gpu));
        })?;
        let mut times = Vec::with_capacity(repeats);
        self.entered(|| {
            for pair in events.windows(2) {
                self.gpu.attempt("read a time", |_| {
                    // SAFETY: both are live, of this stream and done, as `run` has waited.
                    times.push(f64::from(unsafe { result::event::elapsed(pair[0].0, pair[1].0) }?));
                    Ok(())
                });
            }
            self.gpu.check()
        })?;
        Ok(times)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The tensors it worked on may go next.
        let _ = self.gpu.bind().and_then(|()| self.lane.synchronize());
        self.lane.take_failure();
        lock(&self.gpu.0.idle).push(self.lane);
    }
}

/// Launches that are started together.
pub struct Graph {
    gpu: Gpu,
    exec: sys::CUgraphExec,
    _kept: Vec<Arc<Locked>>,
}

// SAFETY: a graph may be launched and destroyed by any thread; launching takes the one stream of `Stream::run`, whose
// `&mut` keeps two threads apart.
unsafe impl Send for Graph {}

impl Graph {
    /// Starts everything in it on the thread's stream. Panics outside [`Stream::run`]: there nobody would wait for it.
    pub fn launch(&mut self) {
        assert!(current(self.gpu).is_some(), "a graph is launched inside Stream::run");
        // SAFETY: it is live until dropped.
        self.gpu.attempt("launch a graph", |gpu| unsafe { result::graph::launch(self.exec, gpu.stream()) });
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: `Stream::run` has waited for its launches; the driver keeps what may still run.
        let _ = self.gpu.bind().and_then(|()| unsafe { result::graph::exec_destroy(self.exec) });
    }
}

/// A point in a stream, with its time.
struct Event(sys::CUevent);

impl Event {
    /// After all that was asked for so far; `None` if the GPU has failed.
    fn record(gpu: Gpu) -> Option<Event> {
        let mut event = None;
        gpu.attempt("record a time", |gpu| {
            let made = Event(result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT)?);
            // SAFETY: event and stream are live.
            unsafe { result::event::record(made.0, gpu.stream()) }?;
            event = Some(made);
            Ok(())
        });
        event
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `create` and destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{Arena, Pinned};
    use crate::{DType, Device, Tensor};

    /// The GPU to test on. `GPUSQ_NEED_GPU` makes its absence a failure.
    fn gpu() -> Option<Gpu> {
        match Gpu::open(0) {
            Ok(gpu) => Some(gpu),
            Err(e) => {
                assert!(std::env::var_os("GPUSQ_NEED_GPU").is_none(), "GPUSQ_NEED_GPU is set: {e}");
                println!("skipped: {e}");
                None
            }
        }
    }

    /// `y = y + x`, in place.
    fn add(y: &mut Tensor, x: &Tensor) {
        crate::ops::add::accumulate(y, x);
    }

    #[test]
    fn a_graph_repeats_what_was_captured_on_what_its_inputs_are_now() {
        let Some(gpu) = gpu() else { return };
        let arena = Arena::new(gpu, 1 << 16).unwrap();
        let mut place = arena.start();
        let [x, mut y] = [0; 2].map(|_| place.tensor(DType::F32, &[1000]));
        let (mut input, mut output) = (Pinned::new(gpu, 1000).unwrap(), Pinned::new(gpu, 1000).unwrap());
        let mut stream = Stream::new(gpu).unwrap();
        let mut work = |input: &Pinned<f32>, output: &mut Pinned<f32>| {
            y.memory().zero();
            input.upload(&x);
            add(&mut y, &x);
            add(&mut y, &x);
            output.download(&y);
        };
        input.fill(1.0);
        stream.run(|| work(&input, &mut output)).unwrap();
        assert!(output.iter().all(|&v| v == 2.0));
        let mut graph = stream.capture(|| work(&input, &mut output)).unwrap();
        for round in 0..5 {
            input.iter_mut().enumerate().for_each(|(i, v)| *v = (i * round) as f32);
            stream.run(|| graph.launch()).unwrap();
            assert!(output.iter().enumerate().all(|(i, &v)| v == (2 * i * round) as f32), "round {round}");
        }
        // Parts of the memory, whose ends are no multiples of 16 bytes, and what the copy engine takes.
        for n in [1usize, 3, 4, 5, 997, 300_001] {
            let arena = Arena::new(gpu, n * 4).unwrap();
            let t = arena.start().tensor(DType::F32, &[n]);
            let [mut a, mut b] = [0; 2].map(|_| Pinned::<f32>::new(gpu, n + 8).unwrap());
            a.iter_mut().enumerate().for_each(|(i, v)| *v = 1.0 + i as f32);
            stream
                .run(|| {
                    a.upload(&t);
                    b.download(&t);
                })
                .unwrap();
            assert!(b[..n] == a[..n] && b[n..].iter().all(|&v| v == 0.0), "{n}");
        }
        // The graph keeps host memory that it copies.
        drop((input, output));
        stream.run(|| graph.launch()).unwrap();
        let times = stream.times(7, || graph.launch()).unwrap();
        assert!(times.len() == 7 && times.iter().all(|&t| t > 0.0 && t < 1000.0), "{times:?}");
    }

    #[test]
    fn what_fails_on_one_stream_is_no_failure_of_another() {
        let Some(gpu) = gpu() else { return };
        let mut streams = [Stream::new(gpu).unwrap(), Stream::new(gpu).unwrap()];
        let refused = CudaError::Driver { ordinal: 0, what: "test".into(), reason: "none".into() };
        let e = streams[0].run(|| gpu.fail(refused.clone())).unwrap_err();
        assert_eq!(e.to_string(), refused.to_string());
        streams[0].run(|| ()).unwrap();
        streams[1].run(|| ()).unwrap();
        // On the main stream it stops main work only, until it is checked.
        gpu.fail(refused);
        streams[1].run(|| ()).unwrap();
        assert!(gpu.check().is_err() && gpu.check().is_ok());
    }

    #[test]
    fn waiting_inside_a_capture_is_an_error_and_the_stream_works_on() {
        let Some(gpu) = gpu() else { return };
        let x = Tensor::zeros(&[4]).to(Device::Cuda(gpu));
        let mut stream = Stream::new(gpu).unwrap();
        let captured = stream.capture(|| {
            x.to(Device::Cpu);
        });
        assert!(captured.is_err());
        stream.run(|| x.memory().zero()).unwrap();
    }

    #[test]
    fn memory_is_not_allocated_on_a_stream() {
        let Some(gpu) = gpu() else { return };
        let mut stream = Stream::new(gpu).unwrap();
        let run = || stream.run(|| Tensor::zeros(&[4]).to(Device::Cuda(gpu))).map(|_| ());
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        stream.run(|| ()).unwrap();
    }

    /// In a process of its own: no other test could use the GPU afterwards.
    #[test]
    fn after_a_fault_in_a_kernel_every_call_says_so() {
        const NAME: &str = "cuda::stream::tests::after_a_fault_in_a_kernel_every_call_says_so";
        const CHILD: &str = "GPUSQ_TEST_FAULT";
        static BAD: crate::cuda::Source = crate::cuda::Source {
            name: "bad",
            text: "extern \"C\" __global__ void write(int* to) { to[threadIdx.x] = 1; }",
        };
        let Some(gpu) = gpu() else { return };
        if std::env::var_os(CHILD).is_none() {
            let mut test = std::process::Command::new(std::env::current_exe().unwrap());
            let done = test.args(["--exact", NAME, "--nocapture"]).env(CHILD, "1").output().unwrap();
            let said = String::from_utf8_lossy(&done.stdout);
            assert!(done.status.success() && said.contains("every call said so"), "{done:?}");
            return;
        }
        let x = Tensor::zeros(&[4]).to(Device::Cuda(gpu));
        let mut streams = [Stream::new(gpu).unwrap(), Stream::new(gpu).unwrap()];
        let grid = crate::cuda::Grid::blocks(1);
        // An address that nobody has allocated.
        let first = streams[0].run(|| gpu.launch(&BAD, "write", grid, &[4096u64.into()])).unwrap_err();
        let mut said = vec![first];
        for _ in 0..2 {
            said.extend(streams.iter_mut().map(|s| s.run(|| x.memory().zero()).unwrap_err()));
            said.push(Arena::new(gpu, 1 << 20).err().unwrap());
            said.push(Stream::new(gpu).and_then(|mut s| s.run(|| x.memory().zero())).unwrap_err());
        }
        for e in said {
            assert!(matches!(e, CudaError::Fault { .. }), "{e:?}");
            assert!(e.to_string().contains("start it again"), "{e}");
        }
        println!("every call said so");
        // Objects of a context that is lost are not given back.
        std::process::exit(0);
    }

    #[test]
    fn a_launch_that_is_left_out_is_a_failure() {
        let Some(gpu) = gpu() else { return };
        let x = Tensor::zeros(&[100]).to(Device::Cuda(gpu));
        let mut stream = Stream::new(gpu).unwrap();
        // Rows of 20 bytes.
        let e =
            stream.run(|| crate::cuda::TensorMap::boxes(x.memory(), 20, 20, (8, 128)).is_some()).unwrap_err();
        assert!(e.to_string().contains("20 rows of 20 bytes"), "{e}");
        assert!(
            stream.run(|| crate::cuda::TensorMap::boxes(x.memory(), 25, 16, (8, 128)).is_some()).unwrap()
        );
    }

    #[test]
    fn more_memory_than_there_is_is_an_error_and_the_next_try_works() {
        let Some(gpu) = gpu() else { return };
        assert!(matches!(Arena::new(gpu, 1 << 50), Err(CudaError::OutOfMemory { .. })));
        Arena::new(gpu, 1 << 20).unwrap();
    }
}
