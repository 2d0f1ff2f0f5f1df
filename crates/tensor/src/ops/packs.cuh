// Sixteen bytes of activations at a time. T is the element type this source is compiled for.
constexpr int PACK = 16 / sizeof(T);

struct alignas(16) Pack {
    T v[PACK];
};

// Kernels over n elements by packs; arrays begin at aligned addresses.
#define PACKS(i, n)                                                                          \
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < (n);   \
         i += (long long)gridDim.x * blockDim.x * PACK)

// The last pack may be cut short at n.
__device__ inline Pack load(const T *p, long long i, long long n) {
    Pack r;
    if (i + PACK <= n) return *(const Pack *)(p + i);
    for (int k = 0; k < PACK; k++) r.v[k] = i + k < n ? (float)p[i + k] : 0.0f;
    return r;
}

__device__ inline void store(T *p, long long i, long long n, const Pack &r) {
    if (i + PACK <= n) *(Pack *)(p + i) = r;
    else
        for (int k = 0; k < PACK && i + k < n; k++) p[i + k] = (float)r.v[k];
}

// The same for floats beside activations (step sizes, master weights): PACK of them.
__device__ inline void load_floats(const float *p, long long i, long long n, float *r) {
    if (i + PACK <= n) {
#pragma unroll
        for (int k = 0; k < PACK; k += 4) *(float4 *)(r + k) = *(const float4 *)(p + i + k);
        return;
    }
    for (int k = 0; k < PACK; k++) r[k] = i + k < n ? p[i + k] : 0.0f;
}
