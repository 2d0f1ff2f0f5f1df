// What both kernels do with finished accumulators.
//
// A warp holds 16 rows of the weight by 8 tokens in the order that mma and wgmma share: lane 4g + t has tokens 2t and
// 2t + 1 of rows g and g + 8. Weights are packed (mod.rs) so that row g is feature 2g and row g + 8 is feature 2g + 1:
// a lane owns two neighbouring features of each token, a word of the transposed output.

enum { ACCUMULATORS, HALF, CODES };
// As `activation::number` counts them; TABLE: the code that stands in `table` for that of the output pair.
enum { NONE, GELU, GELU_TANH, RELU, SILU, TANH, TABLE };

struct Epilogue {
    const float *scale, *bias, *pair, *step;
    void *out;
    int tokens, rows, cols;
    // Of 256 codes in shared memory.
    u32 table;
};

// Parameters of a kernel that make an Epilogue.
#define EPILOGUE                                                                                                    \
    const float *scale, const float *bias, const float *pair, const float *step, void *out, int tokens, int rows, \
        int cols

constexpr int OUT_BYTES = STORE == ACCUMULATORS ? 4 : STORE == HALF ? 2 : 1;

// The factors of one feature.
struct Feature {
    float scale, bias, pair, pair_inverse, step, step_inverse;
    // Of 256 codes in shared memory.
    u32 table;
};

// Before the block's first barrier: the table of codes, which `codes` points to, in shared memory.
__device__ inline u32 fetch_table(const void *codes) {
    if constexpr (ACT != TABLE) return 0;
    __shared__ u32 table[64];
    if (threadIdx.x < 64) table[threadIdx.x] = ((const u32 *)codes)[threadIdx.x];
    u32 at;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(at) : "l"(table));
    return at;
}

__device__ inline Feature feature(const Epilogue &e, int row) {
    Feature f = {};
    f.pair = f.pair_inverse = f.step = f.step_inverse = 1.0f;
    f.table = e.table;
    if (STORE == ACCUMULATORS || row >= e.rows) return f;
    f.scale = e.scale[row];
    if (BIAS) f.bias = e.bias[row];
    if (PAIR) f.pair = e.pair[row], f.pair_inverse = __frcp_rn(f.pair);
    if (STORE == CODES && ACT != TABLE) f.step = e.step[row], f.step_inverse = __frcp_rn(f.step);
    return f;
}

// x / s correctly rounded, from the correctly rounded 1 / s (Markstein): what a true division gives, in three
// instructions instead of ten.
__device__ inline float quotient(float x, float s, float inverse) {
    float q = __fmul_rn(x, inverse);
    return __fmaf_rn(__fmaf_rn(-q, s, x), inverse, q);
}

// Rounded half to even and clamped to the codes; the last bits are those of the whole number. Adding 1.5 * 2^23 leaves no
// fraction in a float.
constexpr float WHOLE = 12582912.0f;
__device__ inline float rounded(float q) { return __fadd_rn(fminf(fmaxf(q, -QMAX), QMAX), WHOLE); }

// acc * scale + bias, each operation rounded by itself.
__device__ inline float sum(int acc, const Feature &f) {
    float y = __fmul_rn((float)acc, f.scale);
    return BIAS ? __fadd_rn(y, f.bias) : y;
}

// The map's value, after its output pair.
__device__ inline float value(int acc, const Feature &f) {
    float y = sum(acc, f);
    if (PAIR) y = __fmul_rn(__fsub_rn(rounded(quotient(y, f.pair, f.pair_inverse)), WHOLE), f.pair);
    return y;
}

// 1 / (1 + e^-x), to 2e-7.
__device__ inline float sigmoid(float x) {
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
    return r;
}

// In f32, to a few units of 1e-7: codes are the exact ones but next to ties.
__device__ inline float activated(float x) {
    if (ACT == RELU) return fmaxf(x, 0.0f);
    if (ACT == SILU) return x * sigmoid(x);
    if (ACT == TANH) return fmaf(2.0f, sigmoid(2.0f * x), -1.0f);
    if (ACT == GELU_TANH) return x * sigmoid(1.5957691f * fmaf(0.044715f * x * x, x, x));
    if (ACT == GELU) {
        // Phi's tail within 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26).
        float z = fabsf(x) * 0.70710678f, t, e;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(fmaf(0.3275911f, z, 1.0f)));
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.44269504f * z * z));
        float p = fmaf(t, fmaf(t, fmaf(t, fmaf(t, 1.061405429f, -1.453152027f), 1.421413741f), -0.284496736f), 0.254829592f);
        float tail = 0.5f * e * t * p;
        return x * (x < 0.0f ? tail : 1.0f - tail);
    }
    return x;
}

__device__ inline u32 halves(float low, float high) {
    u32 h;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low));
    return h;
}

// Two quotients to codes, the first in the lower byte. The conversion stops at 127 and -128: what may be less than that
// has to be clamped before.
__device__ inline u32 codes(float low, float high) {
    u32 c;
    int a = __float2int_rn(low), b = __float2int_rn(high);
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(c) : "r"(b), "r"(a), "r"(0));
    return c;
}

