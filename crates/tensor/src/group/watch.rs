//! How processes notice that one of them is gone: each says every second that it lives.
//!
//! A process whose connection breaks, or that is silent for long, is lost; one that ends with an error says so. Rank 0
//! tells all the others. Whoever waits for a lost process is woken, and gets an error that names it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::{GroupError, Patience, Seat};

const ALIVE: u8 = 0;
const LEAVING: u8 = 1;
const LOST: u8 = 2;
const FAILED: u8 = 3;

const BEAT: Duration = Duration::from_secs(1);

pub(super) struct Watch {
    rank: usize,
    size: usize,
    patience: Patience,
    last_resort: fn(&GroupError),
    /// To the others, with their ranks.
    links: Vec<(usize, Mutex<TcpStream>)>,
    /// What their work goes over, to wake who waits there.
    work: Mutex<Vec<TcpStream>>,
    failure: Mutex<Option<GroupError>>,
    noticed: Condvar,
    leaving: AtomicBool,
    /// Since when this process is in a sum.
    busy: Mutex<Option<Instant>>,
    /// What ends sums on a GPU.
    abort: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Watch {
    pub(super) fn start(seat: &Seat, work: &[TcpStream], links: Vec<TcpStream>) -> Arc<Watch> {
        let others = (0..seat.size).filter(|&r| r != seat.rank && (seat.rank == 0 || r == 0));
        // Without a second handle nobody would be woken; a machine that refuses one is at its end.
        let same = |s: &TcpStream| s.try_clone().expect("a second handle of a socket");
        let reading: Vec<(usize, TcpStream)> = others.clone().zip(links.iter().map(same)).collect();
        let watch = Arc::new(Watch {
            rank: seat.rank,
            size: seat.size,
            patience: seat.patience,
            last_resort: seat.last_resort,
            links: others.zip(links.into_iter().map(Mutex::new)).collect(),
            work: Mutex::new(work.iter().map(same).collect()),
            failure: Mutex::default(),
            noticed: Condvar::new(),
            leaving: AtomicBool::new(false),
            busy: Mutex::default(),
            abort: Mutex::default(),
        });
        for (rank, link) in reading {
            let watch = watch.clone();
            thread::spawn(move || watch.listen(rank, link));
        }
        let beating = watch.clone();
        thread::spawn(move || beating.beat());
        watch
    }

    /// As if the process were killed: nothing is said, and its connections close.
    #[cfg(test)]
    pub(super) fn vanish(&self) {
        self.leaving.store(true, Ordering::SeqCst);
        self.links.iter().for_each(|(_, link)| lock(link).shutdown(Shutdown::Both).unwrap());
    }

    /// What went wrong, if something did.
    pub(super) fn failure(&self) -> Option<GroupError> {
        lock(&self.failure).clone()
    }

    /// [`Watch::failure`], waited for.
    pub(super) fn wait_for_failure(&self, at_most: Duration) -> Option<GroupError> {
        let failure = lock(&self.failure);
        let waited = self.noticed.wait_timeout_while(failure, at_most, |f| f.is_none());
        waited.map_or(None, |(failure, _)| failure.clone())
    }

    /// Wakes who waits at `link` too, when another process is lost.
    pub(super) fn cover(&self, link: &TcpStream) -> io::Result<()> {
        let mut work = lock(&self.work);
        work.push(link.try_clone()?);
        // One that was lost meanwhile.
        if self.failure().is_some() {
            let _ = link.shutdown(Shutdown::Both);
        }
        Ok(())
    }

    /// Calls `f` when another process is lost.
    pub(super) fn on_failure(&self, f: impl FnOnce() + Send + 'static) {
        *lock(&self.abort) = Some(Box::new(f));
        // One that was lost meanwhile.
        if self.failure().is_some()
            && let Some(f) = lock(&self.abort).take()
        {
            f();
        }
    }

    /// A sum begins, or is done.
    pub(super) fn busy(&self, busy: bool) {
        *lock(&self.busy) = busy.then(Instant::now);
    }

    /// Says goodbye: with a message if this process ends with an error. Of an error that came from another process
    /// all know already.
    pub(super) fn leave(&self, message: Option<&str>) {
        if self.leaving.swap(true, Ordering::SeqCst) {
            return;
        }
        match message.filter(|_| self.failure().is_none()) {
            Some(message) => {
                self.tell(&Self::packed(FAILED, self.rank, message));
                // Those who are told end the connection; what is not read would be lost with it.
                thread::sleep(Duration::from_millis(50));
            }
            None => self.tell(&[LEAVING]),
        }
    }

    fn packed(kind: u8, rank: usize, text: &str) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend((rank as u32).to_le_bytes());
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes
    }

