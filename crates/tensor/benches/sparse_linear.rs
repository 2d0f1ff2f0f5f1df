//! The engine's linear map on a GPU: every kernel at the shapes of BERT-base and BERT-large.
//!
//! `cargo bench -p gpusq-tensor --bench sparse_linear [-- few]`: microseconds of a launch, the median of graph replays
//! that rotate three sets of random codes and outputs, and the rate as if all products of the dense map were made. `few`
//! takes 384 and 128 tokens instead of 12,288. `norm`: 12 blocks of output map, norm, FFN-in, FFN-out and norm, each map with
//! the norm behind it in two kernels or in one.

use std::cell::RefCell;

use gpusq_tensor::cuda::{Gpu, Stream};
use gpusq_tensor::ops::activation::Activation;
use gpusq_tensor::ops::codes::Codes;
use gpusq_tensor::ops::norm_codes::{Norm, Out as Written, Summand, add_norm};
use gpusq_tensor::ops::sparse_linear::{
    AddNorm, Epilogue, Kernel, NormedKernel, Store, Weight, kernels, normed_kernels, prepare, prepare_normed,
    sparse_linear, sparse_linear_norm,
};
use gpusq_tensor::{DType, Device, Tensor, f16};

/// Launches in a graph, and replays.
const LAUNCHES: usize = 12;
const REPLAYS: usize = 15;

/// Kernels without a norm that are tried before one is timed with it.
const TRIED: usize = 6;

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

/// A map and the norm behind it.
struct Normed {
    w: Weight,
    e: Epilogue,
    gain: Tensor,
}

/// How these are computed.
#[derive(Clone, Copy)]
enum Way {
    Two(Kernel),
    One(NormedKernel),
}

impl Normed {
    fn new(gpu: Gpu, rows: usize, cols: usize, out: Out) -> Normed {
        let gain = Tensor::full(&[rows], 1.0).to(Device::Cuda(gpu));
        Normed { w: weight(gpu, rows, cols, true), e: epilogue(gpu, rows, cols, out), gain }
    }

    fn norm(&self) -> Norm<'_> {
        Norm::Layer { gain: &self.gain, bias: &self.gain, eps: 1e-12 }
    }

    /// `hidden` is the residual, too; what is added to it passes through `added`.
    fn launch(&self, way: Way, x: &Tensor, added: &mut Tensor, hidden: &Tensor, codes: &Tensor) {
        let norm = self.norm();
        let out = Written { hidden: Some(hidden), codes: Some(Codes { to: codes, step: 0.05 }) };
        match way {
            Way::Two(kernel) => {
                sparse_linear(&kernel, x, &self.w, &self.e, added);
                let summand = match added.dtype() {
                    DType::F16 => Summand::Half(added),
                    _ => Summand::Codes(added, 0.04),
                };
                add_norm(summand, Some(hidden), norm, out);
            }
            Way::One(kernel) => {
                let then = AddNorm { pair: 0.04, residual: hidden, norm, out };
                sparse_linear_norm(&kernel, x, &self.w, &self.e, then);
            }
        }
    }

    /// The fastest kernel of its own, and those with the norm in them.
    fn ways(&self, stream: &mut Stream, xs: &[Tensor]) -> Vec<(String, Way)> {
        let tokens = xs[0].rows();
        let own = kernels(&self.w, tokens).into_iter().take(TRIED);
        let best =
            own.map(|k| (time(stream, &k, xs, &self.w, &self.e), k)).min_by(|a, b| a.0.total_cmp(&b.0));
        let (_, best) = best.expect("there are kernels for every map");
        let fused = normed_kernels(&self.w, tokens).into_iter().map(|k| (k.to_string(), Way::One(k)));
        std::iter::once((format!("{best} and norm"), Way::Two(best))).chain(fused).collect()
    }
}

fn median(stream: &mut Stream, launches: &mut dyn FnMut()) -> f64 {
    stream.run(&mut *launches).expect("the kernels run");
    let mut graph = stream.capture(&mut *launches).expect("they can be captured");
    let mut times = stream.times(REPLAYS + 3, || graph.launch()).expect("they can be timed").split_off(3);
    times.sort_by(f64::total_cmp);
    times[REPLAYS / 2] * 1e3
}

