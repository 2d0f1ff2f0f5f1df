//! Processes that train one model together: what one says to all, sums over all of them, and what goes from one to the
//! next.
//!
//! Each has a rank, from 0. The others connect to rank 0, which listens (`rendezvous`), and all watch each other from
//! then on (`watch`): one that is lost ends them all. Sums of tensors in host memory go through rank 0, which adds in the
//! order of ranks; sums of tensors on GPUs are NCCL's (`cuda::nccl`).

mod chain;
mod rendezvous;
mod watch;

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::cuda::nccl::{ID_BYTES, Nccl};
use crate::cuda::{CudaError, Gpu};
use crate::{DType, Device, Tensor};
use chain::Chain;
use watch::Watch;

/// Why processes cannot work together any more.
#[derive(Clone, Debug, thiserror::Error)]
pub enum GroupError {
    /// They did not come together, or do not fit together.
    #[error("{0}")]
    Rendezvous(String),
    /// One is gone.
    #[error("rank {rank} of {size} was lost: {why}")]
    Lost {
        /// Which.
        rank: usize,
        /// How many there were.
        size: usize,
        /// What was noticed of it.
        why: String,
    },
    /// One ended with an error of its own.
    #[error("rank {rank} of {size} failed: {message}")]
    Failed {
        /// Which.
        rank: usize,
        /// How many there were.
        size: usize,
        /// Its error.
        message: String,
    },
    /// NCCL is missing or refused something.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

impl GroupError {
    /// Whether it came from another process, which says it too.
    pub fn elsewhere(&self) -> bool {
        matches!(self, GroupError::Lost { .. } | GroupError::Failed { .. })
    }
}

/// How long is waited.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For all processes to come.
    pub join: Duration,
    /// For a sign of life of a process; each gives one every second.
    pub silence: Duration,
    /// For a sum over all processes.
    pub sum: Duration,
    /// For a process to end by itself once another is lost, before [`Seat::last_resort`] is called.
    pub ending: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            join: Duration::from_secs(300),
            silence: Duration::from_secs(15),
            sum: Duration::from_secs(600),
            ending: Duration::from_secs(3),
        }
    }
}

/// As whom a process joins, and where.
pub struct Seat {
    /// Its number, from 0.
    pub rank: usize,
    /// How many processes there are.
    pub size: usize,
    /// Host of rank 0.
    pub address: String,
    /// Port that rank 0 listens on.
    pub port: u16,
    /// How long it waits.
    pub patience: Patience,
    /// Called when others are lost and this process has not ended [`Patience::ending`] later: it may be in the middle
    /// of something long, or wait for something that never comes.
    pub last_resort: fn(&GroupError),
}

/// The processes that train together; one alone is a group too.
pub struct Group {
    rank: usize,
    size: usize,
    /// Of rank 0, one to each other rank, in order; of the others, the one to rank 0.
    links: Vec<TcpStream>,
    watch: Option<Arc<Watch>>,
    nccl: OnceLock<Arc<Nccl>>,
    chain: OnceLock<Chain>,
}

static ALONE: Group =
    Group { rank: 0, size: 1, links: Vec::new(), watch: None, nccl: OnceLock::new(), chain: OnceLock::new() };

type Result<T> = std::result::Result<T, GroupError>;

/// Bytes that are converted at a time.
const CHUNK: usize = 1 << 16;

