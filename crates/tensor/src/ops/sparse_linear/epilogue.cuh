// What both kernels do with finished accumulators.
//
// A warp holds 16 rows of the weight by 8 tokens in the order that mma and wgmma share: lane 4g + t has tokens 2t and
// 2t + 1 of rows g and g + 8. Weights are packed (mod.rs) so that row g is feature 2g and row g + 8 is feature 2g + 1:
// a lane owns two neighbouring features of each token, a word of the transposed output.

// x Phi(x) = x (1 + tanh(x (A + B x^2 + C x^4))) / 2 to 2.6e-5, fitted over 0 to 6.
constexpr float GELU_A = 0.7975061f, GELU_B = 0.03700711f, GELU_C = -0.00035175096f;

enum { ACCUMULATORS, HALF, CODES };
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

// The factors of one feature.
struct Feature {
    float scale, bias, pair, pair_inverse, step, step_inverse;
};

__device__ inline Feature feature(const Epilogue &e, int row) {
    Feature f = {};
    f.pair = f.pair_inverse = f.step = f.step_inverse = 1.0f;
    if (STORE == ACCUMULATORS || row >= e.rows) return f;
    f.scale = e.scale[row];
    if (BIAS) f.bias = e.bias[row];
    if (PAIR) f.pair = e.pair[row], f.pair_inverse = __frcp_rn(f.pair);
    if (STORE == CODES) f.step = e.step[row], f.step_inverse = __frcp_rn(f.step);
    return f;
}

// x / s correctly rounded, from the correctly rounded 1 / s (Markstein): what a true division gives, in three
// instructions instead of ten.
__device__ inline float quotient(float x, float s, float inverse) {
    float q = __fmul_rn(x, inverse);
    return __fmaf_rn(__fmaf_rn(-q, s, x), inverse, q);
}

// The code of x before the upper bound, which packing applies: round half to even, not below -127.
__device__ inline int code(float x, float s, float inverse) {
    return __float2int_rn(fmaxf(quotient(x, s, inverse), -QMAX));
}

__device__ inline float tanh_fast(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float activated(float x) {
    if (ACT == GELU) {
        float s = fminf(x * x, 50.0f);
        float u = x * fmaf(s, fmaf(s, GELU_C, GELU_B), GELU_A);
        return 0.5f * x + 0.5f * x * tanh_fast(u);
    }
    if (ACT == GELU_TANH) return 0.5f * x + 0.5f * x * tanh_fast(x * fmaf(0.044715f * 0.7978845608f, x * x, 0.7978845608f));
    if (ACT == RELU) return fmaxf(x, 0.0f);
    if (ACT == SILU) return 0.5f * x + 0.5f * x * tanh_fast(0.5f * x);
    if (ACT == TANH) return tanh_fast(x);
    return x;
}

// The map's value, after its output pair.
__device__ inline float value(int acc, const Feature &f) {
    float y = __fmul_rn((float)acc, f.scale);
    if (BIAS) y = __fadd_rn(y, f.bias);
    if (PAIR) {
        int c = min(code(y, f.pair, f.pair_inverse), (int)QMAX);
        y = __fmul_rn((float)c, f.pair);
    }
    return y;
}

__device__ inline u32 halves(float low, float high) {
    u32 h;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low));
    return h;
}

// Two codes, the lower address first.
__device__ inline u32 codes(int low, int high) {
    u32 c;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(c) : "r"(high), "r"(low), "r"(0));
    return c;
}

__device__ inline u32 code_pair(int a, int b, const Feature *f) {
    float x = activated(value(a, f[0])), y = activated(value(b, f[1]));
    return codes(code(x, f[0].step, f[0].step_inverse), code(y, f[1].step, f[1].step_inverse));
}

// 64 features of `EN` tokens lie in shared memory, a row for each token; chunks of 16 bytes are exchanged so that
// neither the writes of a warp nor its reads meet in a bank.
constexpr int STAGED_ROW = 64 * OUT_BYTES;
constexpr int EN = STORE == CODES ? (BN < 64 ? BN : 64) : (BN < 32 ? BN : 32);
constexpr int STAGED = STORE == ACCUMULATORS ? 0 : EN * STAGED_ROW;

__device__ inline u32 staged(u32 base, int token, int chunk) {
    int at = STORE == HALF ? chunk ^ (token & 7) : chunk ^ ((token >> 1) & 3);
    return base + token * STAGED_ROW + at * 16;
}

// Stores a warpgroup's 64 rows x BN tokens; `acc` is in wgmma's order, `base` the group's own staging memory, `f` the
// factors of this lane's two features and `sync` a barrier of the group.
template <class Sync>
__device__ inline void store_tile(const int (&acc)[BN / 2], const Feature *f, const Epilogue &e, u32 base, int row0,
                                  int token0, Sync sync) {
    int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    if constexpr (STORE == ACCUMULATORS) {
        int *out = (int *)e.out;
        int row = row0 + warp * 16 + 2 * g;
#pragma unroll
        for (int i = 0; i < BN / 2; i++) {
            int token = token0 + i / 4 * 8 + 2 * t + i % 2, r = row + i % 4 / 2;
            if (token < e.tokens && r < e.rows) out[(long long)token * e.rows + r] = acc[i];
        }
        return;
    }
#pragma unroll
    for (int first = 0; first < BN; first += EN) {
        if (token0 + first >= e.tokens) return;
        sync();
        if constexpr (STORE == HALF) {
#pragma unroll
            for (int j = 0; j < EN / 8; j++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int *a = acc + (first / 8 + j) * 4 + k;
                    u32 h = halves(activated(value(a[0], f[0])), activated(value(a[2], f[1])));
                    int token = j * 8 + 2 * t + k;
                    asm volatile("st.shared.b32 [%0], %1;" ::"r"(staged(base, token, warp * 2 + g / 4) + g % 4 * 4), "r"(h));
                }
        } else {
#pragma unroll
            for (int j = 0; j < EN / 8; j += 2) {
                u32 m[2];
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int *a = acc + (first / 8 + j + k) * 4;
                    m[k] = code_pair(a[0], a[2], f) | code_pair(a[1], a[3], f) << 16;
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
        sync();
        constexpr int CHUNKS = STAGED_ROW / 16;
        bool whole = e.rows * OUT_BYTES % 16 == 0;
#pragma unroll
        for (int i = thread; i < EN * CHUNKS; i += 128) {
            int token = i / CHUNKS, chunk = i % CHUNKS, row = row0 + chunk * (16 / OUT_BYTES);
            if (token0 + first + token >= e.tokens || row >= e.rows) continue;
            uint4 v;
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                         : "r"(staged(base, token, chunk)));
            char *out = (char *)e.out + ((long long)(token0 + first + token) * e.rows + row) * OUT_BYTES;
            if (whole) *(uint4 *)out = v;
            else {
                int n = min(16 / OUT_BYTES, e.rows - row);
                const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int k = 0; k < 16 / OUT_BYTES; k++) {
                    if (k >= n) break;
                    if (OUT_BYTES == 2) ((unsigned short *)out)[k] = words[k / 2] >> (k % 2 * 16);
                    else out[k] = words[k / 4] >> (k % 4 * 8);
                }
            }
        }
    }
}
