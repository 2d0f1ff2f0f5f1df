extern "C" __global__ void codes(T *out, const T *x, const float *scale, long long n) {
    float s = *scale;
    PACKS(i, n) {
        Pack a = load(x, i, n);
        for (int k = 0; k < PACK; k++) a.v[k] = lsq_code(a.v[k], s);
        store(out, i, n, a);
    }
}

extern "C" __global__ void dequantised(T *out, const T *x, const float *scale, long long n) {
    float s = *scale;
    PACKS(i, n) {
        Pack a = load(x, i, n);
        for (int k = 0; k < PACK; k++) a.v[k] = lsq_code(a.v[k], s) * s;
        store(out, i, n, a);
    }
}

// One element's share of the gradients; returns that of the step size, whose inverse is given. A product is not the
// quotient that codes are made of, so that beside a tie c - v may have the other sign; a true division would take
// longer than memory does.
__device__ inline float element(float g, float x, float inverse, float *dx) {
    float v = x * inverse;
    bool inside = fabsf(v) <= QMAX;
    *dx = inside ? g : 0.0f;
    return g * (inside ? rintf(v) - v : copysignf(QMAX, v));
}

extern "C" __global__ void backward(T *dx, float *parts, const T *grad, const T *x, const float *scale, long long n) {
    float inverse = 1.0f / *scale, sum = 0;
    PACKS(i, n) {
        Pack g = load(grad, i, n), a = load(x, i, n);
        for (int k = 0; k < PACK; k++) {
            float d;
            sum += element(g.v[k], a.v[k], inverse, &d);
            a.v[k] = d;
        }
        store(dx, i, n, a);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

extern "C" __global__ void scale_gradient(float *ds, const float *parts, long long n, float divisor) {
    float sum = 0;
    EACH(i, n) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *ds = sum / divisor;
}

// A block for each row. Weights and their gradients are f32, the codes of either type.
extern "C" __global__ void weight_codes(T *out, const float *w, const u8 *mask, const float *scale, long long width) {
    long long at = blockIdx.x * width;
    float s = scale[blockIdx.x];
    for (long long i = threadIdx.x; i < width; i += blockDim.x)
        out[at + i] = lsq_code(w[at + i] * (float)mask[at + i], s);
}

extern "C" __global__ void weight_backward(float *dw, float *ds, const float *grad, const float *w, const u8 *mask,
                                           const float *scale, long long width, float divisor) {
    long long at = blockIdx.x * width;
    float inverse = 1.0f / scale[blockIdx.x], sum = 0;
    for (long long i = threadIdx.x; i < width; i += blockDim.x) {
        float m = (float)mask[at + i], d;
        sum += element(grad[at + i], w[at + i] * m, inverse, &d);
        dw[at + i] = d * m;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) ds[blockIdx.x] = sum / divisor;
}
