// One block per row. `counts` is null if every row counts.

// The sum of squares of each row; 0 for a row that does not count.
extern "C" __global__ void row_sums(
    float *out, const float *x, const float *target, const u8 *counts, long long width
) {
    if (counts && !counts[blockIdx.x]) {
        if (threadIdx.x == 0) out[blockIdx.x] = 0.0f;
        return;
    }
    x += blockIdx.x * width;
    target += blockIdx.x * width;
    float sum = 0.0f;
    for (long long c = threadIdx.x; c < width; c += blockDim.x) {
        float d = x[c] - target[c];
        sum += d * d;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// The slope with respect to x; the loss was the mean of n squares.
extern "C" __global__ void backward(
    float *dx, const float *grad, const float *x, const float *target, const u8 *counts, float n, long long width
) {
    float f = counts && !counts[blockIdx.x] ? 0.0f : 2.0f * *grad / n;
    long long at = blockIdx.x * width;
    for (long long c = threadIdx.x; c < width; c += blockDim.x) dx[at + c] = f * (x[at + c] - target[at + c]);
}
