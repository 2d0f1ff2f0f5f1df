use std::net::TcpListener;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::cuda::Gpu;

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn seat(rank: usize, size: usize, port: u16) -> Seat {
    let patience = Patience {
        join: Duration::from_secs(20),
        silence: Duration::from_secs(4),
        sum: Duration::from_secs(60),
        ending: Duration::from_secs(60),
    };
    let last_resort = |e: &GroupError| panic!("{e}");
    Seat { rank, size, address: "127.0.0.1".into(), port, patience, last_resort }
}

/// Runs `f` as each of `size` ranks and gives what they returned.
fn ranks<T: Send>(size: usize, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    seated(size, |seat| seat, f)
}

/// [`ranks`], who join as `change` says.
fn seated<T: Send>(size: usize, change: fn(Seat) -> Seat, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let port = free_port();
    thread::scope(|s| {
        let f = &f;
        let join = move |rank| Group::join(change(seat(rank, size, port))).unwrap();
        let all: Vec<_> = (0..size).map(|rank| s.spawn(move || f(join(rank)))).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn a_sum_that_does_not_come_is_given_up() {
    let quick =
        |seat: Seat| Seat { patience: Patience { sum: Duration::from_secs(1), ..seat.patience }, ..seat };
    let got = seated(2, quick, |g| {
        let mut t = Tensor::full(&[10], 1.0);
        if g.rank() == 1 {
            // It is elsewhere, and alive.
            thread::sleep(Duration::from_secs(4));
        }
        g.sum(&mut [&mut t]).unwrap_err().to_string()
    });
    for error in got {
        assert_eq!(error, "rank 0 of 2 failed: waited 1 s for a sum over all ranks, which did not come");
    }
}

#[test]
fn a_process_in_the_middle_of_something_is_ended_when_others_are_lost() {
    static ENDED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let impatient = |seat: Seat| Seat {
        patience: Patience { ending: Duration::from_millis(100), ..seat.patience },
        last_resort: |e| ENDED.lock().unwrap().push(e.to_string()),
        ..seat
    };
    seated(2, impatient, |g| match g.rank() {
        0 => thread::sleep(Duration::from_secs(2)),
        _ => g.fail("out of memory"),
    });
    assert_eq!(*ENDED.lock().unwrap(), ["rank 1 of 2 failed: out of memory"]);
}

#[test]
fn sums_are_of_all_ranks_in_their_order_and_the_same_everywhere() {
    // Longer than what is converted at a time, and values whose sum depends on the order.
    let n = CHUNK / 4 + 77;
    let value = |rank: usize, i: usize| ((i * 31 + rank * 7919) % 1013) as f32 * 0.1 + 1e4 * rank as f32;
    let of = |rank| Tensor::from_f32((0..n).map(|i| value(rank, i)).collect(), &[n]);
    for size in [1, 2, 3, 5] {
        let want: Vec<f32> =
            (0..n).map(|i| (1..size).fold(value(0, i), |sum, r| sum + value(r, i))).collect();
        let got = ranks(size, |g| {
            let (mut big, mut small) = (of(g.rank()), Tensor::scalar(g.rank() as f32));
            g.sum(&mut [&mut big, &mut small]).unwrap();
            (big, small.item())
        });
        for (big, small) in got {
            assert!(big.f32() == want, "{size} ranks");
            assert_eq!(small, (0..size).sum::<usize>() as f32);
        }
    }
}

#[test]
fn all_get_what_rank_0_has() {
    let got = ranks(3, |g| {
        let mut t = Tensor::full(&[20_000], g.rank() as f32 + 1.0);
        let mut mask = Tensor::from_u8(vec![g.rank() as u8; 5], &[5]);
        g.broadcast(&mut [&mut t, &mut mask]).unwrap();
        let text = g.share(&format!("it is {}", g.rank())).unwrap();
        (t, mask, text)
    });
    for (t, mask, text) in got {
        assert!(t.f32().iter().all(|&x| x == 1.0) && mask.u8() == [0; 5] && text == "it is 0");
    }
}

/// Both neighbours send more than the network takes before either reads, and each gets the other's, in order.
#[test]
fn neighbours_exchange_tensors() {
    let n = 1 << 20;
    let of = |rank: usize, k: usize| Tensor::full(&[n, 2], (10 * rank + k) as f32);
    let got = ranks(4, |g| {
        g.connect_neighbours().unwrap();
        let (rank, shape) = (g.rank(), [n, 2]);
        let around: Vec<usize> = [rank.wrapping_sub(1), rank + 1].into_iter().filter(|&r| r < 4).collect();
        let own: Vec<Tensor> = (0..2).map(|k| of(rank, k)).collect();
        let sent: Vec<(usize, &Tensor)> =
            around.iter().flat_map(|&r| own.iter().map(move |t| (r, t))).collect();
        let wanted: Vec<(usize, &[usize])> = around.iter().flat_map(|&r| [(r, &shape[..]); 2]).collect();
        let got = g.exchange(&sent, &wanted, Device::Cpu, DType::F32).unwrap();
        let want: Vec<Tensor> = around.iter().flat_map(|&r| [of(r, 0), of(r, 1)]).collect();
        assert!(got == want, "rank {rank}");
        // Nothing goes on, and nothing comes.
        assert!(g.exchange(&[], &[], Device::Cpu, DType::F32).unwrap().is_empty());
        let mut all: Vec<Tensor> = (0..4).map(|r| of(if r == rank { r } else { 9 }, 7)).collect();
        g.collect(&mut all.iter_mut().enumerate().collect::<Vec<_>>()).unwrap();
        all
    });
    assert!(got[0].iter().enumerate().all(|(r, t)| *t == of(r, 7)));
}

#[test]
fn a_rank_that_is_lost_wakes_the_neighbour_who_waits_for_it() {
    let got = ranks(3, |g| {
        g.connect_neighbours().unwrap();
        if g.rank() == 2 {
            g.fail("the disk is full");
            return String::new();
        }
        let wanted = [(g.rank() + 1, &[5][..])];
        g.exchange(&[], &wanted, Device::Cpu, DType::F32).unwrap_err().to_string()
    });
    assert_eq!([&got[0], &got[1]], ["rank 2 of 3 failed: the disk is full"; 2]);
}

#[test]
fn what_ranks_disagree_on_is_named_by_all() {
    let got = ranks(3, |g| {
        g.agree("version", "1").unwrap();
        let rate = if g.rank() == 2 { 4 } else { 3 };
        g.agree("setting", &format!("a = 1\nrate = {rate}")).unwrap_err().to_string()
    });
    for error in got {
        assert!(
            error.starts_with("rank 2 has another setting than rank 0, `rate = 4` for `rate = 3`"),
            "{error}"
        );
    }
}

#[test]
fn a_rank_that_fails_ends_all_with_its_error() {
    let clock = Instant::now();
    let got = ranks(3, |g| {
        if g.rank() == 1 {
            g.fail("the disk is full");
            return String::new();
        }
        let mut t = Tensor::full(&[1000], 1.0);
        g.sum(&mut [&mut t]).unwrap_err().to_string()
    });
    assert_eq!([&got[0], &got[2]], ["rank 1 of 3 failed: the disk is full"; 2]);
    assert!(clock.elapsed() < Duration::from_secs(10), "{:?}", clock.elapsed());
}

/// A process that is gone without a word, as if killed: its sockets close.
#[test]
fn a_rank_that_is_lost_ends_all_and_is_named() {
    for lost in [0, 1] {
        let got = ranks(3, |g| {
            if g.rank() == lost {
                g.watch.as_ref().unwrap().vanish();
                return String::new();
            }
            let mut t = Tensor::full(&[1000], 1.0);
            g.sum(&mut [&mut t]).unwrap_err().to_string()
        });
        for (rank, error) in got.iter().enumerate().filter(|(rank, _)| *rank != lost) {
            let want = format!("rank {lost} of 3 was lost: its process ended");
            assert!(error.starts_with(&want), "rank {rank}: {error}");
        }
    }
}

#[test]
fn ranks_that_do_not_come_or_do_not_fit_are_named() {
    let quick = |seat: Seat, ms: u64| Seat {
        patience: Patience { join: Duration::from_millis(ms), ..seat.patience },
        ..seat
    };
    let error = |seat: Seat| Group::join(seat).err().unwrap().to_string();
    let e = error(quick(seat(0, 3, free_port()), 300));
    assert!(e.contains("of 3 ranks these did not come: 1, 2"), "{e}");
    let port = free_port();
    let e = error(quick(seat(1, 2, port), 300));
    assert!(e.contains(&format!("found no rank 0 at 127.0.0.1:{port}")), "{e}");

    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let e = error(seat(0, 2, held.local_addr().unwrap().port()));
    assert!(e.contains("is in use: choose another MASTER_PORT"), "{e}");

    for (other, what) in
        [((1, 3), "rank 1 was started with WORLD_SIZE 3 and rank 0 with 2"), ((0, 2), "is in use")]
    {
        let port = free_port();
        let (a, b) = thread::scope(|s| {
            let first =
                s.spawn(move || Group::join(quick(seat(0, 2, port), 2000)).err().unwrap().to_string());
            thread::sleep(Duration::from_millis(200));
            (Group::join(seat(other.0, other.1, port)).err().unwrap().to_string(), first.join().unwrap())
        });
        assert!(a.contains(what), "{a}");
        assert!(other.0 == 0 || b.contains(what), "{b}");
    }
    // Rank 1 twice in a group of three.
    let port = free_port();
    let errors = thread::scope(|s| {
        let all: Vec<_> = [0, 1, 1].map(|r| s.spawn(move || error(seat(r, 3, port)))).into_iter().collect();
        all.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(errors.iter().all(|e| e.contains("two processes were started with RANK 1")), "{errors:?}");
}

/// Whatever else connects to the port, a web browser or a port scanner, is sent away.
#[test]
fn strangers_do_not_disturb() {
    let port = free_port();
    thread::scope(|s| {
        let first = s.spawn(move || Group::join(seat(0, 2, port)).unwrap().size());
        let stranger = loop {
            if let Ok(link) = TcpStream::connect(("127.0.0.1", port)) {
                break link;
            }
        };
        (&stranger).write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let second = s.spawn(move || Group::join(seat(1, 2, port)).unwrap().rank());
        assert_eq!((first.join().unwrap(), second.join().unwrap()), (2, 1));
    });
}

/// A group of one through NCCL: that it is found and its functions are what is declared.
#[test]
fn nccl_sums_on_a_gpu() {
    let Ok(gpu) = Gpu::open(0) else {
        assert!(std::env::var_os("GPUSQ_NEED_GPU").is_none(), "GPUSQ_NEED_GPU is set");
        println!("skipped: no GPU");
        return;
    };
    let device = Device::Cuda(gpu);
    let group = Group::join(seat(0, 1, free_port())).unwrap();
    group.compute_on(device).unwrap();
    assert!(group.nccl.get().is_none(), "one process sums nothing");
    match group.join_nccl(gpu) {
        Ok(()) => {}
        Err(e) if std::env::var_os("GPUSQ_NEED_NCCL").is_none() => return println!("skipped: {e}"),
        Err(e) => panic!("{e}"),
    }
    let (mut a, mut b) = (Tensor::full(&[1000], 2.5).to(device), Tensor::scalar(-1.0).to(device));
    let shared = a.clone();
    // First beside the main stream, then on it, and what is added between the two does not wait.
    group.sum_beside(&mut [&mut a]).unwrap();
    group.sum(&mut [&mut a, &mut b]).unwrap();
    device.check().unwrap();
    group.check().unwrap();
    assert_eq!(
        (a, b.item(), shared.to(Device::Cpu)),
        (Tensor::full(&[1000], 2.5), -1.0, Tensor::full(&[1000], 2.5))
    );
}
