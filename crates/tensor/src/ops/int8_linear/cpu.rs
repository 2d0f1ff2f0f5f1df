//! The kernels: one portable, one for AVX2, one for AVX-512 VNNI, chosen when the program runs.
//!
//! A weight is cut into panels of outputs. Within a panel the codes of a few neighbouring inputs (`depth`)
//! of each output lie together, which is what the dot-product instruction of the kernel takes, output after
//! output, and then the next inputs: a kernel reads its panel from front to back. A tile of tokens by panel
//! is held in registers while the whole row is summed, so an accumulator never goes to memory.

use std::ops::Range;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

impl Kernel {
    /// Those that this CPU can run, fastest last.
    pub(super) fn available() -> impl Iterator<Item = Kernel> {
        [
            Some(Kernel::Portable),
            #[cfg(target_arch = "x86_64")]
            is_x86_feature_detected!("avx2").then_some(Kernel::Avx2),
            #[cfg(target_arch = "x86_64")]
            (is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni"))
            .then_some(Kernel::Avx512Vnni),
        ]
        .into_iter()
        .flatten()
    }

    pub(super) fn best() -> Kernel {
        Self::available().last().unwrap_or(Kernel::Portable)
    }

    /// Inputs of an output that lie together.
    fn depth(self) -> usize {
        match self {
            Kernel::Portable => 1,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => 2,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => 4,
        }
    }

    /// Outputs that an accumulator register holds.
    fn lanes(self) -> usize {
        match self {
            Kernel::Portable => 1,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2::LANES,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => vnni::LANES,
        }
    }

    /// Registers of outputs that make a panel. (The last panel may have fewer.)
    fn vectors(self) -> usize {
        match self {
            Kernel::Portable => 1,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2::VECTORS,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => vnni::VECTORS,
        }
    }

    /// Tokens of a tile.
    pub(super) fn tokens(self) -> usize {
        match self {
            Kernel::Portable => 1,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2::TOKENS,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => vnni::TOKENS,
        }
    }

    /// The byte that stands for code 0. `vpdpbusd` multiplies unsigned by signed bytes; the weight takes the
    /// unsigned place, as code + 128, so that activations are read as they are.
    fn zero(self) -> u8 {
        match self {
            Kernel::Portable => 0,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => 0,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => 128,
        }
    }

    /// See [`super::quantize`]; on this thread.
    pub(super) fn quantize(self, x: &[f32], scale: f32, codes: &mut [i8]) {
        match self {
            Kernel::Portable => quantize(x, scale, codes),
            // SAFETY: a kernel exists only where its instructions were detected.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { avx2::quantize(x, scale, codes) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => unsafe { vnni::quantize(x, scale, codes) },
        }
    }
}

/// Where finished accumulators go. The pointers are to the start of `[tokens, out]`.
pub(super) enum Sink<'a> {
    I32(*mut i32),
    F32 { y: *mut f32, scale: &'a [f32], bias: Option<&'a [f32]> },
}

// SAFETY: threads write through the pointers, but each to its own blocks (`Panels::multiply`).
unsafe impl Sync for Sink<'_> {}

impl Sink<'_> {
    /// Stores one accumulator: element `at` of the output, of output feature `o`.
    ///
    /// # Safety
    /// `at` lies within the output and no other thread writes it.
    #[inline(always)]
    unsafe fn put(&self, at: usize, o: usize, acc: i32) {
        match *self {
            // SAFETY: promised by the caller.
            Sink::I32(p) => unsafe { p.add(at).write(acc) },
            Sink::F32 { y, scale, bias } => {
                let scaled = acc as f32 * scale[o];
                // SAFETY: promised by the caller.
                unsafe { y.add(at).write(bias.map_or(scaled, |b| scaled + b[o])) }
            }
        }
    }
}

/// A cache line: panels start on one, so that no vector load straddles two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A reordered weight.
#[derive(Clone)]
pub(super) struct Panels {
    kernel: Kernel,
    lines: Vec<Line>,
    rows: usize,
    cols: usize,
}

