extern "C" __global__ void column(T *out, const T *x, long long column, long long width, long long n) {
    EACH(i, n) out[i] = x[i * width + column];
}

// Columns `first` to `first` + count of rows of `width`; n is the number of elements chosen.
extern "C" __global__ void columns(T *out, const T *x, long long first, long long count, long long width, long long n) {
    EACH(i, n) out[i] = x[i / count * width + first + i % count];
}

extern "C" __global__ void add_columns(
    T *sum, const T *grad, long long first, long long count, long long width, long long n
) {
    EACH(i, n) {
        T *to = sum + i / count * width + first + i % count;
        *to = (float)*to + (float)grad[i];
    }
}

extern "C" __global__ void add_column(
    T *sum, const T *grad, long long column, long long width, long long n
) {
    EACH(i, n) sum[i * width + column] = sum[i * width + column] + grad[i];
}

// Block (sequence): the sequence's first row of `x`, `bytes` wide.
extern "C" __global__ void first_rows(u8 *out, const u8 *x, const int *starts, long long bytes, int last) {
    let_next_start();
    after_previous();
    const u8 *from = x + min(starts[blockIdx.x], last) * bytes;
    u8 *to = out + blockIdx.x * bytes;
    if (bytes % 16 == 0)
        for (long long i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) *(uint4 *)(to + i) = *(const uint4 *)(from + i);
    else
        for (long long i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
}
