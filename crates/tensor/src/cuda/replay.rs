//! Work that is asked for again and again, such as a training step, from graphs: a kernel that is launched costs the host
//! as much time as a small one runs.
//!
//! The host's side of a pass is not skipped. It allocates, draws and counts as always, and what it asks of the GPU is
//! compared with what it asked for the last time: what is the same is left to a graph, what differs in a kernel's arguments
//! is written into the graph, and anything else is launched as it was asked for. So a graph can do nothing that was not
//! asked for in this very pass, and it has no memory of its own to keep. Comparing is several times faster than launching.
//!
//! A pass is cut into pieces with a graph each, so that the GPU begins with the first while the host compares the next.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use cudarc::driver::{DriverError, result, sys};

use super::arena::Pinned;
use super::blas::Call;
use super::kernels::Variant;
use super::{Arg, CudaError, Gpu, Grid, Memory, lock, stream};

/// Works of a piece: fewer start the GPU earlier, more take fewer launches of graphs.
const PIECE: usize = 32;

/// Passes whose graphs are kept.
const MOST: usize = 64;

/// Bytes that the host sends in one pass; of a pass that sends more, the rest is not replayed.
const STAGING: usize = 8 << 20;

/// Where each upload begins.
const ALIGNMENT: usize = 256;

/// How often in a row a pass may turn out another than the one before; then its works change with every batch.
const CHANCES: usize = 4;

/// The first driver interface that says which node a launch became.
const DRIVER: i32 = 12_030;

/// Something asked of a GPU.
#[derive(Clone, PartialEq)]
pub(super) enum Work {
    /// The bytes of the staging memory.
    Upload(Range<usize>),
    Launch {
        variant: Variant,
        name: &'static str,
        grid: Grid,
        arguments: Vec<Arg>,
        early: bool,
    },
    Zero {
        at: u64,
        bytes: usize,
    },
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Multiply(Call),
}

impl Work {
    /// Asks for it as if no pass were under way; of uploads [`Staging::send`] takes care.
    fn run(&self, gpu: Gpu) {
        match self {
            Work::Upload(_) => {}
            Work::Launch { variant, name, grid, arguments, early } => {
                gpu.start(variant.clone(), name, *grid, arguments, *early);
            }
            Work::Zero { at, bytes } => gpu.zero(*at, *bytes),
            Work::Copy { to, from, bytes } => gpu.copy(*to, *from, *bytes),
            Work::Multiply(call) => gpu.multiply(call),
        }
    }
}

/// What the host sends in a pass: at the same place in each, and to the GPU in few copies.
struct Staging {
    host: RefCell<Pinned<u8>>,
    device: Arc<Memory>,
}

impl Staging {
    fn new(gpu: Gpu) -> Result<Staging, CudaError> {
        let device = gpu.allocate(STAGING);
        gpu.check()?;
        Ok(Staging { host: RefCell::new(Pinned::new(gpu, STAGING)?), device: Arc::new(device) })
    }

    /// Copies what `works` upload.
    fn send(&self, gpu: Gpu, works: &[Work]) {
        let mut uploads = works.iter().filter_map(|w| match w {
            Work::Upload(bytes) => Some(bytes),
            _ => None,
        });
        let Some(first) = uploads.next() else { return };
        let all = first.start..uploads.next_back().unwrap_or(first).end;
        let host = self.host.borrow();
        // SAFETY: both have these bytes, and whoever runs the pass keeps them until it has waited.
        gpu.attempt("copy to the GPU", |gpu| unsafe {
            result::memcpy_htod_async(self.device.at + all.start as u64, &host[all.clone()], gpu.stream())
        });
    }
}

/// A graph of some consecutive works of a pass.
struct Piece {
    gpu: Gpu,
    works: Range<usize>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    /// The node of each launch, null for other works.
    nodes: Vec<sys::CUgraphNode>,
}

