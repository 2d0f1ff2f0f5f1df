// Sixteen bytes of activations at a time. T is the element type this source is compiled for.
constexpr int PACK = 16 / sizeof(T);

struct alignas(16) Pack {
    T v[PACK];
};

// A pack's INT8 codes.
struct alignas(PACK) Bytes {
    signed char v[PACK];
};

// Kernels over n elements by packs; arrays begin at aligned addresses.
#define PACKS(i, n)                                                                          \
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < (n);   \
         i += (long long)gridDim.x * blockDim.x * PACK)

// The last pack may be cut short at n.
__device__ inline Pack load(const T *p, long long i, long long n) {
    Pack r;
    if (i + PACK <= n) return *(const Pack *)(p + i);
    for (int k = 0; k < PACK; k++) r.v[k] = i + k < n ? (float)p[i + k] : 0.0f;
    return r;
}

__device__ inline void store(T *p, long long i, long long n, const Pack &r) {
    if (i + PACK <= n) *(Pack *)(p + i) = r;
    else
        for (int k = 0; k < PACK && i + k < n; k++) p[i + k] = (float)r.v[k];
}

// The same for floats beside activations (step sizes, master weights): PACK of them.
__device__ inline void load_floats(const float *p, long long i, long long n, float *r) {
    if (i + PACK <= n) {
#pragma unroll
        for (int k = 0; k < PACK; k += 4) *(float4 *)(r + k) = *(const float4 *)(p + i + k);
        return;
    }
    for (int k = 0; k < PACK; k++) r[k] = i + k < n ? p[i + k] : 0.0f;
}

// Passes over [rows, width] that also sum columns: a block has 32 times COUNT columns (COUNT is PACK where rows begin at
// pack boundaries, and else 1) and, of the rows, part blockIdx.y. f(row, column, sum) handles the COUNT elements of the
// row from the column on and adds to sum[SUMS][COUNT]; parts [parts, SUMS, width] gets the sums. 256 threads a block.
template <int COUNT, int SUMS, class F>
__device__ inline void strip(float *parts, long long rows, long long width, long long per_part, F f) {
    __shared__ float part[8][32 * COUNT];
    int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    long long column = ((long long)blockIdx.x * 32 + lane) * COUNT;
    long long first = blockIdx.y * per_part, last = first + per_part < rows ? first + per_part : rows;
    float sum[SUMS][COUNT] = {};
    if (column < width)
#pragma unroll 4
        for (long long r = first + row; r < last; r += 8) f(r, column, sum);
#pragma unroll
    for (int which = 0; which < SUMS; which++) {
        __syncthreads();
        for (int k = 0; k < COUNT; k++) part[row][lane * COUNT + k] = sum[which][k];
        __syncthreads();
        for (int c = threadIdx.x; c < 32 * COUNT; c += 256) {
            long long at = (long long)blockIdx.x * 32 * COUNT + c;
            if (at >= width) continue;
            float total = part[0][c];
            for (int i = 1; i < 8; i++) total += part[i][c];
            parts[(blockIdx.y * SUMS + which) * width + at] = total;
        }
    }
}

// COUNT elements at a time: of activations, and of floats.
template <int COUNT> struct alignas(sizeof(T) * COUNT) Some {
    T v[COUNT];
};

template <int COUNT> __device__ inline Some<COUNT> some(const T *p) { return *(const Some<COUNT> *)p; }
