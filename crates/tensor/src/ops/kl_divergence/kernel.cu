// One block per row. `counts` is null if every row counts.

// The divergence of each row; 0 for a row that does not count. `factor` is the inverse of the temperature.
extern "C" __global__ void row_losses(
    float *out, const float *student, const float *teacher, const u8 *counts, float factor, long long width
) {
    if (counts && !counts[blockIdx.x]) {
        if (threadIdx.x == 0) out[blockIdx.x] = 0.0f;
        return;
    }
    const float *s = student + blockIdx.x * width, *p = teacher + blockIdx.x * width;
    LogSum sz = log_sum_exp(s, width, factor);
    LogSum pz = log_sum_exp(p, width, factor);
    float sum = 0.0f;
    for (long long c = threadIdx.x; c < width; c += blockDim.x) {
        float lp = scaled(p[c], factor) - pz.most - pz.log;
        float lq = scaled(s[c], factor) - sz.most - sz.log;
        sum += expf(lp) * (lp - lq);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// The slope with respect to the student's logits; `divisor` is temperature times counted rows.
extern "C" __global__ void backward(
    float *dx, const float *grad, const float *student, const float *teacher, const u8 *counts, float factor,
    float divisor, long long width
) {
    float *d = dx + blockIdx.x * width;
    if (counts && !counts[blockIdx.x]) {
        for (long long c = threadIdx.x; c < width; c += blockDim.x) d[c] = 0.0f;
        return;
    }
    const float *s = student + blockIdx.x * width, *p = teacher + blockIdx.x * width;
    LogSum sz = log_sum_exp(s, width, factor);
    LogSum pz = log_sum_exp(p, width, factor);
    float g = *grad / divisor;
    for (long long c = threadIdx.x; c < width; c += blockDim.x) {
        float q = expf(scaled(s[c], factor) - sz.most - sz.log);
        d[c] = g * (q - expf(scaled(p[c], factor) - pz.most - pz.log));
    }
}
