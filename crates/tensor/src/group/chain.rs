//! Connections between neighbouring ranks, which a pipeline's tensors in host memory go over.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use super::watch::Watch;
use super::{Group, GroupError, Result, receive, rendezvous, send};
use crate::Tensor;

/// A process with a rank one below or one above.
struct Neighbour {
    link: TcpStream,
    /// What is written by a thread of its own: two neighbours that send to each other before they read would wait for
    /// each other.
    outbox: Sender<Tensor>,
}

impl Neighbour {
    fn new(link: TcpStream, watch: &Watch) -> io::Result<Neighbour> {
        // A refusal only costs time.
        let _ = link.set_nodelay(true);
        watch.cover(&link)?;
        let (outbox, waiting) = channel::<Tensor>();
        let writing = link.try_clone()?;
        thread::spawn(move || {
            for t in waiting {
                if send(&writing, &t).is_err() {
                    // Whoever reads at either end learns of it.
                    let _ = writing.shutdown(std::net::Shutdown::Both);
                    return;
                }
            }
        });
        Ok(Neighbour { link, outbox })
    }
}

/// The neighbours of a process.
pub(super) struct Chain {
    before: Option<Neighbour>,
    after: Option<Neighbour>,
}

impl Chain {
    /// Connects all ranks of `group`, each with its neighbours.
    pub(super) fn join(group: &Group, watch: &Watch) -> Result<Chain> {
        let (rank, size) = (group.rank, group.size);
        let failed = |e: io::Error| {
            let message = format!("rank {rank} of {size} cannot connect to its neighbours: {e}");
            group.known().unwrap_or(GroupError::Rendezvous(message))
        };
        // Who reaches rank 0 at an address of this machine's reaches others there.
        let listen = || TcpListener::bind((group.links[0].local_addr()?.ip(), 0));
        let listener = (rank + 1 < size).then(listen).transpose().map_err(failed)?;
        let own = match &listener {
            Some(l) => l.local_addr().map_err(failed)?.to_string(),
            None => String::new(),
        };
        let places = group.gather(&own)?;
        let before = match places.get(rank.wrapping_sub(1)) {
            Some(place) => Some(rendezvous::reach_before(place, rank, size).map_err(failed)?),
            None => None,
        };
        let after = listener.map(|l| rendezvous::take_after(&l, rank, size)).transpose().map_err(failed)?;
        let neighbour = |link: Option<TcpStream>| link.map(|l| Neighbour::new(l, watch)).transpose();
        Ok(Chain { before: neighbour(before).map_err(failed)?, after: neighbour(after).map_err(failed)? })
    }

    fn neighbour(&self, own: usize, rank: usize) -> &Neighbour {
        let found = if rank + 1 == own { &self.before } else { &self.after };
        found.as_ref().filter(|_| rank.abs_diff(own) == 1).expect("tensors go to neighbours")
    }

    /// [`Group::exchange`] of tensors in host memory, from and to this process, which has rank `own`.
    pub(super) fn exchange(
        &self,
        own: usize,
        sent: &[(usize, &Tensor)],
        received: &mut [(usize, Tensor)],
    ) -> std::result::Result<(), (usize, io::Error)> {
        for (rank, t) in sent {
            // The writer has ended where the link broke.
            let queued = self.neighbour(own, *rank).outbox.send((*t).clone());
            queued.map_err(|_| (*rank, io::ErrorKind::UnexpectedEof.into()))?;
        }
        for (rank, t) in received {
            let link = &self.neighbour(own, *rank).link;
            receive(link, t, |own, theirs| *own = theirs).map_err(|e| (*rank, e))?;
        }
        Ok(())
    }
}
