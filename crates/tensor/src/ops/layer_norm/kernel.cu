// A warp for each row, eight rows a block. The row is read again for each pass; it stays in the cache.
#define ROW long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32; int lane = threadIdx.x % 32

// The row's columns [c, c + count): of x, plus the residual where there is one.
template <int COUNT> __device__ inline void sum_of(float *v, const T *x, const T *residual, long long c) {
    if constexpr (COUNT == 1) {
        *v = x[c];
        if (residual) *v += (float)residual[c];
    } else {
        Pack a = *(const Pack *)(x + c);
        for (int k = 0; k < PACK; k++) v[k] = a.v[k];
        if (!residual) return;
        Pack b = *(const Pack *)(residual + c);
        for (int k = 0; k < PACK; k++) v[k] += (float)b.v[k];
    }
}

template <int COUNT> __device__ inline void put(T *p, const float *v) {
    if constexpr (COUNT == 1) *p = *v;
    else {
        Pack r;
        for (int k = 0; k < PACK; k++) r.v[k] = v[k];
        *(Pack *)p = r;
    }
}

template <int COUNT>
__device__ inline void forward_row(T *y, T *normal, float *rstd, const T *x, const T *residual, const float *gain,
                                   const float *bias, long long width, float eps, int lane) {
    float sum = 0, v[COUNT];
    for (long long c = lane * COUNT; c < width; c += 32 * COUNT) {
        sum_of<COUNT>(v, x, residual, c);
        for (int k = 0; k < COUNT; k++) sum += v[k];
    }
    float mean = warp_sum(sum) / width, squares = 0;
    for (long long c = lane * COUNT; c < width; c += 32 * COUNT) {
        sum_of<COUNT>(v, x, residual, c);
        for (int k = 0; k < COUNT; k++) squares += (v[k] - mean) * (v[k] - mean);
    }
    float r = 1.0f / sqrtf(warp_sum(squares) / width + eps);
    for (long long c = lane * COUNT; c < width; c += 32 * COUNT) {
        sum_of<COUNT>(v, x, residual, c);
        for (int k = 0; k < COUNT; k++) v[k] = (v[k] - mean) * r;
        if (normal) put<COUNT>(normal + c, v);
        for (int k = 0; k < COUNT; k++) v[k] = v[k] * gain[c + k] + bias[c + k];
        put<COUNT>(y + c, v);
    }
    if (rstd && lane == 0) *rstd = r;
}

// `normal` and `rstd` are null when no backward follows, `residual` when there is none.
extern "C" __global__ void forward(T *y, T *normal, float *rstd, const T *x, const T *residual, const float *gain,
                                   const float *bias, long long rows, long long width, float eps) {
    ROW;
    if (row >= rows) return;
    long long at = row * width;
    T *n = normal ? normal + at : normal;
    const T *r = residual ? residual + at : residual;
    float *s = rstd ? rstd + row : rstd;
    if (width % PACK == 0) forward_row<PACK>(y + at, n, s, x + at, r, gain, bias, width, eps, lane);
    else forward_row<1>(y + at, n, s, x + at, r, gain, bias, width, eps, lane);
}

template <int COUNT>
__device__ inline void backward_row(T *dx, const T *grad, const T *normal, float rstd, const float *gain,
                                    long long width, int lane) {
    float sum = 0, along = 0, g[COUNT], n[COUNT];
    for (long long c = lane * COUNT; c < width; c += 32 * COUNT) {
        sum_of<COUNT>(g, grad, nullptr, c);
        sum_of<COUNT>(n, normal, nullptr, c);
        for (int k = 0; k < COUNT; k++) {
            float d = g[k] * gain[c + k];
            sum += d;
            along += d * n[k];
        }
    }
    float mean = warp_sum(sum) / width;
    along = warp_sum(along) / width;
    for (long long c = lane * COUNT; c < width; c += 32 * COUNT) {
        sum_of<COUNT>(g, grad, nullptr, c);
        sum_of<COUNT>(n, normal, nullptr, c);
        for (int k = 0; k < COUNT; k++) g[k] = rstd * (g[k] * gain[c + k] - mean - n[k] * along);
        put<COUNT>(dx + c, g);
    }
}

extern "C" __global__ void backward(T *dx, const T *grad, const T *normal, const float *rstd, const float *gain,
                                    long long rows, long long width) {
    ROW;
    if (row >= rows) return;
    long long at = row * width;
    if (width % PACK == 0) backward_row<PACK>(dx + at, grad + at, normal + at, rstd[row], gain, width, lane);
    else backward_row<1>(dx + at, grad + at, normal + at, rstd[row], gain, width, lane);
}
