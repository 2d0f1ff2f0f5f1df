// A lookup: row ids[t] of the table, times the factor. A null table is none.
struct Lookup {
    const void *table;
    const u32 *ids;
    float factor;
};

// out[t] = sum over lookups, one block per token t. E is the tables' element type.
template <class E> __device__ inline void gather_row(T *out, const Lookup *lookups, long long width) {
    for (long long c = threadIdx.x; c < width; c += blockDim.x) {
        float sum = 0;
        for (int l = 0; l < 4; l++)
            if (lookups[l].table)
                sum += lookups[l].factor * (float)((const E *)lookups[l].table)[lookups[l].ids[blockIdx.x] * width + c];
        out[blockIdx.x * width + c] = sum;
    }
}

#define LOOKUPS                                                                                                    \
    const void *t0, const u32 *i0, float f0, const void *t1, const u32 *i1, float f1, const void *t2, const u32 *i2, \
        float f2, const void *t3, const u32 *i3, float f3

// From f32 tables.
extern "C" __global__ void gather(T *out, LOOKUPS, long long width) {
    Lookup lookups[4] = {{t0, i0, f0}, {t1, i1, f1}, {t2, i2, f2}, {t3, i3, f3}};
    gather_row<float>(out, lookups, width);
}

// From activations.
extern "C" __global__ void gather_activations(T *out, LOOKUPS, long long width) {
    Lookup lookups[4] = {{t0, i0, f0}, {t1, i1, f1}, {t2, i2, f2}, {t3, i3, f3}};
    gather_row<T>(out, lookups, width);
}

// sum[ids[k]] += factor * (grad rows order[starts[k]..starts[k + 1]]), for distinct ids: block (k, tile) has 32 times
// COUNT columns to itself. Its 8 warps take every eighth row, because one id may have all rows (token types), and are
// then added in order.
template <int COUNT, class E>
__device__ inline void scatter_tile(E *sum, const T *grad, const u32 *ids, const u32 *starts, const u32 *order,
                                    float factor, long long width) {
    __shared__ float part[8][32 * COUNT];
    struct alignas(sizeof(T) * COUNT) Some {
        T v[COUNT];
    };
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long first = blockIdx.y * 32LL * COUNT, c = first + lane * COUNT, end = starts[blockIdx.x + 1];
    float s[COUNT] = {};
    if (c < width)
        for (long long j = (long long)starts[blockIdx.x] + warp; j < end; j += 8) {
            Some a = *(const Some *)(grad + order[j] * width + c);
            for (int k = 0; k < COUNT; k++) s[k] += (float)a.v[k];
        }
    for (int k = 0; k < COUNT; k++) part[warp][lane * COUNT + k] = s[k];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * COUNT && first + i < width; i += blockDim.x) {
        float total = part[0][i];
        for (int w = 1; w < 8; w++) total += part[w][i];
        E *to = sum + ids[blockIdx.x] * width + first + i;
        *to = (float)*to + factor * total;
    }
}

// Tiles are as wide as the launcher says.
template <class E>
__device__ inline void scatter_rows(E *sum, const T *grad, const u32 *ids, const u32 *starts, const u32 *order,
                                    float factor, long long width) {
    if (width % PACK) scatter_tile<1>(sum, grad, ids, starts, order, factor, width);
    else scatter_tile<PACK>(sum, grad, ids, starts, order, factor, width);
}

// Into the gradient of an f32 table.
extern "C" __global__ void scatter(float *sum, const T *grad, const u32 *ids, const u32 *starts, const u32 *order,
                                   float factor, long long width) {
    scatter_rows(sum, grad, ids, starts, order, factor, width);
}

// Into the gradient of activations.
extern "C" __global__ void scatter_activations(T *sum, const T *grad, const u32 *ids, const u32 *starts,
                                               const u32 *order, float factor, long long width) {
    scatter_rows(sum, grad, ids, starts, order, factor, width);
}