impl Panels {
    pub(super) fn new(kernel: Kernel, codes: &[i8], rows: usize, cols: usize) -> Self {
        let (depth, lanes) = (kernel.depth(), kernel.lanes());
        let bytes = rows.next_multiple_of(lanes) * cols.next_multiple_of(depth);
        let mut panels =
            Panels { kernel, lines: vec![Line([kernel.zero(); 64]); bytes.div_ceil(64)], rows, cols };
        // SAFETY: a `Line` is 64 initialised bytes without padding.
        let packed = unsafe {
            std::slice::from_raw_parts_mut(panels.lines.as_mut_ptr().cast::<u8>(), panels.lines.len() * 64)
        };
        let panel_rows = kernel.vectors() * lanes;
        for first in (0..rows).step_by(panel_rows) {
            let width = (rows - first).next_multiple_of(lanes).min(panel_rows);
            let panel = &mut packed[first * cols.next_multiple_of(depth)..];
            for o in first..rows.min(first + width) {
                let row = &codes[o * cols..][..cols];
                for (step, group) in row.chunks(depth).enumerate() {
                    for (place, &code) in panel[(step * width + o - first) * depth..].iter_mut().zip(group) {
                        *place = (code as u8).wrapping_add(kernel.zero());
                    }
                }
            }
        }
        panels
    }

    pub(super) fn kernel(&self) -> Kernel {
        self.kernel
    }

    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(self.kernel.vectors() * self.kernel.lanes())
    }

    /// The products of `tokens` with the outputs of `panels`, stored to `sink`; on this thread.
    ///
    /// # Safety
    /// `tokens` lie within `x` and within the sink's output, whose rows are as long as the weight has rows,
    /// as are its scales and biases; no other thread writes those outputs.
    pub(super) unsafe fn multiply(
        &self,
        x: &[i8],
        tokens: Range<usize>,
        panels: Range<usize>,
        sink: &Sink<'_>,
    ) {
        debug_assert!(tokens.end * self.cols <= x.len() && panels.end <= self.count());
        let (depth, lanes, vectors) = (self.kernel.depth(), self.kernel.lanes(), self.kernel.vectors());
        let base = self.lines.as_ptr().cast::<u8>();
        let panels = panels.map(|p| {
            let first = p * vectors * lanes;
            Panel {
                // SAFETY: `first` is below `rows`, so the offset is within the lines allocated in `new`.
                codes: unsafe { base.add(first * self.cols.next_multiple_of(depth)) },
                vectors: (self.rows - first).div_ceil(lanes).min(vectors),
                first,
                rows: self.rows,
                cols: self.cols,
            }
        });
        match self.kernel {
            // SAFETY: promised by the caller.
            Kernel::Portable => unsafe { portable(x, tokens, panels, sink) },
            // SAFETY: promised by the caller; a kernel exists only where its instructions were detected.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => unsafe { avx2::multiply(x, tokens, panels, sink) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => unsafe { vnni::multiply(x, tokens, panels, sink) },
        }
    }
}

/// One panel: `vectors * lanes` outputs from `first` on, of a weight `[rows, cols]`. Outputs beyond `rows`
/// are padding.
#[derive(Clone, Copy)]
struct Panel {
    codes: *const u8,
    vectors: usize,
    first: usize,
    rows: usize,
    cols: usize,
}

/// The product without vector intrinsics, in a form that compilers vectorise for the target's baseline.
///
/// # Safety
/// As [`Panels::multiply`].
unsafe fn portable(
    x: &[i8],
    tokens: Range<usize>,
    panels: impl Iterator<Item = Panel> + Clone,
    sink: &Sink<'_>,
) {
    for panel in panels {
        // SAFETY: with one lane, one vector and depth 1 a panel is one row of `cols` codes.
        let row = unsafe { std::slice::from_raw_parts(panel.codes.cast::<i8>(), panel.cols) };
        for t in tokens.clone() {
            let x = &x[t * panel.cols..][..panel.cols];
            let acc = x.iter().zip(row).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
            // SAFETY: promised by the caller.
            unsafe { sink.put(t * panel.rows + panel.first, panel.first, acc) };
        }
    }
}

