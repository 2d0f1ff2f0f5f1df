// A warp for each row, eight rows a block.
#define ROW long long row = (long long)blockIdx.x * 8 + threadIdx.x / 32; int lane = threadIdx.x % 32

extern "C" __global__ void forward(float *y, float *rstd, const float *x, const float *gain, long long rows,
                                   long long width, float eps) {
    ROW;
    if (row >= rows) return;
    x += row * width;
    float squares = 0;
    for (long long i = lane; i < width; i += 32) squares += x[i] * x[i];
    float r = 1.0f / sqrtf(warp_sum(squares) / width + eps);
    for (long long i = lane; i < width; i += 32) y[row * width + i] = x[i] * r * gain[i];
    if (lane == 0) rstd[row] = r;
}

// `normal` receives x / rms, from which the gain's gradient is summed.
extern "C" __global__ void backward(float *dx, float *normal, const float *grad, const float *x, const float *rstd,
                                    const float *gain, long long rows, long long width) {
    ROW;
    if (row >= rows) return;
    float r = rstd[row], along = 0;
    for (long long i = lane; i < width; i += 32) along += grad[row * width + i] * gain[i] * x[row * width + i];
    along = warp_sum(along) * r * r / width;
    for (long long i = lane; i < width; i += 32) {
        long long at = row * width + i;
        normal[at] = x[at] * r;
        dx[at] = r * (grad[at] * gain[i] - x[at] * along);
    }
}
