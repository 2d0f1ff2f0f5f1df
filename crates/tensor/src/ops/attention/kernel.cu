// The plain version, written to be right: a block owns a row of scores, which lives in global memory. It moves the
// scores [batch, heads, queries, keys] several times and uses no tensor cores.

#define OPTIONS                                                                                                  \
    long long queries, long long keys, long long heads, long long kv_heads, long long width, float scale,        \
        int causal, int keep, int of, u64 drop_key, u32 drop_below, float drop_factor

// Whether element j of a row is among the `keep` largest of its group, ties to the lower index.
__device__ inline bool survives(const float *p, long long j, long long n, int keep, int of) {
    long long first = j / of * of, last = first + of < n ? first + of : n;
    int better = 0;
    for (long long i = first; i < last; i++) better += p[i] > p[j] || (p[i] == p[j] && i < j);
    return better < keep;
}

// Weights of the row p, of which those that the pattern drops are negative, after dropout; `index` counts the row's first
// element over the whole tensor.
__device__ inline void thin_row(float *thinned, const float *p, long long keys, u32 index, u64 drop_key, u32 drop_below,
                                float drop_factor) {
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) {
        float v = p[j] < 0.0f ? 0.0f : p[j];
        if (drop_below) v *= random_bits(drop_key, index + (u32)j) < drop_below ? 0.0f : drop_factor;
        thinned[j] = v;
    }
}

// How an operand is read: as it is, rounded to f16, or as the code that it is a multiple of the step size by.
struct Read {
    bool half;
    float inverse;
    __device__ float operator()(float x) const {
        return !half ? x : inverse != 0.0f ? rintf(x * inverse) : (float)f16(x);
    }
};

// out[c] = factor * sum over rows of weight[row] * x[row * stride + c], c < width.
__device__ inline void combine(T *out, const float *weight, const T *x, long long rows, long long stride,
                               long long width, float factor, Read read = {}) {
    for (long long c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = 0;
        for (long long r = 0; r < rows; r++) sum += weight[r] * read(x[r * stride + c]);
        out[c] = sum * factor;
    }
}

__device__ inline float dot(const float *a, const T *b, long long n, Read read = {}) {
    float sum = 0;
    for (long long c = 0; c < n; c++) sum += a[c] * read(b[c]);
    return sum;
}

using namespace rounding;

// As `score_unit` in mod.rs.
__device__ inline float score_unit(float scale, float q, float k) {
    double unit = (double)scale * (double)q * (double)k * 1.4426950408889634;
    return (float)(fmax(rint(unit * 1073741824.0), 1.0) / 1073741824.0);
}

