// The plain version, written to be right: a block owns a row of scores, which lives in global memory. It moves the
// scores [batch, heads, queries, keys] several times and uses no tensor cores.

#define OPTIONS                                                                                                  \
    long long queries, long long keys, long long heads, long long kv_heads, long long width, float scale,        \
        int causal, int keep, int of, u64 drop_key, u32 drop_below, float drop_factor

// Whether element j of a row of nonnegative values is among the `keep` largest of its group, ties to the lower index.
__device__ inline bool survives(const float *p, long long j, long long n, int keep, int of) {
    long long first = j / of * of, last = first + of < n ? first + of : n;
    int better = 0;
    for (long long i = first; i < last; i++) better += p[i] > p[j] || (p[i] == p[j] && i < j);
    return better < keep;
}

// Pattern and dropout on the row p; `index` counts the row's first element over the whole tensor.
__device__ inline void thin_row(float *thinned, const float *p, long long keys, u32 index, int keep, int of,
                                u64 drop_key, u32 drop_below, float drop_factor) {
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) {
        float v = !of || survives(p, j, keys, keep, of) ? p[j] : 0.0f;
        if (drop_below) v *= random_bits(drop_key, index + (u32)j) < drop_below ? 0.0f : drop_factor;
        thinned[j] = v;
    }
}

// out[c] = factor * sum over rows of weight[row] * x[row * stride + c], c < width.
__device__ inline void combine(T *out, const float *weight, const T *x, long long rows, long long stride,
                               long long width, float factor) {
    for (long long c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = 0;
        for (long long r = 0; r < rows; r++) sum += weight[r] * (float)x[r * stride + c];
        out[c] = sum * factor;
    }
}

__device__ inline float dot(const float *a, const T *b, long long n) {
    float sum = 0;
    for (long long c = 0; c < n; c++) sum += a[c] * (float)b[c];
    return sum;
}

// Block (batch, head, query). `thinned` is null where neither pattern nor dropout changes the softmax.
extern "C" __global__ void forward(T *out, float *softmax, float *thinned, const T *q, const T *k,
                                   const T *v, const u8 *mask, OPTIONS) {
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
    for (long long c = threadIdx.x; c < width; c += blockDim.x) query[c] = q[at_q + c];
    __syncthreads();
    const float none = __int_as_float(0xFF800000);
    float most = none;
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) {
        float score = none;
        if (j < seen && !(mask && !mask[b * keys + j])) score = scale * dot(query, k + at_k + j * stride, width);
        p[j] = score;
        most = fmaxf(most, score);
    }
    most = block_max(most);
    float sum = 0;
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) {
        // A query without a key to attend to gets zeros.
        float e = most == none ? 0.0f : expf(p[j] - most);
        p[j] = e;
        sum += e;
    }
    sum = block_sum(sum);
    float inverse = most == none ? 0.0f : 1.0f / sum;
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) p[j] *= inverse;
    __syncthreads();
    if (thinned) {
        thinned += (bh * queries + i) * keys;
        thin_row(thinned, p, keys, (u32)((bh * queries + i) * keys), keep, of, drop_key, drop_below, drop_factor);
        __syncthreads();
    }
    combine(out + at_q, thinned ? thinned : p, v + at_k, keys, stride, width, 1.0f);
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
        thin_row(thinned, p, keys, (u32)at, keep, of, drop_key, drop_below, drop_factor);
    }
    __syncthreads();
    float along = 0;
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) {
        float d = dot(row_grad, v + at_k + j * stride, width);
        // A kept probability of exactly 0 has no gradient through the softmax either way.
        if (thinned) d = thinned[j] != 0.0f ? d * drop_factor : 0.0f;
        ds[j] = d;
        along += p[j] * d;
    }
    along = block_sum(along);
    for (long long j = threadIdx.x; j < keys; j += blockDim.x) ds[j] = p[j] * (ds[j] - along);
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
