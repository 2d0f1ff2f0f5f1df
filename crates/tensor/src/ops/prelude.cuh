// Shared by all kernels. NVRTC compiles without the toolkit's headers, so that no toolkit has to be installed.
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr float QMAX = 127.0f;

// bfloat16: the upper half of a float, rounded to nearest even. Arithmetic happens in float.
struct bf16 {
    unsigned short bits;
    bf16() = default;
    __device__ explicit bf16(float v) { *this = v; }
    __device__ bf16 &operator=(float v) {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
        return *this;
    }
    __device__ operator float() const { return __uint_as_float((u32)bits << 16); }
};

// IEEE half. Arithmetic happens in float.
struct f16 {
    unsigned short bits;
    f16() = default;
    __device__ explicit f16(float v) { *this = v; }
    __device__ f16 &operator=(float v) {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
        return *this;
    }
    __device__ operator float() const {
        float v;
        asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
        return v;
    }
};

// Two halves in a word, the lower address first.
__device__ inline u32 f16_pair(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ inline float2 floats_of_pair(u32 pair) {
    float2 r;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(r.x), "=f"(r.y) : "r"(pair));
    return r;
}

// Kernels over n elements stride by the whole grid.
#define EACH(i, n) \
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (long long)gridDim.x * blockDim.x)

// Kernels with a warp for each row and eight rows a block (ROWS in their launchers).
#define OWN_ROW long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32; int lane = threadIdx.x % 32

// Kernels over many arrays find theirs in a table: the last entry that begins at this block or before.
template <class Entry> __device__ inline const Entry &own_entry(const Entry *table, int entries, u32 block) {
    int low = 0, high = entries - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (table[middle].first_block <= block) low = middle;
        else high = middle - 1;
    }
    return table[low];
}

__device__ inline float warp_sum(float v) {
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
    return v;
}

__device__ inline float warp_max(float v) {
    for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, d));
    return v;
}

// Sum over a block of up to 1024 threads, the same in every thread, always in the same order.
__device__ inline float block_sum(float v) {
    __shared__ float part[32];
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < (blockDim.x + 31) / 32; w++) total += part[w];
    return total;
}

__device__ inline float block_max(float v) {
    __shared__ float part[32];
    v = warp_max(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    float most = part[0];
    for (int w = 1; w < (blockDim.x + 31) / 32; w++) most = fmaxf(most, part[w]);
    return most;
}

// x * factor, kept out of fused multiply-adds: those would take the rounding error of huge logits for a difference.
__device__ inline float scaled(float x, float factor) { return __fmul_rn(x, factor); }

struct LogSum {
    float most, log;
};

// Largest element times the factor, and log of the sum of e^(x * factor) around it, as ops/cross_entropy/cpu.rs. All
// threads of the block call it together.
__device__ inline LogSum log_sum_exp(const float *row, long long width, float factor) {
    float most = -__int_as_float(0x7F800000);
    for (long long c = threadIdx.x; c < width; c += blockDim.x) most = fmaxf(most, row[c]);
    most = scaled(block_max(most), factor);
    float sum = 0.0f;
    for (long long c = threadIdx.x; c < width; c += blockDim.x) sum += expf(scaled(row[c], factor) - most);
    return {most, logf(block_sum(sum))};
}

// The INT8 code of x under step size s, as ops/lsq/cpu.rs: true division, round half to even, NaN gives 0.
__device__ inline float lsq_code(float x, float s) {
    float v = __fdiv_rn(x, s);
    v = v > -QMAX ? v : (v <= -QMAX ? -QMAX : 0.0f);
    v = v < QMAX ? v : QMAX;
    return rintf(v) + 0.0f;
}

// A step size that many values are divided by. The code is lsq_code's (of NaN it is -127): x / s correctly rounded, from
// the correctly rounded 1 / s (Markstein 1990), in three instructions where a division has ten. Clipped before, so that
// nothing overflows: the code of fl(127 s) is 127.
//
// 1.5 * 2^23 added, a sum has no bits below 1, and so rounds to even itself, where a conversion has a fourth of the rate.
constexpr float CODE_ZERO = 12582912.0f;
struct Step {
    float s, inverse, most;
    __device__ explicit Step(float step) : s(step), inverse(__frcp_rn(step)), most(QMAX * step) {}
    // The code plus CODE_ZERO. The low byte is the code's.
    __device__ float above(float x) const {
        x = fminf(fmaxf(x, -most), most);
        float q = __fmul_rn(x, inverse);
        return __fadd_rn(__fmaf_rn(__fmaf_rn(-q, s, x), inverse, q), CODE_ZERO);
    }
    // A word whose low byte is the code.
    __device__ u32 code(float x) const { return __float_as_uint(above(x)); }
};

// lsq_code under a step size that many values are divided by: x / s correctly rounded as in Step, but for any s (powers of
// two keep it where nothing overflows or loses bits), and NaN gives 0.
struct Codes {
    float factor;
    Step step;
    __device__ explicit Codes(float s)
        : factor(s < 0x1p-100f ? 0x1p100f : s > 0x1p100f ? 0x1p-100f : 1.0f), step(s * factor) {}
    __device__ float above(float x) const { return step.above(x == x ? x * factor : 0.0f); }
    __device__ float operator()(float x) const { return __fsub_rn(above(x), CODE_ZERO); }
};

// Waits until what the kernel before wrote can be read, if this one was started early; and lets the next start early.
__device__ inline void after_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// One element's share of LSQ's gradients; returns that of the step size, whose inverse is given. A product is not the
// quotient that codes are made of, so that beside a tie c - v may have the other sign; a true division would take
// longer than memory does.
__device__ inline float lsq_element(float g, float x, float inverse, float *dx) {
    float v = x * inverse;
    bool inside = fabsf(v) <= QMAX;
    *dx = inside ? g : 0.0f;
    // rintf, of what is inside, which takes eight times as long.
    float whole = __fsub_rn(__fadd_rn(v, 12582912.0f), 12582912.0f);
    return g * (inside ? whole - v : copysignf(QMAX, v));
}

// 32 random bits for `index` under `key`, as cpu.rs: the same mask on every device.
__device__ inline u32 random_mix(u32 h) {
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    return h ^ (h >> 16);
}

__device__ inline u32 random_bits(u64 key, u32 index) {
    return random_mix(random_mix(index * 0x9E3779B9u + (u32)key) + (u32)(key >> 32));
}
