extern "C" __global__ void column(T *out, const T *x, long long column, long long width, long long n) {
    EACH(i, n) out[i] = x[i * width + column];
}

extern "C" __global__ void add_column(
    T *sum, const T *grad, long long column, long long width, long long n
) {
    EACH(i, n) sum[i * width + column] = sum[i * width + column] + grad[i];
}