/// See [`super::quantize`]. Compiled once for each instruction set.
#[inline(always)]
fn quantize(x: &[f32], scale: f32, codes: &mut [i8]) {
    // Added to a float of magnitude below 2^22, this leaves its nearest integer (ties to even) in the low
    // bits of the sum: rounding and conversion in one addition, on every instruction set.
    const ROUND: f32 = (3 << 22) as f32;
    for (code, &x) in codes.iter_mut().zip(x) {
        let v = x / scale;
        // The bounds are integers, so clamping before rounding gives the same as after.
        let rounded = (v.clamp(-127.0, 127.0) + ROUND).to_bits() as i8;
        *code = if v.is_nan() { 0 } else { rounded };
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use super::{Panel, Sink};

    pub(super) const LANES: usize = 8;
    pub(super) const VECTORS: usize = 2;
    pub(super) const TOKENS: usize = 4;

    /// Both codes are widened to i16 and multiplied in pairs by `vpmaddwd`, which cannot saturate
    /// (`vpmaddubsw` on bytes would: its pair sums are i16).
    ///
    /// # Safety
    /// As [`super::Panels::multiply`], and the CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn multiply(
        x: &[i8],
        tokens: Range<usize>,
        panels: impl Iterator<Item = Panel> + Clone,
        sink: &Sink<'_>,
    ) {
        // Tokens widened once for all panels, each padded to an even length.
        let Some(cols) = panels.clone().next().map(|p| p.cols) else { return };
        let mut wide = vec![0i16; tokens.len() * cols.next_multiple_of(2)];
        for (wide, x) in wide.chunks_mut(cols.next_multiple_of(2)).zip(x[tokens.start * cols..].chunks(cols))
        {
            wide.iter_mut().zip(x).for_each(|(wide, &x)| *wide = i16::from(x));
        }
        for panel in panels {
            for t in tokens.clone().step_by(TOKENS) {
                let x = wide[(t - tokens.start) * cols.next_multiple_of(2)..].as_ptr();
                // SAFETY: promised by the caller; the tile has as many tokens as remain.
                unsafe {
                    match ((tokens.end - t).min(TOKENS), panel.vectors) {
                        (4, 2) => tile::<4, 2>(x, t, panel, sink),
                        (3, 2) => tile::<3, 2>(x, t, panel, sink),
                        (2, 2) => tile::<2, 2>(x, t, panel, sink),
                        (1, 2) => tile::<1, 2>(x, t, panel, sink),
                        (4, 1) => tile::<4, 1>(x, t, panel, sink),
                        (3, 1) => tile::<3, 1>(x, t, panel, sink),
                        (2, 1) => tile::<2, 1>(x, t, panel, sink),
                        (1, 1) => tile::<1, 1>(x, t, panel, sink),
                        shape => unreachable!("tile of shape {shape:?}"),
                    }
                }
            }
        }
    }

    /// `T` tokens, widened in `x`, by the `V * LANES` outputs of a panel.
    ///
    /// # Safety
    /// As [`multiply`], for tokens `token..token + T`.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn tile<const T: usize, const V: usize>(
        x: *const i16,
        token: usize,
        panel: Panel,
        sink: &Sink<'_>,
    ) {
        let steps = panel.cols.div_ceil(2);
        let mut acc = [[_mm256_setzero_si256(); V]; T];
        for step in 0..steps {
            let mut w = [_mm256_setzero_si256(); V];
            for v in 0..V {
                // SAFETY: a panel holds `steps` times `V` vectors of 16 bytes.
                let bytes =
                    unsafe { _mm_loadu_si128(panel.codes.add((step * V + v) * 2 * LANES).cast::<__m128i>()) };
                w[v] = _mm256_cvtepi8_epi16(bytes);
            }
            for t in 0..T {
                // SAFETY: each token has `steps` pairs.
                let pair = unsafe { x.add((t * steps + step) * 2).cast::<i32>().read_unaligned() };
                let pair = _mm256_set1_epi32(pair);
                for v in 0..V {
                    acc[t][v] = _mm256_add_epi32(acc[t][v], _mm256_madd_epi16(w[v], pair));
                }
            }
        }
        for t in 0..T {
            for v in 0..V {
                let o = panel.first + v * LANES;
                let at = (token + t) * panel.rows + o;
                // SAFETY: lanes below `rows - o` are outputs of this token, which the caller lets us write.
                unsafe { store(acc[t][v], at, o, (panel.rows - o).min(LANES), sink) };
            }
        }
    }

    /// Stores the first `lanes` of `acc` at element `at` of the output, from output feature `o` on.
    ///
    /// # Safety
    /// Elements `at..at + lanes` lie within the output, and no other thread writes them.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store(acc: __m256i, at: usize, o: usize, lanes: usize, sink: &Sink<'_>) {
        // SAFETY: promised by the caller; slices are as long as the vectors read from them.
        unsafe {
            if lanes < LANES {
                let mut each = [0i32; LANES];
                _mm256_storeu_si256(each.as_mut_ptr().cast(), acc);
                for i in 0..lanes {
                    sink.put(at + i, o + i, each[i]);
                }
                return;
            }
            match *sink {
                Sink::I32(p) => _mm256_storeu_si256(p.add(at).cast(), acc),
                Sink::F32 { y, scale, bias } => {
                    let mut r =
                        _mm256_mul_ps(_mm256_cvtepi32_ps(acc), _mm256_loadu_ps(scale[o..][..LANES].as_ptr()));
                    if let Some(bias) = bias {
                        r = _mm256_add_ps(r, _mm256_loadu_ps(bias[o..][..LANES].as_ptr()));
                    }
                    _mm256_storeu_ps(y.add(at), r);
                }
            }
        }
    }

    /// # Safety
    /// The CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn quantize(x: &[f32], scale: f32, codes: &mut [i8]) {
        super::quantize(x, scale, codes);
    }
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use super::{Panel, Sink};

    pub(super) const LANES: usize = 16;
    /// 8 tokens by 3 vectors: 24 accumulators, 3 weights and an activation fill 28 of the 32 registers, and
    /// each load feeds at least three multiplications.
    pub(super) const VECTORS: usize = 3;
    pub(super) const TOKENS: usize = 8;

    /// Weights are stored as code + 128, so an accumulator holds the product plus 128 times the sum of the
    /// token's codes, which is subtracted at the end. Wrap-around on the way is harmless: the sum modulo 2^32
    /// is right and the result fits.
    ///
    /// # Safety
    /// As [`super::Panels::multiply`], and the CPU has AVX-512 F, BW and VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn multiply(
        x: &[i8],
        tokens: Range<usize>,
        panels: impl Iterator<Item = Panel> + Clone,
        sink: &Sink<'_>,
    ) {
        let Some(cols) = panels.clone().next().map(|p| p.cols) else { return };
        let mut excess = [0i32; super::super::TOKENS_PER_BLOCK];
        for (excess, x) in excess[..tokens.len()].iter_mut().zip(x[tokens.start * cols..].chunks(cols)) {
            *excess = sum_times_128(x);
        }
        for panel in panels {
            for t in tokens.clone().step_by(TOKENS) {
                let excess = &excess[t - tokens.start..];
                let x = x[t * cols..].as_ptr();
                // SAFETY: promised by the caller; the tile has as many tokens as remain. With few tokens
                // several inputs are summed apart (`U`), to have the ten multiplications under way that hide
                // the instruction's latency.
                macro_rules! tiles {
                    ($($t:literal $u:literal),*) => {
                        unsafe {
                            match ((tokens.end - t).min(TOKENS), panel.vectors) {
                                $(($t, 3) => tile::<$t, 3, $u>(x, t, panel, excess, sink),
                                ($t, 2) => tile::<$t, 2, $u>(x, t, panel, excess, sink),
                                ($t, 1) => tile::<$t, 1, $u>(x, t, panel, excess, sink),)*
                                shape => unreachable!("tile of shape {shape:?}"),
                            }
                        }
                    };
                }
                tiles!(8 1, 7 1, 6 1, 5 1, 4 1, 3 2, 2 2, 1 4);
            }
        }
    }

    /// `T` tokens by the `V * LANES` outputs of a panel.
    ///
    /// # Safety
    /// As [`multiply`], for tokens `token..token + T`, whose codes start at `x`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn tile<const T: usize, const V: usize, const U: usize>(
        x: *const i8,
        token: usize,
        panel: Panel,
        excess: &[i32],
        sink: &Sink<'_>,
    ) {
        let Panel { codes, cols, .. } = panel;
        let steps = cols / 4;
        let mut acc = [[[_mm512_setzero_si512(); V]; T]; U];
        let mut step = 0;
        while step + U <= steps {
            for u in 0..U {
                // SAFETY: `step + u < steps`: four codes of every token and `V` vectors of the panel.
                unsafe {
                    let w = weights::<V>(codes, step + u);
                    for t in 0..T {
                        let four = x.add(t * cols + (step + u) * 4).cast::<i32>().read_unaligned();
                        add(&mut acc[u][t], &w, four);
                    }
                }
            }
            step += U;
        }
        while step * 4 < cols {
            // SAFETY: the panel is padded to whole steps; of the tokens, only codes that exist are read.
            unsafe {
                let w = weights::<V>(codes, step);
                for t in 0..T {
                    let mut four = [0u8; 4];
                    let rest = (cols - step * 4).min(4);
                    x.add(t * cols + step * 4).cast::<u8>().copy_to_nonoverlapping(four.as_mut_ptr(), rest);
                    add(&mut acc[0][t], &w, i32::from_le_bytes(four));
                }
            }
            step += 1;
        }
        for t in 0..T {
            for v in 0..V {
                let mut sum = acc[0][t][v];
                for u in 1..U {
                    sum = _mm512_add_epi32(sum, acc[u][t][v]);
                }
                sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(excess[t]));
                let o = panel.first + v * LANES;
                // SAFETY: lanes below `rows - o` are outputs of this token, which the caller lets us write.
                unsafe { store(sum, (token + t) * panel.rows + o, o, panel.rows - o, sink) };
            }
        }
    }

    /// # Safety
    /// The panel, of `V` vectors, has more than `step` steps.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn weights<const V: usize>(codes: *const u8, step: usize) -> [__m512i; V] {
        let mut w = [_mm512_setzero_si512(); V];
        for v in 0..V {
            // SAFETY: promised by the caller; panels are aligned to 64 bytes.
            w[v] = unsafe { _mm512_load_si512(codes.add((step * V + v) * 4 * LANES).cast()) };
        }
        w
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn add<const V: usize>(acc: &mut [__m512i; V], w: &[__m512i; V], four: i32) {
        let x = _mm512_set1_epi32(four);
        for v in 0..V {
            acc[v] = _mm512_dpbusd_epi32(acc[v], w[v], x);
        }
    }

    /// Stores up to `lanes` of `acc` at element `at` of the output, from output feature `o` on.
    ///
    /// # Safety
    /// The elements lie within the output, the features within its scales, and no other thread writes them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn store(acc: __m512i, at: usize, o: usize, lanes: usize, sink: &Sink<'_>) {
        let mask = if lanes >= LANES { !0 } else { (1 << lanes) - 1 };
        // SAFETY: promised by the caller; masked lanes are not touched.
        unsafe {
            match *sink {
                Sink::I32(p) => _mm512_mask_storeu_epi32(p.add(at), mask, acc),
                Sink::F32 { y, scale, bias } => {
                    let scale = _mm512_maskz_loadu_ps(mask, scale.as_ptr().add(o));
                    let mut r = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), scale);
                    if let Some(bias) = bias {
                        r = _mm512_add_ps(r, _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(o)));
                    }
                    _mm512_mask_storeu_ps(y.add(at), mask, r);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn sum_times_128(x: &[i8]) -> i32 {
        let mut sum = _mm512_setzero_si512();
        for x in x.chunks(64) {
            let mask = if x.len() == 64 { !0 } else { (1 << x.len()) - 1 };
            // SAFETY: the mask covers the chunk and no more.
            let x = unsafe { _mm512_maskz_loadu_epi8(mask, x.as_ptr()) };
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), x);
        }
        _mm512_reduce_add_epi32(sum)
    }

    /// # Safety
    /// The CPU has AVX-512 F and BW.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) unsafe fn quantize(x: &[f32], scale: f32, codes: &mut [i8]) {
        super::quantize(x, scale, codes);
    }
}