// Block (batch, head, query). `thinned` is null where neither pattern nor dropout changes the softmax. `half`: as the engine
// rounds; the steps are null where queries, keys and values are no codes.
extern "C" __global__ void forward(T *out, float *softmax, float *thinned, const T *q, const T *k, const T *v,
                                   const u8 *mask, int half, const float *q_step, const float *k_step,
                                   const float *v_step, OPTIONS) {
    extern __shared__ float query[];
    long long i = blockIdx.x % queries, bh = blockIdx.x / queries, h = bh % heads, b = bh / heads;
    long long stride = kv_heads * width, at_k = b * keys * stride + h / (heads / kv_heads) * width;
    long long at_q = ((b * queries + i) * heads + h) * width;
    float *p = softmax + (bh * queries + i) * keys;
    long long seen = keys;
    if (causal) {
        seen = i + 1 + keys - queries;
        seen = seen < 0 ? 0 : seen < keys ? seen : keys;
    }
    bool codes = q_step;
    float grid = codes ? GRID : 0.0f;
    float unit = half ? score_unit(scale, q_step ? *q_step : 1.0f, q_step ? *k_step : 1.0f) : scale;
    Read of_q{half != 0, q_step ? 1.0f / *q_step : 0.0f}, of_k{half != 0, q_step ? 1.0f / *k_step : 0.0f};
    for (long long c = threadIdx.x; c < width; c += blockDim.x) query[c] = of_q(q[at_q + c]);
    __syncthreads();
    const float none = __int_as_float(0xFF800000);
    float most = none;
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) {
        float score = none;
        if (j < seen && !(mask && !mask[b * keys + j])) {
            score = dot(query, k + at_k + j * stride, width, of_k);
            if (!half) score *= unit;
        }
        p[j] = score;
        most = fmaxf(most, score);
    }
    most = block_max(most);
    if (thinned) thinned += (bh * queries + i) * keys;
    if (of) {
        __syncthreads();
        for (long long j = threadIdx.x; j < keys; j += blockDim.x)
            thinned[j] = survives(p, j, keys, keep, of) ? 1.0f : -1.0f;
        __syncthreads();
    }
    float sum = 0, base = none;
    bool huge = false;
    for (long long t = 0; half && t < keys; t += TILE) {
        long long end = min(t + TILE, keys);
        float top = none;
        for (long long j = t + threadIdx.x; j < end; j += blockDim.x) top = fmaxf(top, p[j]);
        top = block_max(top);
        float bits = top * unit;
        if (top > none && (huge ? top > base : bits >= base + (codes ? ROOM : 0.0f))) {
            bool large = fabsf(bits) >= LARGEST;
            float next = large ? top : ceilf(bits);
            float shrink = exp2f(huge && large ? (base - next) * unit : (huge ? base * unit : base) - (large ? bits : next));
            base = next;
            huge = large;
            sum *= shrink;
            for (long long j = threadIdx.x; j < t; j += blockDim.x) p[j] *= shrink;
        }
        float part = 0;
        for (long long j = t + threadIdx.x; j < end; j += blockDim.x) {
            float bits = huge ? __fadd_rn(__fmul_rn(p[j] - base, unit), grid) : __fmaf_rn(p[j], unit, grid - base);
            float e = base == none ? 0.0f : exp2f(bits - (codes ? grid + SCALE : 0.0f));
            p[j] = (float)f16(e);
            part += !codes ? e : of ? e + ONES - ONES : p[j];
        }
        sum += block_sum(part);
    }
    for (long long j = threadIdx.x; !half && j < keys; j += blockDim.x) {
        // A query without a key to attend to gets zeros.
        float e = most == none ? 0.0f : expf(p[j] - most);
        p[j] = e;
        sum += e;
    }
    if (!half) sum = block_sum(sum);
    __syncthreads();
    float inverse = most == none ? 0.0f : 1.0f / sum;
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) p[j] *= (half ? 1.0f : inverse) * (of ? thinned[j] : 1.0f);
    __syncthreads();
    if (thinned) {
        thin_row(thinned, p, keys, (u32)((bh * queries + i) * keys), drop_key, drop_below, drop_factor);
        __syncthreads();
    }
    Read of_v{half != 0, q_step ? 1.0f / *v_step : 0.0f};
    float value = !half ? 1.0f : most == none ? 0.0f : (q_step ? *v_step : 1.0f) / sum;
    combine(out + at_q, thinned ? thinned : p, v + at_k, keys, stride, width, value, of_v);
    __syncthreads();
    for (long long j = threadIdx.x; half && j < keys; j += blockDim.x) p[j] *= inverse;
}

// Block (batch, head, query): the scores' gradient, and from it the query's.
extern "C" __global__ void backward_queries(T *dq, float *dscores, float *thinned, const float *softmax,
                                            const T *grad, const T *k, const T *v, OPTIONS) {
    extern __shared__ float row_grad[];
    long long i = blockIdx.x % queries, bh = blockIdx.x / queries, h = bh % heads, b = bh / heads;
    long long stride = kv_heads * width, at_k = b * keys * stride + h / (heads / kv_heads) * width;
    long long at_q = ((b * queries + i) * heads + h) * width, at = (bh * queries + i) * keys;
    const float *p = softmax + at;
    float *ds = dscores + at;
    for (long long c = threadIdx.x; c < width; c += blockDim.x) row_grad[c] = grad[at_q + c];
    if (thinned) {
        thinned += at;
        thin_row(thinned, p, keys, (u32)at, drop_key, drop_below, drop_factor);
    }
    __syncthreads();
    float along = 0;
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) {
        float d = dot(row_grad, v + at_k + j * stride, width);
        // A kept probability of exactly 0 has no gradient through the softmax either way.
        if (thinned) d = thinned[j] != 0.0f ? d * drop_factor : 0.0f;
        ds[j] = d;
        along += fabsf(p[j]) * d;
    }
    along = block_sum(along);
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) ds[j] = fabsf(p[j]) * (ds[j] - along);
    __syncthreads();
    combine(dq + at_q, ds, k + at_k, keys, stride, width, scale);
}

// Block (batch, key head, key): sums over the queries of all heads that share the key head, in one order.
extern "C" __global__ void backward_keys(T *dk, T *dv, const float *dscores, const float *weights,
                                         const T *grad, const T *q, OPTIONS) {
    long long j = blockIdx.x % keys, bg = blockIdx.x / keys, g = bg % kv_heads, b = bg / kv_heads;
    long long group = heads / kv_heads, out = ((b * keys + j) * kv_heads + g) * width;
    for (long long c = threadIdx.x; c < width; c += blockDim.x) {
        float sum_k = 0, sum_v = 0;
        for (long long h = g * group; h < (g + 1) * group; h++)
            for (long long i = 0; i < queries; i++) {
                long long at = ((b * heads + h) * queries + i) * keys + j;
                long long at_q = ((b * queries + i) * heads + h) * width + c;
                sum_k += dscores[at] * (float)q[at_q];
                sum_v += weights[at] * (float)grad[at_q];
            }
        dk[out + c] = sum_k * scale;
        dv[out + c] = sum_v;
    }
}
