// Sums over rows of [rows, width], for one part of the rows for each blockIdx.y: of x into `out`, and of x * y into
// `products` where y is given. 32 lanes of COUNT columns by 8 rows a block.
template <class E, int COUNT>
__device__ inline void sums(float *out, float *products, const E *x, const E *y, long long rows, long long width,
                            long long per_part) {
    __shared__ float part[8][32 * COUNT];
    int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    long long column = ((long long)blockIdx.x * 32 + lane) * COUNT;
    long long first = blockIdx.y * per_part, last = first + per_part < rows ? first + per_part : rows;
    struct alignas(sizeof(E) * COUNT) Some {
        E v[COUNT];
    };
    float sum[COUNT] = {}, product[COUNT] = {};
    if (column < width)
#pragma unroll 4
        for (long long r = first + row; r < last; r += 8) {
            Some a = *(const Some *)(x + r * width + column);
            for (int k = 0; k < COUNT; k++) sum[k] += (float)a.v[k];
            if (!y) continue;
            Some b = *(const Some *)(y + r * width + column);
            for (int k = 0; k < COUNT; k++) product[k] += (float)a.v[k] * (float)b.v[k];
        }
    for (int which = 0; which < (y ? 2 : 1); which++) {
        __syncthreads();
        for (int k = 0; k < COUNT; k++) part[row][lane * COUNT + k] = which ? product[k] : sum[k];
        __syncthreads();
        float *to = which ? products : out;
        for (int c = threadIdx.x; c < 32 * COUNT; c += 256) {
            long long at = (long long)blockIdx.x * 32 * COUNT + c;
            if (at >= width) continue;
            float total = part[0][c];
            for (int i = 1; i < 8; i++) total += part[i][c];
            to[blockIdx.y * width + at] = total;
        }
    }
}

// By packs where rows allow it.
extern "C" __global__ void column_sums_pack(float *out, float *products, const T *x, const T *y, long long rows,
                                         long long width, long long per_part) {
    sums<T, PACK>(out, products, x, y, rows, width, per_part);
}

extern "C" __global__ void column_sums_1(float *out, float *products, const T *x, const T *y, long long rows,
                                         long long width, long long per_part) {
    sums<T, 1>(out, products, x, y, rows, width, per_part);
}