impl Piece {
    /// Captures `works[range]`, all of which have run before.
    fn capture(gpu: Gpu, works: &[Work], range: Range<usize>, staging: &Staging) -> Result<Piece, CudaError> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as RELAXED;
        let failed = |what: &str, e| gpu.refused(what, 0, e);
        // SAFETY: the stream lives as long as the process.
        gpu.bind()
            .and_then(|()| unsafe { result::stream::begin_capture(gpu.stream(), RELAXED) })
            .map_err(|e| failed("begin a graph", e))?;
        staging.send(gpu, &works[range.clone()]);
        let mut nodes = Vec::with_capacity(range.len());
        let mut lost = None;
        for work in &works[range.clone()] {
            work.run(gpu);
            nodes.push(match work {
                Work::Launch { .. } => last_node(gpu).unwrap_or_else(|e| {
                    lost = Some(e);
                    ptr::null_mut()
                }),
                _ => ptr::null_mut(),
            });
        }
        // SAFETY: as above; ended also where something failed.
        let graph = unsafe { result::stream::end_capture(gpu.stream()) };
        let failure = gpu.lane().take_failure();
        let graph = graph.map_err(|e| failed("end a graph", e))?;
        let mut piece = Piece { gpu, works: range, graph, exec: ptr::null_mut(), nodes };
        if let Some(e) = failure {
            return Err(e);
        }
        if let Some(e) = lost {
            return Err(failed("find a node of a graph", e));
        }
        let none = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph was just captured.
        piece.exec = unsafe { result::graph::instantiate(piece.graph, none) }
            .map_err(|e| failed("make a graph ready", e))?;
        // SAFETY: as above.
        unsafe { result::graph::upload(piece.exec, gpu.stream()) }
            .map_err(|e| failed("make a graph ready", e))?;
        Ok(piece)
    }

    /// Whether the graph does `work` in place of `known`, the work at `at`.
    fn takes(&self, at: usize, known: &Work, work: &Work) -> bool {
        if known == work {
            return true;
        }
        let (
            Work::Launch { variant, name, grid, early, arguments },
            Work::Launch { variant: v, name: n, grid: g, early: e, arguments: a },
        ) = (known, work)
        else {
            return false;
        };
        let alike = (variant, name, early, grid.threads, grid.shared, arguments.len())
            == (v, n, e, g.threads, g.shared, a.len());
        alike && self.patch(self.nodes[at - self.works.start], v, n, *g, a).is_ok()
    }

    fn patch(
        &self,
        node: sys::CUgraphNode,
        variant: &Variant,
        name: &'static str,
        grid: Grid,
        arguments: &[Arg],
    ) -> Result<(), ()> {
        let func = self.gpu.function(variant.clone(), name).map_err(|_| ())?;
        let [x, y, z] = grid.blocks;
        let mut params = sys::CUDA_KERNEL_NODE_PARAMS {
            func,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            kernelParams: ptr::null_mut(),
            extra: ptr::null_mut(),
            kern: ptr::null_mut(),
            ctx: ptr::null_mut(),
        };
        // SAFETY: the node is of this graph, whose last launch is done, as every pass ends with waiting; the kernel is the
        // node's own, and its arguments are what its launcher has just asked for.
        Arg::passed(arguments, |pointers| unsafe {
            params.kernelParams = pointers.as_mut_ptr();
            sys::cuGraphExecKernelNodeSetParams_v2(self.exec, node, &params).result().map_err(|_| ())
        })
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let _ = self.gpu.bind();
        // SAFETY: made by `capture` and destroyed once; the driver keeps what may still run.
        unsafe {
            if !self.exec.is_null() {
                let _ = result::graph::exec_destroy(self.exec);
            }
            if !self.graph.is_null() {
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}

/// The node that the last launch became.
fn last_node(gpu: Gpu) -> Result<sys::CUgraphNode, DriverError> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut nodes, mut edges, mut count) = (ptr::null(), ptr::null(), 0);
    // SAFETY: writes to these places; the nodes are read before anything else is captured.
    unsafe {
        sys::cuStreamGetCaptureInfo_v3(
            gpu.stream(),
            &mut status,
            ptr::null_mut(),
            ptr::null_mut(),
            &mut nodes,
            &mut edges,
            &mut count,
        )
        .result()?;
        match count {
            1 => Ok(*nodes),
            _ => Err(DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)),
        }
    }
}

/// Keeps other threads off a GPU's main stream during a pass: memory that a work has given back may be taken before a graph
/// does that work, and whatever is launched during a capture is captured.
pub(super) struct Turn {
    _held: Held,
    before: Option<Gpu>,
}