impl Group {
    /// One process by itself.
    pub fn alone() -> &'static Group {
        &ALONE
    }

    /// Waits for all processes and joins them.
    ///
    /// # Errors
    /// [`GroupError::Rendezvous`] that says who did not come, or what is wrong with the address.
    pub fn join(seat: Seat) -> Result<Group> {
        let (rank, size) = (seat.rank, seat.size);
        let (links, watched) = rendezvous::meet(&seat)?;
        let watch = (size > 1).then(|| Watch::start(&seat, &links, watched));
        Ok(Group { rank, size, links, watch, nccl: OnceLock::new(), chain: OnceLock::new() })
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many processes there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether this is rank 0, which speaks and writes for all.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Makes sums of tensors on `device` possible. All ranks must have the same kind of device. A process alone needs no
    /// NCCL for it.
    ///
    /// # Errors
    /// Ranks with different kinds; a missing NCCL; what NCCL refuses, such as two ranks on one GPU.
    pub fn compute_on(&self, device: Device) -> Result<()> {
        let kind = if device == Device::Cpu { "CPU" } else { "GPU" };
        self.agree("device", kind)?;
        match device {
            Device::Cuda(gpu) if self.size > 1 => self.join_nccl(gpu),
            _ => Ok(()),
        }
    }

    fn join_nccl(&self, gpu: Gpu) -> Result<()> {
        let hex: String = match self.is_first() {
            true => Nccl::id()?.iter().map(|b| format!("{b:02x}")).collect(),
            false => String::new(),
        };
        let hex = self.share(&hex)?;
        let byte = |i: usize| hex.get(2 * i..2 * i + 2).and_then(|b| u8::from_str_radix(b, 16).ok());
        let mut id = [0; ID_BYTES];
        for (i, b) in id.iter_mut().enumerate() {
            *b = byte(i).ok_or_else(|| GroupError::Rendezvous("rank 0 sent no id for NCCL".into()))?;
        }
        let given_up = || self.watch.as_ref().and_then(|w| w.failure());
        let nccl = Arc::new(Nccl::join(gpu, id, self.rank, self.size, given_up)?);
        if let Some(watch) = &self.watch {
            let aborted = nccl.clone();
            watch.on_failure(move || aborted.abort());
        }
        // Set once: a process has one device.
        let _ = self.nccl.set(nccl);
        Ok(())
    }

    /// What rank 0 says, `text` there; the others wait for it.
    ///
    /// # Errors
    /// A lost or failed process.
    pub fn share(&self, text: &str) -> Result<String> {
        if !self.is_first() {
            return self.from(0, read_text);
        }
        for rank in 1..self.size {
            self.to(rank, |link| write_text(link, text))?;
        }
        Ok(text.to_string())
    }

    /// What each rank says, `text` here, one line, in the order of ranks.
    ///
    /// # Errors
    /// A lost or failed process.
    pub fn gather(&self, text: &str) -> Result<Vec<String>> {
        let mut all = vec![text.to_string()];
        if self.is_first() {
            for rank in 1..self.size {
                all.push(self.from(rank, read_text)?);
            }
        } else {
            self.to(0, |link| write_text(link, text))?;
        }
        Ok(self.share(&all.join("\n"))?.split('\n').map(str::to_string).collect())
    }

    /// Makes sure that all ranks say the same about `what`.
    ///
    /// # Errors
    /// The first line that differs, for all ranks; a lost or failed process.
    pub fn agree(&self, what: &str, text: &str) -> Result<()> {
        let mut verdict = String::new();
        if self.is_first() {
            for rank in 1..self.size {
                let theirs = self.from(rank, read_text)?;
                if theirs == text || !verdict.is_empty() {
                    continue;
                }
                let (mut a, mut b) = (theirs.lines(), text.lines());
                let differ = std::iter::from_fn(|| Some((a.next()?, b.next()?))).find(|(a, b)| a != b);
                // One has lines that the other has not.
                let (a, b) = differ.unwrap_or(("one of other length", "it"));
                verdict = format!(
                    "rank {rank} has another {what} than rank 0, `{a}` for `{b}`: start all ranks with the same command, \
                     model and data"
                );
            }
        } else {
            self.to(0, |link| write_text(link, text))?;
        }
        let verdict = self.share(&verdict)?;
        if verdict.is_empty() { Ok(()) } else { Err(GroupError::Rendezvous(verdict)) }
    }

    /// Gives all ranks the values that the tensors have on rank 0: f32 or u8 in host memory, of the same shapes
    /// everywhere.
    ///
    /// # Errors
    /// A lost or failed process.
    pub fn broadcast(&self, tensors: &mut [&mut Tensor]) -> Result<()> {
        for t in tensors {
            match self.is_first() {
                true => (1..self.size).try_for_each(|rank| self.to(rank, |link| send(link, t)))?,
                false => self.from(0, |link| receive(link, t, |own, theirs| *own = theirs))?,
            }
        }
        Ok(())
    }

    /// Replaces f32 tensors, of the same shapes everywhere and all on the group's device, by their sums over all ranks,
    /// which have the same bits on each. Does not wait for a GPU; [`Group::check`] comes after what does.
    ///
    /// # Errors
    /// A lost or failed process; what NCCL refuses.
    pub fn sum(&self, tensors: &mut [&mut Tensor]) -> Result<()> {
        self.add(tensors, false)
    }

    /// [`Group::sum`] that a GPU does beside what is asked of it afterwards, until the next sum that is not such a one:
    /// nobody reads or changes the tensors before. On CPUs it is done at once.
    ///
    /// # Errors
    /// As [`Group::sum`].
    pub fn sum_beside(&self, tensors: &mut [&mut Tensor]) -> Result<()> {
        self.add(tensors, true)
    }

    fn add(&self, tensors: &mut [&mut Tensor], beside: bool) -> Result<()> {
        if self.size == 1 && self.nccl.get().is_none() {
            return Ok(());
        }
        if let Some(watch) = &self.watch {
            watch.busy(true);
        }
        if let Some(nccl) = self.nccl.get() {
            // A lost process aborts the communicator, and is the better explanation.
            return nccl.sum(tensors, beside).map_err(|e| self.known().unwrap_or(e.into()));
        }
        if self.is_first() {
            for rank in 1..self.size {
                let add = |link: &TcpStream, t: &mut Tensor| receive(link, t, |own, theirs| *own += theirs);
                self.from(rank, |link| tensors.iter_mut().try_for_each(|t| add(link, t)))?;
            }
            for rank in 1..self.size {
                self.to(rank, |link| tensors.iter().try_for_each(|t| send(link, t)))?;
            }
        } else {
            self.to(0, |link| tensors.iter().try_for_each(|t| send(link, t)))?;
            let set = |link: &TcpStream, t: &mut Tensor| receive(link, t, |own, theirs| *own = theirs);
            self.from(0, |link| tensors.iter_mut().try_for_each(|t| set(link, t)))?;
        }
        self.check()
    }

    /// Gives rank 0 the values that tensors, f32 or u8 in host memory, have on the ranks that are named with them, which
    /// are the same everywhere.
    ///
    /// # Errors
    /// A lost or failed process.
    pub fn collect(&self, tensors: &mut [(usize, &mut Tensor)]) -> Result<()> {
        for (owner, t) in tensors.iter_mut().filter(|(owner, _)| *owner != 0) {
            if self.is_first() {
                self.from(*owner, |link| receive(link, t, |own, theirs| *own = theirs))?;
            } else if self.rank == *owner {
                self.to(0, |link| send(link, t))?;
            }
        }
        Ok(())
    }

    /// Makes [`Group::exchange`] possible. All ranks call it, after [`Group::compute_on`].
    ///
    /// # Errors
    /// A lost or failed process; what the network refuses.
    pub fn connect_neighbours(&self) -> Result<()> {
        if let (Some(watch), None, None) = (&self.watch, self.nccl.get(), self.chain.get()) {
            let _ = self.chain.set(Chain::join(self, watch)?);
        }
        Ok(())
    }

    /// Sends tensors to neighbouring ranks and gives what they send here: for each rank in `wanted` a tensor of the shape
    /// beside it, with elements of type `dtype` on `device`, which is the group's (f32 on a CPU). What is wanted of a
    /// rank comes in the order in which that sends it. Does not wait for a GPU; [`Group::check`] comes after what does.
    ///
    /// # Errors
    /// A lost or failed process; what NCCL refuses.
    pub fn exchange(
        &self,
        sent: &[(usize, &Tensor)],
        wanted: &[(usize, &[usize])],
        device: Device,
        dtype: DType,
    ) -> Result<Vec<Tensor>> {
        if let Some(watch) = &self.watch {
            watch.busy(true);
        }
        let empty = |shape: &[usize]| match device {
            Device::Cpu => Tensor::stale(shape),
            Device::Cuda(gpu) => Tensor::stale_of(gpu, dtype, shape),
        };
        let mut received: Vec<(usize, Tensor)> =
            wanted.iter().map(|(rank, shape)| (*rank, empty(shape))).collect();
        if let Some(nccl) = self.nccl.get() {
            nccl.exchange(sent, &mut received).map_err(|e| self.known().unwrap_or(e.into()))?;
        } else {
            let chain = self.chain.get().expect("neighbours are connected first");
            chain.exchange(self.rank, sent, &mut received).map_err(|(rank, e)| self.broken(rank, e))?;
            self.check()?;
        }
        Ok(received.into_iter().map(|(_, t)| t).collect())
    }

    /// Ends a sum or an exchange: whoever waited for the GPU calls this before looking at the result.
    ///
    /// # Errors
    /// A process was lost or failed, and sums since then are worth nothing.
    pub fn check(&self) -> Result<()> {
        let Some(watch) = &self.watch else { return Ok(()) };
        watch.busy(false);
        watch.failure().map_or(Ok(()), Err)
    }

    /// Tells the others that this process ends with an error.
    pub fn fail(&self, message: &str) {
        if let Some(watch) = &self.watch {
            watch.leave(Some(message));
        }
    }

    fn link(&self, rank: usize) -> &TcpStream {
        &self.links[if self.is_first() { rank - 1 } else { 0 }]
    }

    fn to(&self, rank: usize, f: impl FnOnce(&TcpStream) -> io::Result<()>) -> Result<()> {
        f(self.link(rank)).map_err(|e| self.broken(rank, e))
    }

    fn from<T>(&self, rank: usize, f: impl FnOnce(&TcpStream) -> io::Result<T>) -> Result<T> {
        f(self.link(rank)).map_err(|e| self.broken(rank, e))
    }

    /// What is known about a failure, once the watch had time to notice it.
    fn known(&self) -> Option<GroupError> {
        self.watch.as_ref().and_then(|w| w.wait_for_failure(Duration::from_secs(2)))
    }

    fn broken(&self, rank: usize, e: io::Error) -> GroupError {
        let why = match e.kind() {
            io::ErrorKind::InvalidData => return GroupError::Rendezvous(e.to_string()),
            io::ErrorKind::UnexpectedEof => "it ended before this rank did".to_string(),
            _ => e.to_string(),
        };
        self.known().unwrap_or(GroupError::Lost { rank, size: self.size, why })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(watch) = &self.watch
            && !std::thread::panicking()
        {
            watch.leave(None);
        }
    }
}

