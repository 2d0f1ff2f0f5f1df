// What the kernels on tensor cores share: tiles of keys, the order of keys in a tile, the online softmax with the keep:of
// pattern, and the output. Constants: D, a head's width (32, 64, 128); KEEP and OF, the pattern (OF 0 for none); CODES_IN
// (q, k and v are INT8 codes), CODES_OUT.
//
// A warp owns 16 rows of queries and has scores and outputs in the order of mma and wgmma: lane 4 g + j has columns
// 8 n + 2 j + e of rows g and g + 8.

using rounding::TILE;

struct alignas(16) Tile {
    int first, length, query, none;
};

struct Problem {
    void *out;
    const void *qkv;
    const Tile *tiles;
    int heads;
    // A score in bits; the factor of values; the step of the output.
    float unit, value, step;
};

__device__ inline u32 shared_address(const void *p) {
    return (u32)__cvta_generic_to_shared(p);
}

__device__ inline float minus_infinity() { return __int_as_float(0xFF800000); }

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Keys of a tile change places so that a lane has whole groups of the pattern and no lane has to ask another: key
// 8 B m + 2 B j + 2 i + e is column 8 (B m + i) + 2 j + e, with B pairs of keys in a group. The sum over keys does not
// mind, as long as values change places with them.
constexpr int B = OF > 2 && OF <= 16 ? OF / 2 : 1;

__device__ constexpr int key_of(int n, int j, int e) { return n / B * 8 * B + j * 2 * B + n % B * 2 + e; }

__device__ constexpr u32 column_of(u32 key) {
    return 8 * (key / (8 * B) * B + key % (2 * B) / 2) + key % (8 * B) / (2 * B) * 2 + key % 2;
}

template <bool CODES> struct Score { using Sum = float; };
template <> struct Score<true> { using Sum = int; };
using Sum = Score<CODES_IN>::Sum;

// Scores of keys from `limit` on, counted from the tile's first, become minus infinity.
__device__ inline void close(float (*s)[4], int limit) {
    int j = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (key_of(n, j, c % 2) >= limit) s[n][c] = minus_infinity();
}

// Whether tensor cores add up the weights, of codes whole units of 2^-24, by a column of ones beside the values. A pattern's
// sums are of weights that it drops, too.
constexpr bool ONES_COLUMN = CODES_IN && !OF;
// Outputs of 8 columns, and the sums.
constexpr int BLOCKS = D / 8 + ONES_COLUMN;

// What sums of codes, which are below 2^22, have added on their way to floats: 1.5 * 2^23.
constexpr float OFFSET = CODES_IN ? 12582912.0f : 0.0f;

__device__ inline float score_of(int sum) { return __int_as_float(sum + 0x4B400000); }
__device__ inline float score_of(float sum) { return sum; }

// Attention of codes rounds as ../attention/mod.rs says and ../attention/rounding.rs has it, so that all that computes it gives the same codes. Scores in bits
// become multiples of 1 / 256 when GRID is added. Weights are 2^-13 and less, which halves hold in units of 2^-24, as does a
// float that ONES is added to: sums of units, and of units times codes, are whole numbers. From halves, whose products are
// rounded anyway, scores stay as they are, and weights are 1 and less.
using rounding::ONES, rounding::LARGEST;
constexpr float GRID = CODES_IN ? rounding::GRID : 0.0f, SCALE = CODES_IN ? rounding::SCALE : 0.0f;
constexpr float ROOM = CODES_IN ? rounding::ROOM : 0.0f;

// Running softmax of a lane's two rows: a base, in whole bits unless it is huge, and the sum of weights.
struct Softmax {
    float base[2] = {minus_infinity(), minus_infinity()}, sum[2] = {};
    bool huge[2] = {};
    // Whether a row of the warp is huge, or GRID less a base and OFFSET has no room for a fraction.
    bool rare = false;
    // The base of row r becomes that of a score.
    __device__ void rest(int r, float top, float unit) {
        float bits = (top - OFFSET) * unit;
        huge[r] = fabsf(bits) >= LARGEST;
        base[r] = huge[r] ? top : ceilf(bits);
    }
    // Once the bases are set.
    __device__ void measure(float unit) {
        bool any = huge[0] || huge[1];
        if (CODES_IN)
#pragma unroll
            for (int r = 0; r < 2; r++) any |= fabsf(base[r] + OFFSET * unit - 24576.0f) > 40960.0f;
        rare = __any_sync(~0u, any);
    }
};

