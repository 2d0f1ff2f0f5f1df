// One block per row.

// The loss of each row; 0 for a row that does not count.
extern "C" __global__ void row_losses(float *out, const float *logits, const int *labels, int ignore, long long width) {
    int label = labels[blockIdx.x];
    if (label == ignore) {
        if (threadIdx.x == 0) out[blockIdx.x] = 0.0f;
        return;
    }
    const float *row = logits + blockIdx.x * width;
    LogSum z = log_sum_exp(row, width, 1.0f);
    if (threadIdx.x == 0) out[blockIdx.x] = z.log - (row[label] - z.most);
}

// The slope with respect to the logits; `counted` rows count.
extern "C" __global__ void backward(
    float *dx, const float *grad, const float *logits, const int *labels, int ignore, float counted, long long width
) {
    int label = labels[blockIdx.x];
    float *d = dx + blockIdx.x * width;
    if (label == ignore) {
        for (long long c = threadIdx.x; c < width; c += blockDim.x) d[c] = 0.0f;
        return;
    }
    const float *row = logits + blockIdx.x * width;
    LogSum z = log_sum_exp(row, width, 1.0f);
    float g = *grad / counted;
    for (long long c = threadIdx.x; c < width; c += blockDim.x) {
        float slope = g * expf(row[c] - z.most - z.log);
        d[c] = c == label ? slope - g : slope;
    }
}

// Second stage of every loss: sum of n numbers over `divisor`, by one block of 256 threads, always in the same
// order. In f64 as on the CPU: there are as many numbers as rows.
extern "C" __global__ void mean(float *out, const float *x, long long n, float divisor) {
    __shared__ double part[256];
    double sum = 0.0;
    for (long long i = threadIdx.x; i < n; i += 256) sum += x[i];
    part[threadIdx.x] = sum;
    for (u32 d = 128; d; d /= 2) {
        __syncthreads();
        if (threadIdx.x < d) part[threadIdx.x] += part[threadIdx.x + d];
    }
    if (threadIdx.x == 0) *out = (float)(part[0] / divisor);
}
