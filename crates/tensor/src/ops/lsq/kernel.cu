extern "C" __global__ void codes(float *out, const float *x, const float *scale, long long n) {
    float s = *scale;
    EACH(i, n) out[i] = lsq_code(x[i], s);
}

extern "C" __global__ void dequantised(float *out, const float *x, const float *scale, long long n) {
    float s = *scale;
    EACH(i, n) out[i] = lsq_code(x[i], s) * s;
}

// One element's share of the gradients; returns that of the step size.
__device__ inline float element(float g, float x, float s, float *dx) {
    float v = __fdiv_rn(x, s), c = lsq_code(x, s);
    bool inside = fabsf(v) <= QMAX;
    *dx = inside ? g : 0.0f;
    return g * (inside ? c - v : c);
}

extern "C" __global__ void backward(float *dx, float *parts, const float *grad, const float *x, const float *scale,
                                    long long n) {
    float s = *scale, sum = 0;
    EACH(i, n) sum += element(grad[i], x[i], s, dx + i);
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

extern "C" __global__ void scale_gradient(float *ds, const float *parts, long long n, float divisor) {
    float sum = 0;
    EACH(i, n) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *ds = sum / divisor;
}

// A block for each row.
extern "C" __global__ void weight_codes(float *out, const float *w, const u8 *mask, const float *scale,
                                        long long width) {
    long long at = blockIdx.x * width;
    float s = scale[blockIdx.x];
    for (long long i = threadIdx.x; i < width; i += blockDim.x)
        out[at + i] = lsq_code(w[at + i] * (float)mask[at + i], s);
}

extern "C" __global__ void weight_backward(float *dw, float *ds, const float *grad, const float *w, const u8 *mask,
                                           const float *scale, long long width, float divisor) {
    long long at = blockIdx.x * width;
    float s = scale[blockIdx.x], sum = 0;
    for (long long i = threadIdx.x; i < width; i += blockDim.x) {
        float m = (float)mask[at + i], d;
        sum += element(grad[at + i], w[at + i] * m, s, &d);
        dw[at + i] = d * m;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) ds[blockIdx.x] = sum / divisor;
}
