extern "C" __global__ void column(float *out, const float *x, long long column, long long width, long long n) {
    EACH(i, n) out[i] = x[i * width + column];
}

extern "C" __global__ void add_column(
    float *sum, const float *grad, long long column, long long width, long long n
) {
    EACH(i, n) sum[i * width + column] += grad[i];
}
