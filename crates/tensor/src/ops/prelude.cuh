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

// Kernels over n elements stride by the whole grid.
#define EACH(i, n) \
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (long long)gridDim.x * blockDim.x)

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

// The INT8 code of x under step size s, as ops/lsq/cpu.rs: true division, round half to even, NaN gives 0.
__device__ inline float lsq_code(float x, float s) {
    float v = __fdiv_rn(x, s);
    v = v > -QMAX ? v : (v <= -QMAX ? -QMAX : 0.0f);
    v = v < QMAX ? v : QMAX;
    return rintf(v) + 0.0f;
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
    return random_mix(random_mix((index * 0x9E3779B9u) ^ (u32)key) + (u32)(key >> 32));
}
