// Column sums of x into parts [parts, width], or with y of x and of x * y into [parts, 2, width].
template <int COUNT>
__device__ inline void sums(float *parts, const T *x, const T *y, long long rows, long long width, long long per_part) {
    if (!y)
        return strip<COUNT, 1>(parts, rows, width, per_part, [&](long long r, long long c, float (*sum)[COUNT]) {
            Some<COUNT> a = some<COUNT>(x + r * width + c);
            for (int k = 0; k < COUNT; k++) sum[0][k] += (float)a.v[k];
        });
    strip<COUNT, 2>(parts, rows, width, per_part, [&](long long r, long long c, float (*sum)[COUNT]) {
        Some<COUNT> a = some<COUNT>(x + r * width + c), b = some<COUNT>(y + r * width + c);
        for (int k = 0; k < COUNT; k++) {
            sum[0][k] += (float)a.v[k];
            sum[1][k] += (float)a.v[k] * (float)b.v[k];
        }
    });
}

// By packs where rows allow it.
extern "C" __global__ void column_sums_pack(float *parts, const T *x, const T *y, long long rows, long long width,
                                            long long per_part) {
    sums<PACK>(parts, x, y, rows, width, per_part);
}

extern "C" __global__ void column_sums_1(float *parts, const T *x, const T *y, long long rows, long long width,
                                         long long per_part) {
    sums<1>(parts, x, y, rows, width, per_part);
}

// Sums over the rows of [rows, stride] that other kernels left, of `columns` of its columns: 32 a block of 256 threads.
struct Parts {
    const float *parts;
    float *out;
    long long rows, stride, columns, first_block;
};

extern "C" __global__ void sum_parts(const Parts *table, int entries) {
    __shared__ float part[8][32];
    const Parts &e = own_entry(table, entries, blockIdx.x);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long column = (blockIdx.x - e.first_block) * 32 + lane;
    float sum = 0;
    if (column < e.columns)
#pragma unroll 4
        for (long long r = warp; r < e.rows; r += 8) sum += e.parts[r * e.stride + column];
    part[warp][lane] = sum;
    __syncthreads();
    if (warp || column >= e.columns) return;
    for (int w = 1; w < 8; w++) sum += part[w][lane];
    e.out[column] = sum;
}

// Sums of n floats each, divided: a block for each.
struct Total {
    const float *parts;
    float *out;
    long long n;
    float divisor, unused;
};

extern "C" __global__ void totals(const Total *table) {
    const Total &e = table[blockIdx.x];
    float sum = 0;
    for (long long i = threadIdx.x; i < e.n; i += blockDim.x) sum += e.parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *e.out = sum / e.divisor;
}
