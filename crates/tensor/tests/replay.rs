//! Passes that are replayed from graphs, on a GPU. In a process of their own: other tests' work on the main stream would
//! decide where memory is, and so how much of a pass is replayed.

use std::sync::{Mutex, MutexGuard};

use gpusq_tensor::cuda::{Arena, Gpu, Replay};
use gpusq_tensor::ops::dropout::dropout;
use gpusq_tensor::ops::linear::linear;
use gpusq_tensor::ops::mse::mse;
use gpusq_tensor::{Device, Tape, Tensor, normal};

/// The GPU to test on, for one test at a time. `GPUSQ_NEED_GPU` makes its absence a failure.
fn gpu() -> Option<(Gpu, MutexGuard<'static, ()>)> {
    static ALONE: Mutex<()> = Mutex::new(());
    match Gpu::open(0) {
        Ok(gpu) => Some((gpu, ALONE.lock().unwrap_or_else(|e| e.into_inner()))),
        Err(e) => {
            assert!(std::env::var_os("GPUSQ_NEED_GPU").is_none(), "GPUSQ_NEED_GPU is set: {e}");
            println!("skipped: {e}");
            None
        }
    }
}

/// Gradient and loss of a map of `rows` rows with dropout, which `n` decides; computed `times` times. The second wait is
/// after the pass.
fn work(w: &Tensor, rows: usize, n: u64, times: u64) -> Vec<f32> {
    let device = w.device();
    let mut last = None;
    for i in 0..times {
        let tape = Tape::training(n);
        let x = tape.constant(normal(&[rows, 64], 1.0, n + i).to(device));
        let w = tape.leaf(w.clone());
        let mut y = linear(&tape, &x, &w, None);
        for _ in 0..20 {
            y = dropout(&tape, &y, 0.1);
        }
        let loss = mse(&tape, &y, &normal(y.shape(), 1.0, 7).to(device), None);
        let grad = tape.backward(&loss).take(&w).expect("a leaf of the loss");
        last = Some((loss.value().clone(), grad));
    }
    let (loss, grad) = last.expect("computed once at least");
    let mut out = grad.to(Device::Cpu).f32().to_vec();
    out.push(loss.item());
    out
}

fn weight(gpu: Gpu) -> Tensor {
    normal(&[32, 64], 1.0, 1).to(Device::Cuda(gpu))
}

#[test]
fn a_replayed_pass_has_the_bits_of_one_that_is_launched() {
    let Some((gpu, _alone)) = gpu() else { return };
    let w = weight(gpu);
    let mut replay = Replay::new(gpu);
    // Two keys in turns. What is kept in between takes other memory each time.
    for n in 0..12 {
        for rows in [40, 96] {
            let got = replay.run(rows, || work(&w, rows, n, 1));
            let want = work(&w, rows, n, 1);
            assert!(got == want && got.iter().any(|&v| v != 0.0), "{rows} rows, pass {n}");
            let _kept: Vec<Tensor> =
                (0..n).map(|i| normal(&[rows, 32], 1.0, i).to(Device::Cuda(gpu))).collect();
        }
    }
    gpu.check().unwrap();
    assert_eq!((replay.replayed(), replay.differed()), (20, 0));
}

#[test]
fn what_another_pass_asks_for_is_launched() {
    let Some((gpu, _alone)) = gpu() else { return };
    let w = weight(gpu);
    let mut replay = Replay::new(gpu);
    // Longer ones, shorter ones, other sizes, all under one key.
    let passes = [(40, 1), (40, 1), (40, 1), (40, 2), (40, 2), (40, 1), (56, 1), (56, 1), (56, 1), (40, 3)];
    for (n, (rows, times)) in passes.into_iter().enumerate() {
        let got = replay.run((), || work(&w, rows, n as u64, times));
        assert_eq!(got, work(&w, rows, n as u64, times), "pass {n}");
    }
    gpu.check().unwrap();
    assert_eq!((replay.replayed(), replay.differed()), (8, 4));
    // Of what differs each time nothing is expected any more.
    for n in 0..20 {
        let rows = 40 + 8 * n as usize;
        assert_eq!(replay.run((), || work(&w, rows, n, 1)), work(&w, rows, n, 1));
    }
    assert!(replay.replayed() < 14, "{}", replay.replayed());
}

#[test]
fn what_outlives_its_pass_is_not_overwritten() {
    let Some((gpu, _alone)) = gpu() else { return };
    let mut replay = Replay::new(gpu);
    let kept: Vec<Tensor> = (0..5)
        .map(|n| {
            replay.run((), || {
                let x = normal(&[100], 1.0, n).to(Device::Cuda(gpu));
                gpu.check().unwrap();
                x
            })
        })
        .collect();
    for (n, x) in kept.iter().enumerate() {
        assert_eq!(x.to(Device::Cpu), normal(&[100], 1.0, n as u64));
    }
}

#[test]
fn a_pass_that_sends_too_much_is_launched() {
    let Some((gpu, _alone)) = gpu() else { return };
    let mut replay = Replay::new(gpu);
    for n in 0..5 {
        let (small, large) = (normal(&[64], 1.0, n), normal(&[3 << 20], 1.0, n));
        let got = replay.run((), || [&small, &large].map(|x| x.to(Device::Cuda(gpu)).to(Device::Cpu)));
        assert!(got == [small, large], "pass {n}");
    }
}

#[test]
fn a_failure_in_a_replayed_pass_is_handed_over_and_the_next_passes_work() {
    let Some((gpu, _alone)) = gpu() else { return };
    let w = weight(gpu);
    let mut replay = Replay::new(gpu);
    for n in 0..8 {
        let fails = n == 4;
        let got = replay.run((), || {
            let _none = fails.then(|| Tensor::zeros_on(Device::Cuda(gpu), &[1 << 45]));
            work(&w, 40, n, 1)
        });
        assert_eq!(gpu.check().is_err(), fails);
        match fails {
            true => assert!(got.iter().all(|&v| v == 0.0)),
            false => assert_eq!(got, work(&w, 40, n, 1), "pass {n}"),
        }
    }
}

/// Graphs hold work back whose memory is free already, and other threads must not take it.
#[test]
fn other_threads_work_waits_for_a_pass() {
    let Some((gpu, _alone)) = gpu() else { return };
    let w = weight(gpu);
    let want: Vec<Vec<f32>> = (0..30).map(|n| work(&w, 40, n, 3)).collect();
    std::thread::scope(|s| {
        s.spawn(|| {
            for (n, want) in want.iter().enumerate() {
                assert!(work(&w, 40, n as u64, 3) == *want, "beside passes, {n}");
            }
        });
        let mut replay = Replay::new(gpu);
        for (n, want) in want.iter().enumerate() {
            assert!(replay.run((), || work(&w, 40, n as u64, 3)) == *want, "pass {n}");
        }
    });
    // The arena takes the turn from a thread that has none.
    Arena::new(gpu, 1 << 20).unwrap();
    gpu.check().unwrap();
}