enum Held {
    One(#[expect(dead_code)] RwLockReadGuard<'static, ()>),
    Pass(#[expect(dead_code)] RwLockWriteGuard<'static, ()>),
}

thread_local! {
    /// The GPU whose turn the thread has.
    static TURN: Cell<Option<Gpu>> = const { Cell::new(None) };
}

impl Turn {
    fn new(gpu: Gpu, held: impl FnOnce(&'static RwLock<()>) -> Held) -> Turn {
        let _held = held(&gpu.0.passes);
        Turn { _held, before: TURN.replace(Some(gpu)) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        TURN.set(self.before);
    }
}

/// For one thing that the thread asks of the main stream; `None` if it has the turn, or a stream of its own.
pub(super) fn turn(gpu: Gpu) -> Option<Turn> {
    let has = TURN.get() == Some(gpu) || stream::current(gpu).is_some();
    (!has).then(|| Turn::new(gpu, |passes| Held::One(passes.read().unwrap_or_else(|e| e.into_inner()))))
}

/// A pass that is under way.
struct Pass {
    gpu: Gpu,
    staging: Arc<Staging>,
    /// What the last pass asked for; up to `next` what this one has.
    works: Vec<Work>,
    next: usize,
    pieces: Vec<Piece>,
    /// The piece whose works are being compared. Without one they run as they are asked for, and are noted.
    current: Option<usize>,
    /// Bytes of the staging memory in use.
    staged: usize,
    /// Whether there was a last one.
    noted: bool,
    /// Whether this turned out another.
    differs: bool,
    /// Set once the host has waited for the GPU: what follows is no part of the pass.
    over: bool,
}

thread_local! {
    /// The thread's pass. Taken out while it is worked on: what is asked for then is not a part of it.
    static PASS: RefCell<Option<Box<Pass>>> = const { RefCell::new(None) };
}

/// `f` of the thread's pass, if it is one of `gpu`'s main stream that goes on.
fn with_pass<R>(gpu: Gpu, f: impl FnOnce(&mut Pass) -> R) -> Option<R> {
    let mut pass = PASS.take()?;
    let mine = pass.gpu == gpu && !pass.over && stream::current(gpu).is_none() && !gpu.failed();
    let out = mine.then(|| f(&mut pass));
    PASS.set(Some(pass));
    out
}

/// Whether a graph does `work`, so that the caller must not.
pub(super) fn takes(gpu: Gpu, work: impl FnOnce() -> Work) -> bool {
    with_pass(gpu, |pass| pass.ask(work())).unwrap_or(false)
}

/// A copy of `bytes` on the GPU where the pass has room for up to `most` at this place; `None` outside of passes.
pub(super) fn upload(gpu: Gpu, bytes: &[u8], most: usize) -> Option<Memory> {
    with_pass(gpu, |pass| {
        let from = pass.staged;
        let to = from + bytes.len().max(most).next_multiple_of(ALIGNMENT);
        if to > STAGING {
            pass.end();
            return None;
        }
        pass.staged = to;
        pass.staging.host.borrow_mut()[from..][..bytes.len()].copy_from_slice(bytes);
        let work = Work::Upload(from..to);
        if !pass.ask(work.clone()) {
            pass.staging.send(gpu, &[work]);
        }
        Some(Memory::part(&pass.staging.device, from, bytes.len()))
    })
    .flatten()
}

/// Before the host waits for the GPU, or gives memory back that nobody uses: starts what is left to graphs, and ends the
/// pass.
pub(super) fn end(gpu: Gpu) {
    with_pass(gpu, Pass::end);
}

impl Pass {
    /// Whether a graph does `work`.
    fn ask(&mut self, work: Work) -> bool {
        if let Some(i) = self.current {
            let piece = &self.pieces[i];
            if piece.takes(self.next, &self.works[self.next], &work) {
                self.works[self.next] = work;
                self.next += 1;
                if self.next == piece.works.end {
                    // SAFETY: it is live, and its memory was asked for in this pass.
                    self.gpu.attempt("launch a graph", |gpu| unsafe {
                        result::graph::launch(piece.exec, gpu.stream())
                    });
                    self.current = (i + 1 < self.pieces.len()).then_some(i + 1);
                }
                return true;
            }
            self.leave();
        }
        self.differs = self.noted;
        self.works.truncate(self.next);
        self.works.push(work);
        self.next += 1;
        false
    }

    /// From here on works run as they are asked for; first those that a graph has not done.
    fn leave(&mut self) {
        let Some(i) = self.current.take() else { return };
        let held = &self.works[self.pieces[i].works.start..self.next];
        self.staging.send(self.gpu, held);
        held.iter().for_each(|w| w.run(self.gpu));
        self.pieces.truncate(i);
    }

    fn end(&mut self) {
        self.leave();
        self.differs |= self.next < self.works.len();
        self.works.truncate(self.next);
        self.over = true;
    }

    /// Makes the graphs that are missing.
    fn capture(&mut self) -> Result<(), CudaError> {
        while self.pieces.last().map_or(0, |p| p.works.end) < self.works.len() {
            let from = self.pieces.last().map_or(0, |p| p.works.end);
            let to = self.works.len().min(from + PIECE);
            self.pieces.push(Piece::capture(self.gpu, &self.works, from..to, &self.staging)?);
        }
        Ok(())
    }
}

/// What is known of a pass.
enum Known {
    /// It ran once: what it asked for may not be what it asks for from now on.
    Seen,
    /// What it asked for, and graphs of that.
    Noted { works: Vec<Work>, pieces: Vec<Piece>, chances: usize },
    /// It changes all the time, or graphs cannot be made of it.
    Plain,
}

/// Passes that are run again and again, by key: those with equal keys ask the GPU for nearly the same works. From the
/// third on they are replayed from CUDA graphs, with the same bits as without: the first may do what is done once, the
/// second is noted.
pub struct Replay<K> {
    gpu: Gpu,
    staging: Option<Arc<Staging>>,
    /// With the number of the last use.
    known: HashMap<K, (usize, Known)>,
    runs: usize,
    replayed: usize,
    differed: usize,
}

impl<K: Hash + Eq + Clone> Replay<K> {
    /// Without a pass yet.
    pub fn new(gpu: Gpu) -> Self {
        Replay { gpu, staging: None, known: HashMap::new(), runs: 0, replayed: 0, differed: 0 }
    }

    /// How many passes were replayed.
    pub fn replayed(&self) -> usize {
        self.replayed
    }

    /// Of how many of these a part was launched, because they turned out others than before.
    pub fn differed(&self) -> usize {
        self.differed
    }

    /// `f`, which asks for work on the main stream, and waits for it at its end or in the middle: what comes after that
    /// is not replayed. Other threads' work on the main stream waits until it ends. Panics inside of another pass.
    pub fn run<R>(&mut self, key: K, f: impl FnOnce() -> R) -> R {
        self.runs += 1;
        if self.gpu.failed() {
            return f();
        }
        let known = match self.known.remove(&key) {
            None if super::kernels::driver_version() < DRIVER => Known::Plain,
            None => Known::Seen,
            Some((_, Known::Plain)) => Known::Plain,
            Some((_, Known::Seen)) => return self.pass(key, f, Vec::new(), Vec::new(), CHANCES),
            Some((_, Known::Noted { works, pieces, chances })) => {
                return self.pass(key, f, works, pieces, chances);
            }
        };
        self.keep(key, known);
        f()
    }

    fn pass<R>(
        &mut self,
        key: K,
        f: impl FnOnce() -> R,
        works: Vec<Work>,
        pieces: Vec<Piece>,
        chances: usize,
    ) -> R {
        let gpu = self.gpu;
        assert!(TURN.get().is_none(), "a pass inside of another");
        let _turn = Turn::new(gpu, |passes| Held::Pass(passes.write().unwrap_or_else(|e| e.into_inner())));
        let staging = match self.staging.take().map_or_else(|| Staging::new(gpu).map(Arc::new), Ok) {
            Ok(staging) => staging,
            Err(_) => {
                self.keep(key, Known::Plain);
                return f();
            }
        };
        let (kept, noted) = (staging.clone(), !works.is_empty());
        let mut pass = Box::new(Pass {
            gpu,
            staging,
            works,
            next: 0,
            pieces,
            current: None,
            staged: 0,
            noted,
            differs: false,
            over: false,
        });
        if pass.capture().is_err() {
            // For want of memory, mostly. The step can do without.
            self.staging = Some(kept);
            self.keep(key, Known::Plain);
            return f();
        }
        if noted {
            pass.current = Some(0);
            self.replayed += 1;
        }
        // Memory comes in the same order in every pass.
        lock(&gpu.0.pool).settle();
        /// Takes the pass from the thread, after a panic too.
        struct Taken;
        impl Drop for Taken {
            fn drop(&mut self) {
                PASS.set(None);
            }
        }
        let taken = Taken;
        PASS.set(Some(pass));
        let out = f();
        if with_pass(gpu, Pass::end).is_some() {
            // Nobody has, and what was sent is to be overwritten.
            gpu.attempt("finish", |gpu| gpu.lane().synchronize());
        }
        let pass = PASS.take();
        drop(taken);
        let Some(pass) = pass.filter(|_| !gpu.failed()) else { return out };
        let Pass { works, pieces, differs, staging, .. } = *pass;
        self.differed += usize::from(differs && noted);
        drop(staging);
        // What outlives its pass stays as it is, and the next pass needs another place.
        if Arc::strong_count(&kept.device) == 1 {
            self.staging = Some(kept);
            let chances = if differs { chances - 1 } else { CHANCES };
            let known = match chances {
                0 => Known::Plain,
                _ => Known::Noted { works, pieces, chances },
            };
            self.keep(key, known);
        } else {
            self.keep(key, Known::Plain);
        }
        out
    }

    /// Notes it, and forgets what was not used for the longest time if there is too much.
    fn keep(&mut self, key: K, known: Known) {
        self.known.insert(key, (self.runs, known));
        let noted = |(_, known): &(usize, Known)| matches!(known, Known::Noted { .. });
        if self.known.values().filter(|k| noted(k)).count() > MOST {
            let oldest = self.known.iter().filter(|(_, k)| noted(k)).min_by_key(|(_, k)| k.0);
            if let Some(key) = oldest.map(|(key, _)| key.clone()) {
                self.known.remove(&key);
            }
        }
    }
}
