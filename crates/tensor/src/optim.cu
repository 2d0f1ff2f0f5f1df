// One optimiser step over all tensors (optim.rs has the recurrence). A block owns CHUNK elements of one tensor.
constexpr long long CHUNK = 8192;

struct Slot {
    float *p, *m, *v;
    const float *g;
    long long n;
    float lr, decay;
    int positive;
    u32 first_block;
};

// The tensor that this block works on, and which of its elements.
__device__ inline Slot own(const Slot *table, int entries, long long *from, long long *to) {
    Slot s = own_entry(table, entries, blockIdx.x);
    *from = ((long long)blockIdx.x - s.first_block) * CHUNK;
    *to = *from + CHUNK < s.n ? *from + CHUNK : s.n;
    return s;
}

// One partial sum of squares for each block, in double: thousands of gradients' squares are added up.
__device__ inline double block_sum_double(double v) {
    __shared__ double part[32];
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(~0u, v, d);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < blockDim.x / 32; w++) total += part[w];
    return total;
}

extern "C" __global__ void norms(double *parts, const Slot *table, int entries) {
    long long from, to;
    Slot s = own(table, entries, &from, &to);
    double sum = 0;
    // Of a step size 0, and no number if it is none.
    for (long long i = from + threadIdx.x; i < to; i += blockDim.x)
        sum += (double)s.g[i] * (s.positive ? 0.0 : (double)s.g[i]);
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__device__ inline double sum_of(const double *parts, long long blocks) {
    double sum = 0;
    for (long long i = threadIdx.x; i < blocks; i += blockDim.x) sum += parts[i];
    return block_sum_double(sum);
}

// The sum of squares at its place among `shares`, in two parts, f32 and what that leaves; zeros elsewhere.
extern "C" __global__ void squares(float *sums, int share, int shares, const double *parts, long long blocks) {
    double total = sum_of(parts, blocks);
    float high = (float)total, low = isfinite(high) ? (float)(total - high) : 0.0f;
    for (int i = threadIdx.x; i < 2 * shares; i += blockDim.x) sums[i] = i / 2 != share ? 0.0f : i % 2 ? low : high;
}

// The global norm, of the shares of its square if there are any, and what gradients are multiplied by: negative if the step must change
// nothing.
extern "C" __global__ void clip(float *norm, float *factor, const double *parts, long long blocks, const float *squares,
                                int shares, const float *loss, float most) {
    double sum = squares ? 0.0 : sum_of(parts, blocks);
    if (threadIdx.x) return;
    for (int i = 0; i < 2 * shares; i++) sum += squares[i];
    float total = (float)sqrt(sum);
    *norm = total;
    *factor = !isfinite(*loss) || !isfinite(total) ? -1.0f : total > most ? most / total : 1.0f;
}

// m' / (sqrt(v') + eps)
__device__ inline float moments(float *m, float *v, float g, float beta1, float beta2, float eps, float c1, float c2) {
    *m = beta1 * *m + (1.0f - beta1) * g;
    *v = beta2 * *v + (1.0f - beta2) * g * g;
    return *m * c1 / (sqrtf(*v * c2) + eps);
}

extern "C" __global__ void adamw(const Slot *table, int entries, const float *clipping, float beta1, float beta2,
                                 float eps, float positive_eps, float c1, float c2) {
    float factor = *clipping;
    if (factor < 0) return;
    long long from, to;
    Slot s = own(table, entries, &from, &to);
    if (s.positive) {
        // On the logarithm of p, whose gradient is g * p.
        for (long long i = from + threadIdx.x; i < to; i += blockDim.x) {
            float d = moments(s.m + i, s.v + i, s.g[i] * s.p[i], beta1, beta2, positive_eps, c1, c2);
            s.p[i] = fminf(fmaxf(s.p[i] * expf(-s.lr * d), 1e-30f), 1e30f);
        }
        return;
    }
    // Four at a time: chunks and allocations are aligned.
    long long quads = from + (to - from) / 4 * 4;
    for (long long i = from + threadIdx.x * 4; i < quads; i += blockDim.x * 4) {
        float4 p = *(float4 *)(s.p + i), m = *(float4 *)(s.m + i), v = *(float4 *)(s.v + i);
        float4 g = *(const float4 *)(s.g + i);
        float *ps = &p.x, *ms = &m.x, *vs = &v.x, *gs = &g.x;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float d = moments(ms + c, vs + c, factor * gs[c], beta1, beta2, eps, c1, c2);
            ps[c] -= s.lr * (d + s.decay * ps[c]);
        }
        *(float4 *)(s.p + i) = p;
        *(float4 *)(s.m + i) = m;
        *(float4 *)(s.v + i) = v;
    }
    for (long long i = quads + threadIdx.x; i < to; i += blockDim.x) {
        float d = moments(s.m + i, s.v + i, factor * s.g[i], beta1, beta2, eps, c1, c2);
        s.p[i] -= s.lr * (d + s.decay * s.p[i]);
    }
}