fn write_text(mut link: &TcpStream, text: &str) -> io::Result<()> {
    link.write_all(&(text.len() as u64).to_le_bytes())?;
    link.write_all(text.as_bytes())
}

fn read_text(mut link: &TcpStream) -> io::Result<String> {
    let mut len = [0; 8];
    link.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len);
    let mut bytes = Vec::new();
    link.take(len).read_to_end(&mut bytes)?;
    if (bytes.len() as u64) < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    String::from_utf8(bytes).map_err(|_| mixed_up())
}

/// Two processes that are at different places of their work.
fn mixed_up() -> io::Error {
    let message =
        "the ranks are not at the same place: were all started with the same command and version of gpusq?";
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// An element on its way between processes.
trait Sent: Copy {
    const BYTES: usize;
    fn put(self, to: &mut [u8]);
    fn get(from: &[u8]) -> Self;
}

impl Sent for f32 {
    const BYTES: usize = 4;
    fn put(self, to: &mut [u8]) {
        to.copy_from_slice(&self.to_le_bytes());
    }
    fn get(from: &[u8]) -> f32 {
        f32::from_le_bytes([from[0], from[1], from[2], from[3]])
    }
}

impl Sent for u8 {
    const BYTES: usize = 1;
    fn put(self, to: &mut [u8]) {
        to[0] = self;
    }
    fn get(from: &[u8]) -> u8 {
        from[0]
    }
}

fn send(link: &TcpStream, t: &Tensor) -> io::Result<()> {
    fn all<T: Sent>(mut link: &TcpStream, elements: &[T]) -> io::Result<()> {
        link.write_all(&(elements.len() as u64).to_le_bytes())?;
        let mut bytes = [0; CHUNK];
        for part in elements.chunks(CHUNK / T::BYTES) {
            let filled = &mut bytes[..part.len() * T::BYTES];
            part.iter().zip(filled.chunks_exact_mut(T::BYTES)).for_each(|(x, to)| x.put(to));
            link.write_all(filled)?;
        }
        Ok(())
    }
    match t.dtype() {
        DType::F32 => all(link, t.f32()),
        DType::U8 => all(link, t.u8()),
        other => panic!("{other:?} elements do not travel between processes"),
    }
}

/// Combines each element of `t` with the one that is received; of masks, which are not summed, takes the received one.
fn receive(link: &TcpStream, t: &mut Tensor, f: impl Fn(&mut f32, f32)) -> io::Result<()> {
    fn all<T: Sent>(mut link: &TcpStream, own: &mut [T], f: impl Fn(&mut T, T)) -> io::Result<()> {
        let mut len = [0; 8];
        link.read_exact(&mut len)?;
        if u64::from_le_bytes(len) != own.len() as u64 {
            return Err(mixed_up());
        }
        let mut bytes = [0; CHUNK];
        for part in own.chunks_mut(CHUNK / T::BYTES) {
            let filled = &mut bytes[..part.len() * T::BYTES];
            link.read_exact(filled)?;
            part.iter_mut().zip(filled.chunks_exact(T::BYTES)).for_each(|(x, from)| f(x, T::get(from)));
        }
        Ok(())
    }
    match t.dtype() {
        DType::F32 => all(link, t.f32_mut(), f),
        DType::U8 => all(link, t.u8_mut(), |own, theirs| *own = theirs),
        other => panic!("{other:?} elements do not travel between processes"),
    }
}

#[cfg(test)]
mod tests;