    /// To all who can be told.
    fn tell(&self, message: &[u8]) {
        for (_, link) in &self.links {
            // Whoever cannot be told is noticed by its own listener.
            let _ = lock(link).write_all(message);
        }
    }

    fn beat(&self) {
        while !self.leaving.load(Ordering::SeqCst) && self.failure().is_none() {
            self.tell(&[ALIVE]);
            thread::sleep(BEAT.min(self.patience.silence / 4));
            let since = *lock(&self.busy);
            if since.is_some_and(|t| t.elapsed() > self.patience.sum) {
                let seconds = self.patience.sum.as_secs();
                let message = format!("waited {seconds} s for a sum over all ranks, which did not come");
                let (rank, size) = (self.rank, self.size);
                self.fail(GroupError::Failed { rank, size, message });
            }
        }
    }

    /// Follows what rank `rank` says until it leaves.
    fn listen(&self, rank: usize, mut link: TcpStream) {
        let silence = self.patience.silence;
        let heard = link.set_read_timeout(Some(silence)).and_then(|()| self.follow(&mut link));
        let size = self.size;
        let error = match heard {
            Ok(None) => return,
            Ok(Some(error)) => error,
            Err(_) if self.leaving.load(Ordering::SeqCst) => return,
            Err(e) => {
                let why = match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                        format!("nothing was heard of it for {} s", silence.as_secs())
                    }
                    _ => "its process ended, or its machine cannot be reached".to_string(),
                };
                GroupError::Lost { rank, size, why }
            }
        };
        self.fail(error);
    }

    fn follow(&self, link: &mut TcpStream) -> io::Result<Option<GroupError>> {
        loop {
            let mut kind = [0];
            link.read_exact(&mut kind)?;
            match kind[0] {
                ALIVE => continue,
                LEAVING => return Ok(None),
                _ => {}
            }
            let mut head = [0; 8];
            link.read_exact(&mut head)?;
            let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
            let mut text = vec![0; (number(4) as usize).min(1 << 20)];
            link.read_exact(&mut text)?;
            let text = String::from_utf8_lossy(&text).into_owned();
            let (rank, size) = (number(0) as usize, self.size);
            return Ok(Some(match kind[0] {
                FAILED => GroupError::Failed { rank, size, message: text },
                _ => GroupError::Lost { rank, size, why: text },
            }));
        }
    }

    /// Ends the work of this process and tells the others why, if it is the first failure.
    fn fail(&self, error: GroupError) {
        let message = match &error {
            GroupError::Failed { rank, message, .. } => Self::packed(FAILED, *rank, message),
            GroupError::Lost { rank, why, .. } => Self::packed(LOST, *rank, why),
            _ => unreachable!("these two are noticed here"),
        };
        {
            let mut failure = lock(&self.failure);
            if failure.is_some() {
                return;
            }
            *failure = Some(error.clone());
            // Told before this process can know of it: it would say goodbye, and nobody listens to one that has left.
            self.tell(&message);
        }
        self.noticed.notify_all();
        for link in &*lock(&self.work) {
            let _ = link.shutdown(Shutdown::Both);
        }
        if let Some(abort) = lock(&self.abort).take() {
            abort();
        }
        if self.leaving.load(Ordering::SeqCst) {
            return;
        }
        thread::sleep(self.patience.ending);
        if !self.leaving.load(Ordering::SeqCst) {
            (self.last_resort)(&error);
        }
    }
}