// By how many bits one base is above another.
__device__ inline float above(float a, bool a_huge, float b, bool b_huge, float unit) {
    if (a_huge && b_huge) return (a - b) * unit;
    return (a_huge ? (a - OFFSET) * unit : a) - (b_huge ? (b - OFFSET) * unit : b);
}

// What the pattern drops of a group becomes 0: x are its scores, p their weights. `tie` where that takes `by_rank`.
__device__ inline void prune(const float *x, float *p, bool &tie) {
    if constexpr (OF == 4 && KEEP == 2) {
        // Losers of one pair beat the winner of the other, or both winners stay. Ties go to the lower key.
        asm("{.reg .pred a, b, c, d, e, f; .reg .f32 w, l, v, k;\n"
            "max.f32 w, %4, %5; min.f32 l, %4, %5; max.f32 v, %6, %7; min.f32 k, %6, %7;\n"
            "setp.ge.f32 a, l, v; setp.gt.f32 b, k, w;\n"
            "setp.lt.and.f32 c|d, %4, %5, !a; setp.lt.and.f32 e|f, %6, %7, !b;\n"
            "@c mul.f32 %0, %0, 0f00000000; @d mul.f32 %1, %1, 0f00000000; @e mul.f32 %2, %2, 0f00000000; @f mul.f32 %3, %3, 0f00000000;\n"
            "@b mul.f32 %0, %0, 0f00000000; @b mul.f32 %1, %1, 0f00000000; @a mul.f32 %2, %2, 0f00000000; @a mul.f32 %3, %3, 0f00000000;}"
            : "+f"(p[0]), "+f"(p[1]), "+f"(p[2]), "+f"(p[3])
            : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
    } else if constexpr (KEEP == 1) {
        // A knockout: best[n + i] is the i-th of the n that play on; kept likewise.
        float best[4 * B];
        bool kept[4 * B];
#pragma unroll
        for (int i = 0; i < 2 * B; i++) best[2 * B + i] = x[i];
#pragma unroll
        for (int i = 2 * B - 1; i > 0; i--) best[i] = fmaxf(best[2 * i], best[2 * i + 1]);
        kept[1] = true;
#pragma unroll
        for (int i = 1; i < 2 * B; i++) {
            bool left = best[2 * i] >= best[2 * i + 1];
            kept[2 * i] = kept[i] && left;
            kept[2 * i + 1] = kept[i] && !left;
        }
#pragma unroll
        for (int i = 0; i < 2 * B; i++) p[i] = kept[2 * B + i] ? p[i] : 0.0f;
    } else if constexpr (KEEP == 2) {
        float one = minus_infinity(), two = one, three = one;
#pragma unroll
        for (int i = 0; i < 2 * B; i++) {
            float below = fminf(one, x[i]);
            one = fmaxf(one, x[i]);
            three = fmaxf(three, fminf(two, below));
            two = fmaxf(two, below);
        }
        tie |= two == three;
#pragma unroll
        for (int i = 0; i < 2 * B; i++) p[i] = x[i] >= two ? p[i] : 0.0f;
    } else tie = true;
}

__device__ inline void prune_by_rank(const float *x, float *p) {
#pragma unroll
    for (int i = 0; i < 2 * B; i++) {
        int rank = 0;
#pragma unroll
        for (int k = 0; k < 2 * B; k++)
            if (k != i) rank += k < i ? x[k] >= x[i] : x[k] > x[i];
        if (rank >= KEEP) p[i] = 0.0f;
    }
}

// Scores become weights, 2 to the score in bits above the row's base, of which `w` has those that the pattern keeps; `part`
// gets the sums of all unless tensor cores make them. Only RARE minds rows that are huge, or weights of codes so large that a
// sum leaves the range of ONES or of halves; otherwise `seen` has the bits that such a weight sets.
template <bool RARE, bool RANKED>
__device__ inline void weights(const float (*s)[4], const Softmax &m, float unit, float *part, u32 &seen, u32 (*w)[4],
                               bool &tie) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        // A multiple of 1 / 256 below 2^16, unless rare.
        float shift = GRID - m.base[r] - (RARE ? 0.0f : OFFSET * unit);
        float sum = 0.0f;
        u32 units = 0;
#pragma unroll
        for (int n = 0; n < TILE / 8; n += B) {
            float x[2 * B], p[2 * B];
#pragma unroll
            for (int i = 0; i < 2 * B; i++) {
                x[i] = s[n + i / 2][2 * r + i % 2];
                float t;
                if (RARE && m.huge[r]) t = __fadd_rn(__fmul_rn(x[i] - m.base[r], unit), GRID);
                else t = __fmaf_rn(RARE ? x[i] - OFFSET : x[i], unit, shift);
                p[i] = exp2_fast(CODES_IN ? __fsub_rn(t, GRID + SCALE) : t);
                if (ONES_COLUMN) continue;
                float whole = __fadd_rn(p[i], ONES);
                if (!CODES_IN) sum += p[i];
                else if (RARE) sum += __fsub_rn(whole, ONES);
                else units += __float_as_uint(whole), seen |= __float_as_uint(whole);
            }
            if constexpr (OF && RANKED) prune_by_rank(x, p);
            else if constexpr (OF > 0) prune(x, p, tie);
#pragma unroll
            for (int i = 0; i < B; i++) {
                u32 pair = w[(n + i) / 2][(n + i) % 2 * 2 + r] = f16_pair(p[2 * i], p[2 * i + 1]);
                if (ONES_COLUMN) seen |= pair;
            }
        }
        if (!ONES_COLUMN) part[r] = RARE || !CODES_IN ? sum : (float)(units - TILE / 4 * __float_as_uint(ONES)) * 5.9604645e-8f;
    }
}

