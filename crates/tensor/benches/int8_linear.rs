//! The INT8 linear layer against an f32 matrix product of the same shape.
//!
//! `cargo bench -p gpusq-tensor --bench int8_linear`. The two alternate, so that whatever else the machine
//! does meets both; the best and the median time of each are printed with their ratios.

use std::hint::black_box;
use std::time::{Duration, Instant};

use gpusq_tensor::ops::int8_linear::{Int8Weight, linear, quantize};

/// Time for each shape, shared by what is compared.
const BUDGET: Duration = Duration::from_millis(1500);

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

/// `y = x wᵀ` by the f32 library, with the strides of row-major operands.
fn f32_product(x: &[f32], w: &[f32], y: &mut [f32], [tokens, out, cols]: [usize; 3]) {
    assert!(x.len() == tokens * cols && w.len() == out * cols && y.len() == tokens * out);
    // SAFETY: the lengths were just checked against the extents and strides.
    unsafe {
        gemm::gemm(
            tokens,
            out,
            cols,
            y.as_mut_ptr(),
            1,
            out as isize,
            false,
            x.as_ptr(),
            1,
            cols as isize,
            w.as_ptr(),
            cols as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(rayon::current_num_threads()),
        );
    }
}

fn time(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn main() {
    println!("{} threads; microseconds, best / median", rayon::current_num_threads());
    println!(
        "{:>18}  {:>17}  {:>17}  {:>15}  {:>17}  {:>21}",
        "tokens x out x in", "f32", "int8", "ratio", "quantize input", "int8 best, GOP/s"
    );
    for shape @ [tokens, out, cols] in [
        [1024, 384, 384],
        [1024, 1536, 384],
        [1024, 384, 1536],
        [1024, 1024, 4096],
        [16, 768, 3072],
        [8, 768, 768],
        [1, 768, 768],
    ] {
        let (x8, w8) = (codes(tokens * cols, 1), codes(out * cols, 2));
        let weight = Int8Weight::new(&w8, out, cols);
        let x: Vec<f32> = x8.iter().map(|&c| f32::from(c)).collect();
        let w: Vec<f32> = w8.iter().map(|&c| f32::from(c)).collect();
        let (scale, bias) = (vec![0.01f32; out], vec![1.0f32; out]);
        let (mut y, mut y8, mut q) = (vec![0f32; tokens * out], vec![0f32; tokens * out], x8.clone());
        let mut times = [vec![], vec![], vec![]];
        let start = Instant::now();
        while start.elapsed() < BUDGET {
            times[0].push(time(|| f32_product(black_box(&x), black_box(&w), &mut y, shape)));
            times[1].push(time(|| linear(black_box(&x8), tokens, &weight, &scale, Some(&bias), &mut y8)));
            times[2].push(time(|| quantize(black_box(&x), 1.3, &mut q)));
        }
        let [f32_time, int8_time, quantize_time] = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            [times[0] * 1e6, times[times.len() / 2] * 1e6]
        });
        println!(
            "{:>18}  {:>8.1}/{:>8.1}  {:>8.1}/{:>8.1}  {:>7.2}/{:>7.2}  {:>8.1}/{:>8.1}  {:>21.0}",
            format!("{tokens} x {out} x {cols}"),
            f32_time[0],
            f32_time[1],
            int8_time[0],
            int8_time[1],
            f32_time[0] / int8_time[0],
            f32_time[1] / int8_time[1],
            quantize_time[0],
            quantize_time[1],
            2.0 * (tokens * out * cols) as f64 / int8_time[0] / 1e3,
        );
    }
}