// Two features' codes, the first in the lower byte.
__device__ inline u32 code_pair(int a, int b, const Feature *f) {
    if constexpr (ACT == TABLE) {
        u32 code[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float q = quotient(sum(i ? b : a, f[i]), f[i].pair, f[i].pair_inverse);
            // Below, the sum of bits would overflow; BOUNDED says that no output can get there.
            if (!BOUNDED) q = fmaxf(q, -QMAX);
            // Place 0 has the code of -127.
            u32 at = __viaddmin_s32_relu(__float_as_int(__fadd_rn(q, WHOLE)), 127 - __float_as_int(WHOLE), 254);
            asm("ld.shared.u8 %0, [%1];" : "=r"(code[i]) : "r"(f[i].table + at));
        }
        return code[0] | code[1] << 8;
    }
    auto code = [&](int acc, const Feature &f) {
        return fmaxf(quotient(activated(value(acc, f)), f.step, f.step_inverse), -QMAX);
    };
    return codes(code(a, f[0]), code(b, f[1]));
}

// Tokens of a tile that this block finishes: a tile's inputs may be shared out to SPLIT blocks, and then its tokens.
constexpr int DONE = BN / SPLIT;

// 64 features of EN tokens lie in shared memory, a row for each token; chunks of 16 bytes are exchanged so that neither
// the writes of a warp nor its reads meet in a bank. It is the order that the copy engine calls 64-byte (codes) and
// 128-byte (halves) swizzle.
constexpr int STAGED_ROW = 64 * OUT_BYTES;
constexpr int EN = DONE % 64 == 0 ? 64 : DONE % 48 == 0 ? 48 : DONE < 32 ? DONE : 32;
constexpr int STAGED = STORE == ACCUMULATORS ? 0 : EN * STAGED_ROW;

__device__ inline u32 staged(u32 base, int token, int chunk) {
    int at = STORE == HALF ? chunk ^ (token & 7) : chunk ^ ((token >> 1) & 3);
    return base + token * STAGED_ROW + at * 16;
}

// Stores a warpgroup's 64 rows x DONE tokens of sums, in wgmma's order, as they are.
__device__ inline void store_sums(const int *acc, const Epilogue &e, int row0, int token0) {
    int thread = threadIdx.x % 128, g = thread % 32 / 4, t = thread % 4;
    int *out = (int *)e.out, row = row0 + thread / 32 * 16 + 2 * g;
#pragma unroll
    for (int i = 0; i < DONE / 2; i++) {
        int token = token0 + i / 4 * 8 + 2 * t + i % 2, r = row + i % 4 / 2;
        if (token < e.tokens && r < e.rows) out[(long long)token * e.rows + r] = acc[i];
    }
}

// Finishes the sums of EN tokens and lays them out at `base`. `f` has the factors of this lane's two features.
__device__ inline void stage(const int *acc, const Feature *f, u32 base) {
    int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    if constexpr (STORE == HALF) {
#pragma unroll
        for (int j = 0; j < EN / 8; j++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                u32 h = halves(value(acc[j * 4 + k], f[0]), value(acc[j * 4 + k + 2], f[1]));
                int token = j * 8 + 2 * t + k;
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(staged(base, token, warp * 2 + g / 4) + g % 4 * 4), "r"(h));
            }
    } else {
#pragma unroll
        for (int j = 0; j < EN / 8; j += 2) {
            u32 m[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const int *a = acc + (j + k) * 4;
                m[k] = __byte_perm(code_pair(a[0], a[2], f), code_pair(a[1], a[3], f), 0x5410);
            }
            u32 at = staged(base, j * 8 + lane % 16, warp);
#if __CUDA_ARCH__ >= 900
            asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(m[0]), "r"(m[1]));
#else
            (void)at;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int token = (j + k / 2) * 8 + 2 * t + k % 2;
                asm volatile("st.shared.b16 [%0], %1;" ::"r"(staged(base, token, warp) + 2 * g),
                             "h"((unsigned short)(m[k / 2] >> (k % 2 * 16))));
            }
#endif
        }
    }
}

// Copies those tokens from `base` to the output with 128 threads. If ALIGNED, rows of the output begin at multiples of
// 16 bytes, and chunks of that size go out as they are.
__device__ inline void copy_out(const Epilogue &e, u32 base, int row0, int token0) {
    int thread = threadIdx.x % 128;
    if constexpr (ALIGNED) {
        constexpr int CHUNKS = STAGED_ROW / 16, PER_THREAD = (EN * CHUNKS + 127) / 128;
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            int i = thread + k * 128, token = token0 + i / CHUNKS, row = row0 + i % CHUNKS * (16 / OUT_BYTES);
            if (i >= EN * CHUNKS || token >= e.tokens || row >= e.rows) continue;
            uint4 v;
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                         : "r"(staged(base, i / CHUNKS, i % CHUNKS)));
            *(uint4 *)((char *)e.out + ((long long)token * e.rows + row) * OUT_BYTES) = v;
        }
    } else
#pragma unroll 1
        for (int i = thread; i < EN * STAGED_ROW; i += 128) {
            int token = i / STAGED_ROW, byte = i % STAGED_ROW;
            if (token0 + token >= e.tokens || row0 + byte / OUT_BYTES >= e.rows) continue;
            u32 v;
            asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(staged(base, token, byte / 16) + byte % 16));
            ((u8 *)e.out)[((long long)(token0 + token) * e.rows + row0) * OUT_BYTES + byte] = v;
        }
}