// The highest score of row r.
__device__ inline float highest(const float (*s)[4], int r) {
    float top = minus_infinity();
#pragma unroll
    for (int n = 0; n < TILE / 8; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    return fmaxf(top, __shfl_xor_sync(~0u, top, 2));
}

// Scores become weights `w`, halves in the order of a left operand. The base is not below the row's highest score in the
// first tile, and follows only where a score has no room, which is rare, so that other tiles look for no maximum and leave
// the outputs alone. True if it did: outputs are to be multiplied by `shrink`.
__device__ inline bool weigh(const float (*s)[4], Softmax &m, float unit, u32 (*w)[4], bool first, float *shrink) {
    float part[2] = {};
    u32 seen = 0;
    if (first) {
#pragma unroll
        for (int r = 0; r < 2; r++) m.rest(r, highest(s, r), unit);
        m.measure(unit);
    }
    bool tie = false, rise = m.rare;
    if (!rise) {
        weights<false, false>(s, m, unit, part, seen, w, tie);
        // Of codes, a half of 2 or more, or a float of 1 or more is among them.
        rise = CODES_IN ? __any_sync(~0u, seen & (ONES_COLUMN ? 0x40004000 : 0xC0800000)) : !__all_sync(~0u, fmaxf(part[0], part[1]) < 32768.0f);
    }
    if (rise) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = highest(s, r);
            shrink[r] = 1.0f;
            if (m.huge[r] ? top > m.base[r] : (top - OFFSET) * unit >= m.base[r] + ROOM) {
                float base = m.base[r];
                bool huge = m.huge[r];
                m.rest(r, top, unit);
                shrink[r] = exp2_fast(-above(m.base[r], m.huge[r], base, huge, unit));
                m.sum[r] *= shrink[r];
            }
        }
        m.measure(unit);
        tie = false;
        weights<true, false>(s, m, unit, part, seen, w, tie);
    }
    if constexpr (OF && KEEP != 1 && !(OF == 4 && KEEP == 2)) {
        if (__any_sync(~0u, tie)) {
            float again[2];
            weights<true, true>(s, m, unit, again, seen, w, tie);
        }
    }
    m.sum[0] += part[0];
    m.sum[1] += part[1];
    return rise;
}

