//! How processes find each other: rank 0 listens, the others connect, and each says who it is.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::{GroupError, Seat};

/// The first words of a process of this version.
const HELLO: &[u8; 8] = b"gpusq 1\n";

/// Time between two tries.
const AGAIN: Duration = Duration::from_millis(30);

/// How long the answer of one that is connected may take, where it is not all the others that are waited for.
const ANSWER: Duration = Duration::from_secs(10);

/// Each process has two connections to rank 0.
const CHANNELS: usize = 2;

/// What one says that connects to the rank before it.
const NEIGHBOUR: usize = CHANNELS;

type Links = Vec<TcpStream>;

/// Connections for work and for watching: of rank 0 one to each other rank, of the others one to rank 0.
pub(super) fn meet(seat: &Seat) -> Result<(Links, Links), GroupError> {
    assert!(seat.rank < seat.size, "rank {} of {}", seat.rank, seat.size);
    if seat.size == 1 {
        return Ok((Vec::new(), Vec::new()));
    }
    let until = Instant::now() + seat.patience.join;
    let [work, watched] = if seat.rank == 0 { receive(seat, until) } else { reach(seat, until) }?;
    for link in work.iter().chain(&watched) {
        // A refusal of either only costs time, or waits longer.
        let _ = link.set_nodelay(true);
        let _ = link.set_read_timeout(None);
    }
    Ok((work, watched))
}

fn failed(message: String) -> GroupError {
    GroupError::Rendezvous(message)
}

/// Rank 0: takes the others in.
fn receive(seat: &Seat, until: Instant) -> Result<[Links; CHANNELS], GroupError> {
    let place = format!("{}:{}", seat.address, seat.port);
    let listener = listen(seat).map_err(|e| {
        failed(match e.kind() {
            io::ErrorKind::AddrInUse => {
                format!(
                    "{place} is in use: choose another MASTER_PORT, or end the process that listens there"
                )
            }
            _ => format!("rank 0 cannot listen at {place}: {e}; check MASTER_ADDR and MASTER_PORT"),
        })
    })?;
    let stopped = |e: io::Error| failed(format!("rank 0 cannot listen at {place}: {e}"));
    listener.set_nonblocking(true).map_err(stopped)?;
    let mut seats: [Vec<Option<TcpStream>>; CHANNELS] =
        [(); CHANNELS].map(|()| (1..seat.size).map(|_| None).collect());
    while seats.iter().flatten().any(Option::is_none) {
        match listener.accept() {
            Ok((link, _)) => {
                // One that says something else is no process of ours.
                let Some((rank, size, channel)) = hello(&link) else { continue };
                let taken =
                    rank >= 1 && rank < seat.size && channel < CHANNELS && seats[channel][rank - 1].is_some();
                let wrong = if size != seat.size {
                    format!("rank {rank} was started with WORLD_SIZE {size} and rank 0 with {}", seat.size)
                } else if rank == 0 || rank >= size || channel >= CHANNELS {
                    format!("a process came as rank {rank} of {size}")
                } else if taken {
                    format!("two processes were started with RANK {rank}")
                } else {
                    seats[channel][rank - 1] = Some(link);
                    continue;
                };
                // All that came hear why it ends.
                for link in seats.iter().flatten().flatten().chain([&link]) {
                    let _ = answer(link, &wrong);
                }
                return Err(failed(wrong));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= until {
                    let missing = (1..seat.size).filter(|r| seats[0][r - 1].is_none());
                    let missing: Vec<String> = missing.map(|r| r.to_string()).collect();
                    return Err(failed(format!(
                        "rank 0 waited {} s at {place} and of {} ranks these did not come: {}; start one process for \
                         each RANK from 0 to {} with the same MASTER_ADDR and MASTER_PORT",
                        seat.patience.join.as_secs(),
                        seat.size,
                        missing.join(", "),
                        seat.size - 1
                    )));
                }
                std::thread::sleep(AGAIN);
            }
            Err(e) => return Err(stopped(e)),
        }
    }
    let links = seats.map(|seats| seats.into_iter().flatten().collect::<Links>());
    for link in links.iter().flatten() {
        // Of one that is gone already, the watch tells.
        let _ = answer(link, "");
    }
    Ok(links)
}

