// What the kernels on tensor cores share: tiles of keys, the order of keys in a tile, the online softmax with the keep:of
// pattern, and the output. Constants: D, a head's width (32, 64, 128); KEEP and OF, the pattern (OF 0 for none); CODES_IN
// (q, k and v are INT8 codes), CODES_OUT.
//
// A warp owns 16 rows of queries and has scores and outputs in the order of mma and wgmma: lane 4 g + j has columns
// 8 n + 2 j + e of rows g and g + 8.

constexpr int TILE = 64;

struct Tile {
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

__device__ constexpr int column_of(int key) {
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

// What is kept of the group of 2 B scores that begins at s[n0], in row r of the lane's two: bit i for the i-th key.
__device__ inline u32 kept_by_rank(float (*s)[4], int n0, int r) {
    u32 kept = 0;
#pragma unroll
    for (int i = 0; i < 2 * B; i++) {
        float x = s[n0 + i / 2][2 * r + i % 2];
        int rank = 0;
#pragma unroll
        for (int k = 0; k < 2 * B; k++) {
            float y = s[n0 + k / 2][2 * r + k % 2];
            if (k != i) rank += k < i ? y >= x : y > x;
        }
        kept |= (u32)(rank < KEEP) << i;
    }
    return kept;
}

// The KEEP-th largest of the group, for KEEP 1 and 2; `tie` if what is not below it is more than KEEP.
__device__ inline float least_kept(float (*s)[4], int n0, int r, bool &tie) {
    float one = minus_infinity(), two = one, three = one;
    if constexpr (B == 2 && KEEP == 2) {
        const float *x = s[n0] + 2 * r, *y = s[n0 + 1] + 2 * r;
        float a = fminf(fmaxf(x[0], x[1]), fmaxf(y[0], y[1]));
        float b = fmaxf(fminf(x[0], x[1]), fminf(y[0], y[1]));
        tie |= a == b;
        return fmaxf(a, b);
    }
#pragma unroll
    for (int i = 0; i < 2 * B; i++) {
        float x = s[n0 + i / 2][2 * r + i % 2];
        float below = fminf(one, x);
        one = fmaxf(one, x);
        if (KEEP == 2) three = fmaxf(three, fminf(two, below));
        two = fmaxf(two, below);
    }
    tie |= KEEP == 1 ? one == two : two == three;
    return KEEP == 1 ? one : two;
}

// Running softmax of a lane's two rows.
struct Softmax {
    float top[2] = {minus_infinity(), minus_infinity()}, sum[2] = {};
    // Scores so large that their product with the unit would not round to within a bit.
    bool huge = false;
};

// Scores become weights, 2 to the score in bits above the row's base, that the pattern keeps; the sum has all. The base
// is the highest score of the first tile, and follows only when one is more than 8 bits higher: most tiles then leave
// the outputs alone.
__device__ inline void weigh(float (*s)[4], float (*o)[4], Softmax &m, float unit) {
    float highest[2];
    bool rise = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float h = minus_infinity();
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) h = fmaxf(h, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        h = fmaxf(h, __shfl_xor_sync(~0u, h, 1));
        highest[r] = fmaxf(h, __shfl_xor_sync(~0u, h, 2));
        rise |= (highest[r] - m.top[r]) * unit > 8.0f;
    }
    if (__any_sync(~0u, rise)) {
        bool huge = false;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = fmaxf(m.top[r], highest[r]);
            float shrink = exp2_fast((m.top[r] - top) * unit);
            m.top[r] = top;
            m.sum[r] *= shrink;
            huge |= fabsf(top * unit) > 65536.0f;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                o[n][2 * r] *= shrink;
                o[n][2 * r + 1] *= shrink;
            }
        }
        m.huge = __any_sync(~0u, huge);
    }
    float base[2] = {m.top[0] * unit, m.top[1] * unit};
    if (m.huge) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            base[r] = 0.0f;
#pragma unroll
            for (int n = 0; n < TILE / 8; n++) {
                s[n][2 * r] -= m.top[r];
                s[n][2 * r + 1] -= m.top[r];
            }
        }
    }
    if constexpr (!OF) {
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                s[n][c] = exp2_fast(__fmaf_rn(s[n][c], unit, -base[c / 2]));
                m.sum[c / 2] += s[n][c];
            }
        return;
    }
    constexpr int GROUPS = TILE / 8 / B;
    u32 kept[GROUPS][2];
    float least[GROUPS][2];
    bool tie = KEEP > 2;
    if constexpr (KEEP <= 2) {
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
            for (int r = 0; r < 2; r++) least[g][r] = least_kept(s, g * B, r, tie);
        tie = __any_sync(~0u, tie);
    }
    // Ties are rare, except where keys are masked.
    if (tie) {
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
            for (int r = 0; r < 2; r++) kept[g][r] = kept_by_rank(s, g * B, r);
    }
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float p = exp2_fast(__fmaf_rn(s[n][c], unit, -base[c / 2]));
            m.sum[c / 2] += p;
            bool keep;
            if (tie) keep = kept[n / B][c / 2] >> (n % B * 2 + c % 2) & 1;
            else keep = s[n][c] >= least[n / B][c / 2];
            s[n][c] = keep ? p : 0.0f;
        }
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
        float sum = m.sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        float factor = p.value / sum;
        int i = row + g + 8 * r;
        bool there = i < rows;
        long long at = out + (long long)i * stride;
        Step step(CODES_OUT ? p.step : 1.0f);
        auto codes = [&](int n) {
            u32 a = step.code(o[n][2 * r] * factor), b = step.code(o[n][2 * r + 1] * factor);
            return (a & 0xFF) | (b & 0xFF) << 8;
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
                for (int k = 0; k < 4; k++) v[k] = codes(n + 2 * k) | codes(n + 2 * k + 1) << 16;
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
