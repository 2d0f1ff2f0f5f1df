//! The engine's linear map on a GPU: every kernel at the shapes of BERT-base and BERT-large.
//!
//! `cargo bench -p gpusq-tensor --bench sparse_linear [-- few]`: microseconds of a launch, the median of graph replays
//! that rotate three sets of random codes and outputs, and the rate as if all products of the dense map were made. `few`
//! takes 384 and 128 tokens instead of 12,288.

use std::cell::RefCell;

use gpusq_tensor::cuda::{Gpu, Stream};
use gpusq_tensor::ops::activation::Activation;
use gpusq_tensor::ops::sparse_linear::{Epilogue, Kernel, Store, Weight, kernels, sparse_linear};
use gpusq_tensor::{DType, Device, Tensor, f16};

/// Launches in a graph, and replays.
const LAUNCHES: usize = 12;
const REPLAYS: usize = 15;

/// How the map is stored: codes (those of its output pair, if it has one); codes of GELU after an output pair; halves.
#[derive(Clone, Copy, Debug)]
enum Out {
    Codes,
    Gelu,
    Half,
}

/// Codes that look random enough to keep the arithmetic honest (xorshift).
fn codes(n: usize, mut seed: u64) -> Vec<i8> {
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 33) as i64
    };
    (0..n).map(|_| (next() % 255 - 127) as i8).collect()
}

/// A weight whose kept places vary from group to group.
fn weight(gpu: Gpu, rows: usize, cols: usize, sparse: bool) -> Weight {
    if !sparse {
        return Weight::dense(gpu, &Tensor::from_i8(codes(rows * cols, 5), &[rows, cols]));
    }
    const NIBBLES: [u8; 6] = [0x4, 0x8, 0x9, 0xC, 0xD, 0xE];
    let places = codes(rows * cols.div_ceil(8) * 2, 7);
    let nibble = |c: i8| NIBBLES[c.unsigned_abs() as usize % 6];
    let meta = places.chunks_exact(2).map(|p| nibble(p[0]) | nibble(p[1]) << 4).collect();
    Weight::sparse(
        gpu,
        &Tensor::from_i8(codes(rows * cols / 2, 3), &[rows, cols / 2]),
        &Tensor::from_u8(meta, &[rows, cols.div_ceil(8)]),
    )
}

fn epilogue(gpu: Gpu, rows: usize, cols: usize, out: Out) -> Epilogue {
    let of = |value: f32| Tensor::full(&[rows], value).to(Device::Cuda(gpu));
    // Sums of random codes spread as the root of their number; y then spreads by about 1.5.
    let scale = of(1.5 / (74.0 * 74.0 * (cols as f32 / 2.0).sqrt()));
    let store = match out {
        Out::Codes => Store::Codes { activation: None, step: of(0.04) },
        Out::Gelu => Store::table(gpu, Activation::Gelu, 0.04, 0.04, 100.0),
        Out::Half => Store::Half,
    };
    let output_step = matches!(out, Out::Gelu).then(|| of(0.04));
    Epilogue { scale, bias: Some(of(0.1)), output_step, store }
}

/// Median microseconds of a launch.
fn time(stream: &mut Stream, kernel: &Kernel, xs: &[Tensor], w: &Weight, e: &Epilogue) -> f64 {
    let out = || {
        let shape = [xs[0].rows(), w.rows()];
        let n = shape[0] * shape[1];
        let t = match e.store.dtype() {
            DType::F16 => Tensor::from_f16(vec![f16::ZERO; n], &shape),
            _ => Tensor::from_i8(vec![0; n], &shape),
        };
        RefCell::new(t.to(xs[0].device()))
    };
    let outs = [out(), out(), out()];
    let launch = |k: usize| sparse_linear(kernel, &xs[k % 3], w, e, &mut outs[k % 3].borrow_mut());
    stream.run(|| (0..3).for_each(launch)).expect("the kernel runs");
    let mut graph = stream.capture(|| (0..LAUNCHES).for_each(launch)).expect("it can be captured");
    let mut times = stream.times(REPLAYS + 3, || graph.launch()).expect("it can be timed").split_off(3);
    times.sort_by(f64::total_cmp);
    times[REPLAYS / 2] * 1e3 / LAUNCHES as f64
}

fn bench(gpu: Gpu, tokens: usize, rows: usize, cols: usize, sparse: bool, out: Out) {
    let w = weight(gpu, rows, cols, sparse);
    let e = epilogue(gpu, rows, cols, out);
    let xs: Vec<Tensor> = (0..3)
        .map(|k| Tensor::from_i8(codes(tokens * cols, 11 + k), &[tokens, cols]).to(Device::Cuda(gpu)))
        .collect();
    let mut stream = Stream::new(gpu).expect("a stream");
    let mut times: Vec<(f64, Kernel)> =
        kernels(&w, tokens).into_iter().map(|k| (time(&mut stream, &k, &xs, &w, &e), k)).collect();
    let default = times[0];
    times.sort_by(|a, b| a.0.total_cmp(&b.0));
    let kind = if sparse { "2:4" } else { "dense" };
    println!("{rows}x{cols}, {tokens} tokens, {kind}, {out:?}; by default {}", default.1);
    for (us, kernel) in times {
        let rate = 2.0 * (rows * cols * tokens) as f64 / us * 1e-6;
        println!("  {kernel:<40} {us:9.2} us {rate:7.0} TOP/s");
    }
}

fn main() {
    let gpu = match Device::named("cuda") {
        Ok((Device::Cuda(gpu), _)) => gpu,
        Ok(_) | Err(_) => {
            println!("no GPU here: nothing to measure");
            return;
        }
    };
    println!("{}", gpu.name());
    let base =
        [(2304, 768, Out::Codes), (768, 768, Out::Codes), (3072, 768, Out::Gelu), (768, 3072, Out::Half)];
    if std::env::args().any(|a| a == "few") {
        for tokens in [384, 128] {
            for (rows, cols, out) in base {
                bench(gpu, tokens, rows, cols, true, out);
            }
        }
        return;
    }
    for (rows, cols, out) in base {
        bench(gpu, 12_288, rows, cols, true, out);
    }
    bench(gpu, 12_288, 3072, 768, true, Out::Codes);
    for (rows, cols, out) in [
        (3072, 1024, Out::Codes),
        (1024, 1024, Out::Codes),
        (4096, 1024, Out::Gelu),
        (4096, 1024, Out::Codes),
        (1024, 4096, Out::Half),
    ] {
        bench(gpu, 12_288, rows, cols, true, out);
    }
    for (rows, cols, out) in base {
        bench(gpu, 12_288, rows, cols, false, out);
    }
    bench(gpu, 8192, 8192, 8192, true, Out::Half);
}
