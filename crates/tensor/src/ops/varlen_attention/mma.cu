// Attention by mma.sync, for GPUs from Ampere on (Dao 2023, arXiv 2307.08691). A block of four warps owns 64 queries of
// one head, 16 a warp; keys and values pass through shared memory in tiles of 64, two of each at a time.

// Bytes of a row of queries and keys, of a row of values in shared memory, and from row to row there: 16 more, so that
// the eight rows of an ldmatrix hit all banks once.
constexpr int BYTES = CODES_IN ? D : 2 * D, KEY_ROW = BYTES + 16, VALUE_ROW = 2 * D + 16;
constexpr int STEPS = BYTES / 32;

__device__ inline void ldmatrix(u32 *r, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

__device__ inline void ldmatrix_transposed(u32 *r, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

__device__ inline void mma(float *d, const u32 *a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma(int *d, const u32 *a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts copying rows `row` .. `row` + 64 of a matrix into a tile, each to its place; rows from `limit` on become 0.
template <bool PLACED>
__device__ inline void fetch(u32 tile, const char *matrix, long long stride, int row, int limit) {
    for (int c = threadIdx.x; c < TILE * (BYTES / 16); c += 128) {
        int r = c / (BYTES / 16), k = c % (BYTES / 16) * 16;
        bool in = row + r < limit;
        const char *from = matrix + (in ? row + r : 0) * stride + k;
        int bytes = in ? 16 : 0, at = PLACED ? column_of(r) : r;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tile + at * KEY_ROW + k), "l"(from), "r"(bytes));
    }
}

// Values that are codes become halves on their way, so they pass through registers.
constexpr int HELD = CODES_IN ? TILE * D / 16 / 128 : 1;

__device__ inline void take(uint4 *held, const char *values, long long stride, int row, int limit) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int c = threadIdx.x + i * 128, r = c / (D / 16), k = c % (D / 16) * 16;
        held[i] = row + r < limit ? *(const uint4 *)(values + (row + r) * stride + k) : make_uint4(0, 0, 0, 0);
    }
}

__device__ inline void put(u32 tile, const uint4 *held) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int c = threadIdx.x + i * 128, r = c / (D / 16), k = c % (D / 16) * 16;
        u32 at = tile + column_of(r) * VALUE_ROW + 2 * k;
        const u32 words[4] = {held[i].x, held[i].y, held[i].z, held[i].w};
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
            uint2 a = halves_of_codes(words[w]), b = halves_of_codes(words[w + 1]);
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at + w * 8), "r"(a.x), "r"(a.y), "r"(b.x), "r"(b.y));
        }
    }
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;"); }

template <int LEFT> __device__ inline void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT)); }

extern "C" __global__ void __launch_bounds__(128)
    forward(void *out, const void *qkv, const Tile *tiles, int heads, float unit, float value, float step) {
    extern __shared__ __align__(16) char memory[];
    let_next_start();
    after_previous();
    Problem p{out, qkv, tiles, heads, unit, value, step};
    Tile own = tiles[blockIdx.x];
    if (own.query >= own.length) return;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = blockIdx.y, length = own.length;
    constexpr int SIZE = CODES_IN ? 1 : 2;
    long long stride = 3ll * heads * D * SIZE;
    const char *q = (const char *)qkv + own.first * stride + h * D * SIZE;
    const char *k = q + heads * D * SIZE, *v = k + heads * D * SIZE;
    u32 query = shared_address(memory);
    auto keys = [&](int t) { return query + (1 + t % 2) * TILE * KEY_ROW; };
    auto values = [&](int t) { return query + 3 * TILE * KEY_ROW + t % 2 * TILE * VALUE_ROW; };
    int count = (length + TILE - 1) / TILE;
    uint4 held[HELD];
    auto start = [&](int t) {
        fetch<true>(keys(t), k, stride, t * TILE, length);
        if constexpr (CODES_IN) take(held, v, stride, t * TILE, length);
        else fetch<true>(values(t), v, stride, t * TILE, length);
    };
    fetch<false>(query, q, stride, own.query, length);
    start(0);
    if constexpr (CODES_IN) put(values(0), held);
    commit();
    float o[BLOCKS][4] = {};
    Softmax m;
    u32 a[STEPS][4];
    for (int t = 0; t < count; t++) {
        if (t + 1 < count) start(t + 1);
        commit();
        wait<1>();
        __syncthreads();
        if (t == 0)
            for (int i = 0; i < STEPS; i++)
                ldmatrix(a[i], query + (warp * 16 + lane % 16) * KEY_ROW + i * 32 + lane / 16 * 16);
        float s[TILE / 8][4];
        {
            Sum sums[TILE / 8][4] = {};
#pragma unroll
            for (int i = 0; i < STEPS; i++)
#pragma unroll
                for (int n = 0; n < TILE / 16; n++) {
                    u32 r[4];
                    ldmatrix(r, keys(t) + (n * 16 + lane / 16 * 8 + lane % 8) * KEY_ROW + i * 32 + lane / 8 % 2 * 16);
                    mma(sums[2 * n], a[i], r[0], r[1]);
                    mma(sums[2 * n + 1], a[i], r[2], r[3]);
                }
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) s[n][c] = score_of(sums[n][c]);
        }
        if ((t + 1) * TILE > length) close(s, length - t * TILE);
        u32 w[TILE / 16][4];
        float shrink[2];
        if (weigh(s, m, unit, w, t == 0, shrink)) rescale(o, shrink);
#pragma unroll
        for (int i = 0; i < TILE / 16; i++) {
            if (ONES_COLUMN) mma(o[BLOCKS - 1], w[i], 0x3C003C00, 0x3C003C00);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 r[4];
                ldmatrix_transposed(r, values(t) + (i * 16 + lane % 16) * VALUE_ROW + n * 32 + lane / 16 * 16);
                mma(o[2 * n], w[i], r[0], r[1]);
                mma(o[2 * n + 1], w[i], r[2], r[3]);
            }
        }
        if constexpr (CODES_IN)
            if (t + 1 < count) put(values(t + 1), held);
        __syncthreads();
    }
    wait<0>();
    finish(o, m, p, (long long)own.first * heads * D + h * D, own.query + warp * 16, length);
}
