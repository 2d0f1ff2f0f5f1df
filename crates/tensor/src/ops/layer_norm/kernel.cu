// A warp for each row, eight rows a block. The row is read again for each pass; it stays in the cache.
#define ROW long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32; int lane = threadIdx.x % 32

// `normal` and `rstd` are null when no backward follows, `residual` when there is none.
extern "C" __global__ void forward(float *y, float *normal, float *rstd, const float *x, const float *residual,
                                   const float *gain, const float *bias, long long rows, long long width,
                                   float eps) {
    ROW;
    if (row >= rows) return;
    x += row * width;
    y += row * width;
    float sum = 0;
    for (long long i = lane; i < width; i += 32) {
        float v = residual ? x[i] + residual[row * width + i] : x[i];
        y[i] = v;
        sum += v;
    }
    float mean = warp_sum(sum) / width, squares = 0;
    for (long long i = lane; i < width; i += 32) squares += (y[i] - mean) * (y[i] - mean);
    float r = 1.0f / sqrtf(warp_sum(squares) / width + eps);
    for (long long i = lane; i < width; i += 32) {
        float n = (y[i] - mean) * r;
        if (normal) normal[row * width + i] = n;
        y[i] = n * gain[i] + bias[i];
    }
    if (rstd && lane == 0) rstd[row] = r;
}

extern "C" __global__ void backward(float *dx, const float *grad, const float *normal, const float *rstd,
                                    const float *gain, long long rows, long long width) {
    ROW;
    if (row >= rows) return;
    grad += row * width;
    normal += row * width;
    float sum = 0, along = 0;
    for (long long i = lane; i < width; i += 32) {
        float d = grad[i] * gain[i];
        sum += d;
        along += d * normal[i];
    }
    float mean = warp_sum(sum) / width;
    along = warp_sum(along) / width;
    for (long long i = lane; i < width; i += 32)
        dx[row * width + i] = rstd[row] * (grad[i] * gain[i] - mean - normal[i] * along);
}