/// Only this machine can connect where rank 0's address is this machine's own loopback.
fn listen(seat: &Seat) -> io::Result<TcpListener> {
    let found = (seat.address.as_str(), seat.port).to_socket_addrs()?.next();
    let ip = match found.map(|a| a.ip()) {
        Some(ip) if ip.is_loopback() => ip,
        Some(IpAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    TcpListener::bind(SocketAddr::new(ip, seat.port))
}

fn greeting(rank: usize, size: usize, channel: u8) -> Vec<u8> {
    let mut message = HELLO.to_vec();
    message.extend((rank as u32).to_le_bytes());
    message.extend((size as u32).to_le_bytes());
    message.push(channel);
    message
}

/// Connects to the rank before `rank`, which listens at `place`.
pub(super) fn reach_before(place: &str, rank: usize, size: usize) -> io::Result<TcpStream> {
    let mut link = TcpStream::connect(place)?;
    link.write_all(&greeting(rank, size, NEIGHBOUR as u8))?;
    Ok(link)
}

/// Takes the rank after `rank` in.
pub(super) fn take_after(listener: &TcpListener, rank: usize, size: usize) -> io::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let until = Instant::now() + ANSWER;
    loop {
        match listener.accept() {
            Ok((link, _)) if hello(&link) == Some((rank + 1, size, NEIGHBOUR)) => {
                link.set_read_timeout(None)?;
                return Ok(link);
            }
            // A stranger.
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(AGAIN)
            }
            Err(e) => return Err(e),
        }
    }
}

/// Rank, number of ranks and channel of one that connects.
fn hello(mut link: &TcpStream) -> Option<(usize, usize, usize)> {
    link.set_nonblocking(false).ok()?;
    link.set_read_timeout(Some(ANSWER)).ok()?;
    let mut bytes = [0; 8 + 4 + 4 + 1];
    link.read_exact(&mut bytes).ok()?;
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
    (bytes[..8] == *HELLO).then(|| (number(8), number(12), bytes[16] as usize))
}

/// Takes the other end in, or says why not.
fn answer(mut link: &TcpStream, refusal: &str) -> io::Result<()> {
    let mut bytes = HELLO.to_vec();
    bytes.extend((refusal.len() as u32).to_le_bytes());
    bytes.extend(refusal.as_bytes());
    link.write_all(&bytes)
}

/// Another rank: connects to rank 0, which may start later.
fn reach(seat: &Seat, until: Instant) -> Result<[Links; CHANNELS], GroupError> {
    let mut links = [const { Vec::new() }; CHANNELS];
    for channel in 0..CHANNELS {
        let link = connect(seat, channel as u8, links[0].first(), until)?;
        links[channel].push(link);
    }
    for link in links.iter().flatten() {
        // Rank 0 answers when all are there; it gives up first, and says for whom it waited.
        let left = until.saturating_duration_since(Instant::now()) + ANSWER;
        let refusal = answered(link, left).map_err(|e| {
            let place = format!("{}:{}", seat.address, seat.port);
            let why = match e.kind() {
                io::ErrorKind::InvalidData => "what listens there is no gpusq of this version".to_string(),
                io::ErrorKind::UnexpectedEof => "rank 0 ended".to_string(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    format!("not all {} ranks came within {} s", seat.size, seat.patience.join.as_secs())
                }
                _ => e.to_string(),
            };
            failed(format!("rank {} of {} was not taken in at {place}: {why}", seat.rank, seat.size))
        })?;
        if !refusal.is_empty() {
            return Err(failed(refusal));
        }
    }
    Ok(links)
}

fn answered(mut link: &TcpStream, within: Duration) -> io::Result<String> {
    link.set_read_timeout(Some(within))?;
    let mut start = [0; 12];
    link.read_exact(&mut start)?;
    let len = u32::from_le_bytes(start[8..].try_into().expect("four bytes"));
    if start[..8] != *HELLO || len > 1 << 16 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = vec![0; len as usize];
    link.read_exact(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Connects for `channel`; on `first`, if there is one already, rank 0 may meanwhile say why it does not want this rank.
fn connect(
    seat: &Seat,
    channel: u8,
    first: Option<&TcpStream>,
    until: Instant,
) -> Result<TcpStream, GroupError> {
    let message = greeting(seat.rank, seat.size, channel);
    loop {
        let tried = TcpStream::connect((seat.address.as_str(), seat.port))
            .and_then(|mut link| link.write_all(&message).map(|()| link));
        let e = match tried {
            Ok(link) => return Ok(link),
            Err(e) => e,
        };
        if let Some(refusal) = first.and_then(|link| answered(link, AGAIN).ok()) {
            return Err(failed(refusal));
        }
        if Instant::now() >= until {
            return Err(failed(format!(
                "rank {} of {} found no rank 0 at {}:{} for {} s ({e}); check MASTER_ADDR and MASTER_PORT, and that rank \
                 0 was started",
                seat.rank,
                seat.size,
                seat.address,
                seat.port,
                seat.patience.join.as_secs()
            )));
        }
        std::thread::sleep(AGAIN);
    }
}