__device__ inline void rescale(float (*o)[4], const float *shrink) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) o[n][c] *= shrink[c / 2];
}

// Four signed codes as halves, exactly: 0x6400 + u is the half 1024 + u.
__device__ inline uint2 halves_of_codes(u32 codes) {
    uint2 r;
    codes ^= 0x80808080u;
    asm("prmt.b32 %0, %1, %2, 0x4140;" : "=r"(r.x) : "r"(codes), "r"(0x64646464u));
    asm("prmt.b32 %0, %1, %2, 0x4342;" : "=r"(r.y) : "r"(codes), "r"(0x64646464u));
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(r.x) : "r"(0x64806480u));
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(r.y) : "r"(0x64806480u));
    return r;
}

// Four words of each of four lanes, transposed: lane j gets the j-th word of each.
__device__ inline void transpose(u32 *v) {
    int j = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
        u32 other = __shfl_xor_sync(~0u, j & 1 ? v[k] : v[k + 1], 1);
        if (j & 1) v[k] = other;
        else v[k + 1] = other;
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        u32 other = __shfl_xor_sync(~0u, j & 2 ? v[k] : v[k + 2], 2);
        if (j & 2) v[k] = other;
        else v[k + 2] = other;
    }
}

__device__ inline u32 chosen_bytes(u32 a, u32 b, u32 which) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(which));
    return r;
}

// The warp's 16 rows of outputs: `row` is the first, of `rows` that there are, counted where `out` begins. Lanes exchange
// what they have, so that each stores 16 bytes.
__device__ inline void finish(float (*o)[4], Softmax &m, const Problem &p, long long out, int row, int rows) {
    int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4, stride = p.heads * D;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        // Each column of ones has all of a row's weights.
        float sum = ONES_COLUMN ? o[BLOCKS - 1][2 * r] : m.sum[r];
        if (!ONES_COLUMN) sum += __shfl_xor_sync(~0u, sum, 1), sum += __shfl_xor_sync(~0u, sum, 2);
        float factor = p.value / sum;
        int i = row + g + 8 * r;
        bool there = i < rows;
        long long at = out + (long long)i * stride;
        Step step(CODES_OUT ? p.step : 1.0f);
        auto codes = [&](int n) {
            u32 a = step.code(o[n][2 * r] * factor), b = step.code(o[n][2 * r + 1] * factor);
            return chosen_bytes(a, b, 0x40);
        };
        if constexpr (!CODES_OUT) {
#pragma unroll
            for (int n = 0; n < D / 8; n += 4) {
                u32 v[4];
#pragma unroll
                for (int k = 0; k < 4; k++) v[k] = f16_pair(o[n + k][2 * r] * factor, o[n + k][2 * r + 1] * factor);
                transpose(v);
                if (there) *(uint4 *)((f16 *)p.out + at + (n + j) * 8) = make_uint4(v[0], v[1], v[2], v[3]);
            }
        } else if constexpr (D >= 64) {
#pragma unroll
            for (int n = 0; n < D / 8; n += 8) {
                u32 v[4];
#pragma unroll
                for (int k = 0; k < 4; k++) v[k] = chosen_bytes(codes(n + 2 * k), codes(n + 2 * k + 1), 0x5410);
                transpose(v);
                uint4 w = make_uint4(chosen_bytes(v[0], v[1], 0x5410), chosen_bytes(v[2], v[3], 0x5410),
                                     chosen_bytes(v[0], v[1], 0x7632), chosen_bytes(v[2], v[3], 0x7632));
                if (there) *(uint4 *)((char *)p.out + at + n * 8 + j * 16) = w;
            }
        } else {
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                if (there) *(unsigned short *)((char *)p.out + at + n * 8 + 2 * j) = (unsigned short)codes(n);
        }
    }
}
