// What both kernels do with finished accumulators.
//
// A warp holds 16 rows of the weight by 8 tokens in the order that mma and wgmma share: lane 4g + t has tokens 2t and
// 2t + 1 of rows g and g + 8. Weights are packed (mod.rs) so that row g is feature 2g and row g + 8 is feature 2g + 1:
// a lane owns two neighbouring features of each token, a word of the transposed output.

// x Phi(x) = x (1 + tanh(x (A + B x^2 + C x^4))) / 2 to 2.6e-5, fitted over 0 to 6.
constexpr float GELU_A = 0.7975061f, GELU_B = 0.03700711f, GELU_C = -0.00035175096f;

enum { ACCUMULATORS, HALF, CODES };
// As `activation::number` counts them.
enum { NONE, GELU, GELU_TANH, RELU, SILU, TANH };

struct Epilogue {
    const float *scale, *bias, *pair, *step;
    void *out;
    int tokens, rows, cols;
};

// Parameters of a kernel that make an Epilogue.
#define EPILOGUE                                                                                                    \
    const float *scale, const float *bias, const float *pair, const float *step, void *out, int tokens, int rows, \
        int cols

constexpr int OUT_BYTES = STORE == ACCUMULATORS ? 4 : STORE == HALF ? 2 : 1;

// Activations by the hardware's tanh.
constexpr bool SMOOTH = ACT != NONE && ACT != RELU;

// The factors of one feature.
struct Feature {
    float scale, bias, pair, pair_inverse, step, step_inverse;
    // Of what activations read, where that is not exact in any case: (acc * scale + bias) / pair in one operation, as a
    // part of -QMAX..QMAX if there is a pair; the activation's last factor and the code's.
    float fused_scale, fused_bias, gain;
};

__device__ inline Feature feature(const Epilogue &e, int row) {
    Feature f = {};
    f.pair = f.pair_inverse = f.step = f.step_inverse = 1.0f;
    if (STORE == ACCUMULATORS || row >= e.rows) return f;
    f.scale = e.scale[row];
    if (BIAS) f.bias = e.bias[row];
    if (PAIR) f.pair = e.pair[row], f.pair_inverse = __frcp_rn(f.pair);
    if (STORE == CODES) f.step = e.step[row], f.step_inverse = __frcp_rn(f.step);
    f.fused_scale = f.scale * f.pair_inverse, f.fused_bias = f.bias * f.pair_inverse;
    if (PAIR) f.fused_scale /= 2 * QMAX, f.fused_bias = f.fused_bias / (2 * QMAX) + 0.5f;
    f.gain = ACT == TANH ? f.step_inverse : 0.5f * f.pair * f.step_inverse;
    return f;
}

// x / s correctly rounded, from the correctly rounded 1 / s (Markstein): what a true division gives, in three
// instructions instead of ten.
__device__ inline float quotient(float x, float s, float inverse) {
    float q = __fmul_rn(x, inverse);
    return __fmaf_rn(__fmaf_rn(-q, s, x), inverse, q);
}

// Adding 1.5 * 2^23 leaves no fraction in a float.
constexpr float WHOLE = 12582912.0f;

// Rounded half to even and clamped to the codes.
__device__ inline float rounded(float q) {
    return __fsub_rn(__fadd_rn(fminf(fmaxf(q, -QMAX), QMAX), WHOLE), WHOLE);
}

// The map's value, after its output pair.
__device__ inline float value(int acc, const Feature &f) {
    float y = __fmul_rn((float)acc, f.scale);
    if (BIAS) y = __fadd_rn(y, f.bias);
    if (PAIR) y = __fmul_rn(rounded(quotient(y, f.pair, f.pair_inverse)), f.pair);
    return ACT == RELU ? fmaxf(y, 0.0f) : y;
}

__device__ inline u32 halves(float low, float high) {
    u32 h;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low));
    return h;
}

__device__ inline u32 multiply2(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

__device__ inline u32 multiply_add2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// Two of a constant.
__device__ inline u32 both(float v) { return halves(v, v); }

// tanh of what the activation asks for, of two values in f16: GELU, SiLU are x (1 + tanh u) / 2.
__device__ inline u32 tanh2(u32 x) {
    u32 u = x;
    if (ACT == GELU) {
        u32 s = multiply2(x, x);
        // Beyond, tanh is 1 and the polynomial wrong.
        asm("min.f16x2 %0, %0, %1;" : "+r"(s) : "r"(both(50.0f)));
        u = multiply2(x, multiply_add2(s, multiply_add2(s, both(GELU_C), both(GELU_B)), both(GELU_A)));
    }
    if (ACT == GELU_TANH) {
        constexpr float K = 0.7978845608f;
        u = multiply2(x, multiply_add2(multiply2(x, x), both(0.044715f * K), both(K)));
    }
    if (ACT == SILU) u = multiply2(x, both(0.5f));
    u32 t;
    asm("tanh.approx.f16x2 %0, %1;" : "=r"(t) : "r"(u));
    return t;
}

// Two quotients to codes, the first in the lower byte. The conversion stops at 127 and -128: what may be less than that
// has to be clamped before.
__device__ inline u32 codes(float low, float high) {
    u32 c;
    int a = __float2int_rn(low), b = __float2int_rn(high);
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(c) : "r"(b), "r"(a), "r"(0));
    return c;
}

__device__ inline u32 code_pair(int a, int b, const Feature *f) {
    if constexpr (SMOOTH) {
        float x[2] = {(float)a, (float)b};
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (PAIR) {
                // Clamped by the saturation to 0..1, which costs nothing, and rounded.
                asm("fma.rn.sat.f32 %0, %0, %1, %2;" : "+f"(x[i]) : "f"(f[i].fused_scale), "f"(f[i].fused_bias));
                x[i] = __fsub_rn(fmaf(x[i], 2 * QMAX, WHOLE - QMAX), WHOLE);
            } else x[i] = fmaf(x[i], f[i].fused_scale, f[i].fused_bias);
        u32 h = halves(x[0], x[1]);
        if (PAIR) h = multiply2(h, halves(f[0].pair, f[1].pair));
        u32 t = tanh2(h);
        float low, high;
        asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }" : "=f"(low), "=f"(high) : "r"(t));
        if (ACT == TANH) low *= f[0].gain, high *= f[1].gain;
        else {
            float p = x[0] * f[0].gain, q = x[1] * f[1].gain;
            low = fmaf(p, low, p), high = fmaf(q, high, q);
        }
        return codes(fmaxf(low, -QMAX), fmaxf(high, -QMAX));
    }
    return codes(fmaxf(quotient(value(a, f[0]), f[0].step, f[0].step_inverse), -QMAX),
                 fmaxf(quotient(value(b, f[1]), f[1].step, f[1].step_inverse), -QMAX));
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
