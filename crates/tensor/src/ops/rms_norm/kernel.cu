// A warp for each row, eight rows a block.

extern "C" __global__ void forward(T *y, float *rstd, const T *x, const float *gain, long long rows,
                                   long long width, float eps) {
    OWN_ROW;
    if (row >= rows) return;
    x += row * width;
    float squares = 0;
    for (long long i = lane; i < width; i += 32) squares += (float)x[i] * (float)x[i];
    float r = 1.0f / sqrtf(warp_sum(squares) / width + eps);
    for (long long i = lane; i < width; i += 32) y[row * width + i] = x[i] * r * gain[i];
    if (lane == 0) rstd[row] = r;
}

// `normal` receives x / rms, from which the gain's gradient is summed.
extern "C" __global__ void backward(T *dx, T *normal, const T *grad, const T *x, const float *rstd,
                                    const float *gain, long long rows, long long width) {
    OWN_ROW;
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
