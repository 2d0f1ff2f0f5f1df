// A warp for each row, eight rows a block. The row is read again for each pass; it stays in the cache.

// The row's columns [c, c + count): of x, plus the residual where there is one; rounded to f16 first if `half`.
template <int COUNT>
__device__ inline void sum_of(float *v, const T *x, const T *residual, long long c, bool half = false) {
    auto held = [&](float x) { return sizeof(T) == 4 && half ? (float)f16(x) : x; };
    if constexpr (COUNT == 1) {
        *v = held(x[c]);
        if (residual) *v += held(residual[c]);
    } else {
        Pack a = *(const Pack *)(x + c);
        for (int k = 0; k < PACK; k++) v[k] = held(a.v[k]);
        if (!residual) return;
        Pack b = *(const Pack *)(residual + c);
        for (int k = 0; k < PACK; k++) v[k] += held(b.v[k]);
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
                                   const float *bias, long long width, float eps, bool half, int lane) {
    float sum = 0, v[COUNT];
    for (long long c = lane * COUNT; c < width; c += 32 * COUNT) {
        sum_of<COUNT>(v, x, residual, c, half);
        for (int k = 0; k < COUNT; k++) sum += v[k];
    }
    float mean = warp_sum(sum) / width, squares = 0;
    for (long long c = lane * COUNT; c < width; c += 32 * COUNT) {
        sum_of<COUNT>(v, x, residual, c, half);
        for (int k = 0; k < COUNT; k++) squares += (v[k] - mean) * (v[k] - mean);
    }
    float r = 1.0f / sqrtf(warp_sum(squares) / width + eps);
    for (long long c = lane * COUNT; c < width; c += 32 * COUNT) {
        sum_of<COUNT>(v, x, residual, c, half);
        for (int k = 0; k < COUNT; k++) v[k] = (v[k] - mean) * r;
        if (normal) put<COUNT>(normal + c, v);
        for (int k = 0; k < COUNT; k++) v[k] = v[k] * gain[c + k] + bias[c + k];
        put<COUNT>(y + c, v);
    }
    if (rstd && lane == 0) *rstd = r;
}

// Rows of so many packs a lane are kept in registers and read once.
constexpr int HELD = 1024 / (32 * PACK);

__device__ inline void forward_held(T *y, T *normal, float *rstd, const T *x, const T *residual, const float *gain,
                                    const float *bias, int width, float eps, bool half, int lane) {
    float v[HELD][PACK], sum = 0;
#pragma unroll
    for (int h = 0; h < HELD; h++) {
        int c = (h * 32 + lane) * PACK;
        if (c >= width) continue;
        sum_of<PACK>(v[h], x, residual, c, half);
#pragma unroll
        for (int k = 0; k < PACK; k++) sum += v[h][k];
    }
    float mean = warp_sum(sum) / width, squares = 0;
#pragma unroll
    for (int h = 0; h < HELD; h++)
        if ((h * 32 + lane) * PACK < width)
#pragma unroll
            for (int k = 0; k < PACK; k++) {
                v[h][k] -= mean;
                squares += v[h][k] * v[h][k];
            }
    float r = 1.0f / sqrtf(warp_sum(squares) / width + eps);
#pragma unroll
    for (int h = 0; h < HELD; h++) {
        int c = (h * 32 + lane) * PACK;
        if (c >= width) continue;
        float g[PACK], b[PACK];
        load_floats(gain, c, width, g);
        load_floats(bias, c, width, b);
#pragma unroll
        for (int k = 0; k < PACK; k++) v[h][k] *= r;
        if (normal) put<PACK>(normal + c, v[h]);
#pragma unroll
        for (int k = 0; k < PACK; k++) v[h][k] = v[h][k] * g[k] + b[k];
        put<PACK>(y + c, v[h]);
    }
    if (rstd && lane == 0) *rstd = r;
}

// `normal` and `rstd` are null when no backward follows, `residual` when there is none.
extern "C" __global__ void forward(T *y, T *normal, float *rstd, const T *x, const T *residual, const float *gain,
                                   const float *bias, long long rows, long long width, float eps, int half) {
    OWN_ROW;
    if (row >= rows) return;
    long long at = row * width;
    T *n = normal ? normal + at : normal;
    const T *r = residual ? residual + at : residual;
    float *s = rstd ? rstd + row : rstd;
    if (width % PACK == 0 && width <= HELD * 32 * PACK)
        forward_held(y + at, n, s, x + at, r, gain, bias, (int)width, eps, half, lane);
    else if (width % PACK == 0) forward_row<PACK>(y + at, n, s, x + at, r, gain, bias, width, eps, half, lane);
    else forward_row<1>(y + at, n, s, x + at, r, gain, bias, width, eps, half, lane);
}

// Of each row, for the second pass: the means of grad * gain and of grad * gain * normal.
template <int COUNT>
__device__ inline void means_of_row(float2 *means, const T *grad, const T *normal, const float *gain, long long width,
                                    int lane) {
    float sum = 0, along = 0, g[COUNT], n[COUNT];
#pragma unroll 4
    for (long long c = lane * COUNT; c < width; c += 32 * COUNT) {
        sum_of<COUNT>(g, grad, nullptr, c);
        sum_of<COUNT>(n, normal, nullptr, c);
        for (int k = 0; k < COUNT; k++) {
            float d = g[k] * gain[c + k];
            sum += d;
            along += d * n[k];
        }
    }
    sum = warp_sum(sum);
    along = warp_sum(along);
    if (lane == 0) *means = {sum / width, along / width};
}

extern "C" __global__ void backward_means(float2 *means, const T *grad, const T *normal, const float *gain,
                                          long long rows, long long width) {
    OWN_ROW;
    if (row >= rows) return;
    if (width % PACK == 0) means_of_row<PACK>(means + row, grad + row * width, normal + row * width, gain, width, lane);
    else means_of_row<1>(means + row, grad + row * width, normal + row * width, gain, width, lane);
}

// The input's gradient, and column sums: of grad (the bias' gradient), of grad * normal (the gain's), and of the input's
// gradient, which is that of the bias of the linear map before.
template <int COUNT>
__device__ inline void backward_strip(float *parts, T *dx, const T *grad, const T *normal, const float *rstd,
                                      const float2 *means, const float *gain, long long rows, long long width,
                                      long long per_part) {
    float w[COUNT];
    long long own = ((long long)blockIdx.x * 32 + threadIdx.x % 32) * COUNT;
    for (int k = 0; k < COUNT; k++) w[k] = own < width ? gain[own + k] : 0.0f;
    strip<COUNT, 3>(parts, rows, width, per_part, [&](long long r, long long c, float (*sum)[COUNT]) {
        Some<COUNT> g = some<COUNT>(grad + r * width + c), n = some<COUNT>(normal + r * width + c), d;
        float2 mean = means[r];
        float scale = rstd[r];
        for (int k = 0; k < COUNT; k++) {
            float gk = g.v[k], nk = n.v[k];
            d.v[k] = scale * (gk * w[k] - mean.x - nk * mean.y);
            sum[0][k] += gk;
            sum[1][k] += gk * nk;
            sum[2][k] += (float)d.v[k];
        }
        *(Some<COUNT> *)(dx + r * width + c) = d;
    });
}

#define BACKWARD(name, COUNT)                                                                                       \
    extern "C" __global__ void name(float *parts, T *dx, const T *grad, const T *normal, const float *rstd,        \
                                    const float2 *means, const float *gain, long long rows, long long width,       \
                                    long long per_part) {                                                           \
        backward_strip<COUNT>(parts, dx, grad, normal, rstd, means, gain, rows, width, per_part);                   \
    }
BACKWARD(backward_pack, PACK)
BACKWARD(backward_1, 1)

// Both passes in one, of rows of up to H packs a lane, which are read once: a warp for each row, eight warps for a block's
// per_part rows. The sums of a warp's columns stay in its lanes.
template <int H>
__device__ inline void backward_held(float *parts, T *dx, const T *grad, const T *normal, const float *rstd,
                                     const float *gain, int rows, int width, int per_part) {
    __shared__ float part[8][H * 32 * PACK];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int last = min(rows, (int)(blockIdx.x + 1) * per_part);
    float sums[3][H][PACK] = {};
    for (int row = blockIdx.x * per_part + warp; row < last; row += 8) {
        long long at = (long long)row * width;
        Pack g[H], n[H];
        float scale = rstd[row], sum = 0, along = 0;
#pragma unroll
        for (int h = 0; h < H; h++) {
            int c = (h * 32 + lane) * PACK;
            if (c >= width) continue;
            g[h] = *(const Pack *)(grad + at + c);
            n[h] = *(const Pack *)(normal + at + c);
        }
#pragma unroll
        for (int h = 0; h < H; h++) {
            int c = (h * 32 + lane) * PACK;
            if (c >= width) continue;
            float w[PACK];
            load_floats(gain, c, width, w);
#pragma unroll
            for (int k = 0; k < PACK; k++) {
                float d = (float)g[h].v[k] * w[k];
                sum += d;
                along += d * (float)n[h].v[k];
            }
        }
        sum = warp_sum(sum) / width;
        along = warp_sum(along) / width;
#pragma unroll
        for (int h = 0; h < H; h++) {
            int c = (h * 32 + lane) * PACK;
            if (c >= width) continue;
            float w[PACK];
            load_floats(gain, c, width, w);
            Pack d;
#pragma unroll
            for (int k = 0; k < PACK; k++) {
                float gk = g[h].v[k], nk = n[h].v[k];
                d.v[k] = scale * (gk * w[k] - sum - nk * along);
                sums[0][h][k] += gk;
                sums[1][h][k] += gk * nk;
                sums[2][h][k] += (float)d.v[k];
            }
            *(Pack *)(dx + at + c) = d;
        }
    }
#pragma unroll
    for (int which = 0; which < 3; which++) {
        __syncthreads();
#pragma unroll
        for (int h = 0; h < H; h++)
#pragma unroll
            for (int k = 0; k < PACK; k++) part[warp][(h * 32 + lane) * PACK + k] = sums[which][h][k];
        __syncthreads();
        for (int c = threadIdx.x; c < width; c += 256) {
            float total = part[0][c];
#pragma unroll
            for (int i = 1; i < 8; i++) total += part[i][c];
            parts[((long long)blockIdx.x * 3 + which) * width + c] = total;
        }
    }
}

#define BACKWARD_HELD(H)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, H < 4 ? 2 : 1)                                                \
        backward_held##H(float *parts, T *dx, const T *grad, const T *normal, const float *rstd, const float *gain, \
                         int rows, int width, int per_part) {                                                       \
        backward_held<H>(parts, dx, grad, normal, rstd, gain, rows, width, per_part);                               \
    }
BACKWARD_HELD(2)
BACKWARD_HELD(3)
BACKWARD_HELD(4)