/// Maps and norms alone and in a chain of 12 blocks without attention, whose weights differ.
fn bench_norms(gpu: Gpu, tokens: usize, width: usize) {
    const BLOCKS: usize = 12;
    let inner = 4 * width;
    let on = Device::Cuda(gpu);
    let block = |_| {
        let ffn_in = (weight(gpu, inner, width, true), epilogue(gpu, inner, width, Out::Gelu));
        (Normed::new(gpu, width, width, Out::Codes), ffn_in, Normed::new(gpu, width, inner, Out::Half))
    };
    let blocks: Vec<_> = (0..BLOCKS).map(block).collect();
    let i8s = |width: usize, seed| Tensor::from_i8(codes(tokens * width, seed), &[tokens, width]).to(on);
    let halves = || Tensor::from_f16(vec![f16::ONE; tokens * width], &[tokens, width]).to(on);
    let mut stream = Stream::new(gpu).expect("a stream");
    let (mixed, codes, hidden) = ([11, 12, 13].map(|s| i8s(width, s)), i8s(width, 14), halves());
    let mut inners = [15, 16, 17].map(|s| i8s(inner, s));
    let (mut added, mut added_halves) = (i8s(width, 18), halves());
    let (first, (w, e), second) = &blocks[0];
    // At once, on all threads.
    let all = [(w, e), (&first.w, &first.e), (&second.w, &second.e)];
    let own =
        all.iter().flat_map(|&(w, e)| kernels(w, tokens).into_iter().take(TRIED).map(move |k| (k, w, e)));
    prepare(&own.collect::<Vec<_>>());
    let normed = [first, second]
        .into_iter()
        .flat_map(|n| normed_kernels(&n.w, tokens).into_iter().map(move |k| (k, &n.w, &n.e, n.norm())));
    prepare_normed(&normed.collect::<Vec<_>>());
    let out = first.ways(&mut stream, &mixed);
    let ffn_out = second.ways(&mut stream, &inners);
    let ffn_in = kernels(w, tokens).into_iter().take(TRIED).map(|k| (time(&mut stream, &k, &mixed, w, e), k));
    let (_, ffn_in) = ffn_in.min_by(|a, b| a.0.total_cmp(&b.0)).expect("there are kernels for every map");
    println!("{width} wide, {tokens} tokens, FFN-in by {ffn_in}");
    for (what, ways) in [("output", &out), ("FFN-out", &ffn_out)] {
        for (name, way) in ways {
            let us = median(&mut stream, &mut || {
                for k in 0..BLOCKS {
                    match what {
                        "output" => blocks[k].0.launch(*way, &mixed[k % 3], &mut added, &hidden, &codes),
                        _ => blocks[k].2.launch(*way, &inners[k % 3], &mut added_halves, &hidden, &codes),
                    }
                }
            });
            println!("  {what:<8} {name:<44} {:8.2} us alone", us / BLOCKS as f64);
        }
    }
    let mut chain = |out: &(String, Way), ffn_out: &(String, Way)| {
        let us = median(&mut stream, &mut || {
            for (first, (w, e), second) in &blocks {
                first.launch(out.1, &mixed[0], &mut added, &hidden, &codes);
                sparse_linear(&ffn_in, &codes, w, e, &mut inners[0]);
                second.launch(ffn_out.1, &inners[0], &mut added_halves, &hidden, &codes);
            }
        });
        println!("  {:<44} {:<44} {:8.2} us a block", out.0, ffn_out.0, us / BLOCKS as f64);
    };
    chain(&out[0], &ffn_out[0]);
    out[1..].iter().for_each(|o| chain(o, &ffn_out[0]));
    ffn_out[1..].iter().for_each(|f| chain(&out[0], f));
    for o in out[1..].iter().take(3) {
        ffn_out[1..].iter().take(3).for_each(|f| chain(o, f));
    }
    chain(&out[0], &ffn_out[0]);
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
    if std::env::args().any(|a| a == "norm") {
        for (width, tokens) in
            [768, 1024, 384].into_iter().flat_map(|w| [16, 128, 384, 768, 1536].map(|t| (w, t)))
        {
            bench_norms(gpu, tokens, width);
        }
        return;
    }
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
