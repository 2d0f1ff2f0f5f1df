// Attention on tensor cores without score matrices in memory (Dao 2023, arXiv 2307.08691), with the keep:of pattern
// chosen inside. T is bf16; D is a head's width (32, 64, 128); OF the pattern's group (4, 8, 16), 0 for none.
//
// A block has four warps and owns 64 rows of queries (or keys), 16 a warp; the other side passes through shared
// memory in tiles. Weights are powers of 2: of score * unit, where unit = scale * log2(e). Products are `wgmma` on Hopper
// and `mma` elsewhere; both leave a thread the same elements of the result.

// q_stride and k_stride: elements from row to row of q and dq, and of k, v, dk and dv. Rows of out and grad follow each
// other.
#define OPTIONS                                                                                                \
    int queries, int keys, int heads, int kv_heads, int q_stride, int k_stride, float scale, int causal,       \
        int keep, u64 drop_key, u32 drop_below, float drop_factor

constexpr int TILE = 64;
constexpr float LOG2E = 1.44269504f;
constexpr int STEPS = D / 16;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool WGMMA = true;
#else
constexpr bool WGMMA = false;
#endif
// For wgmma a tile is made of parts with rows of at most 128 bytes, whose 16-byte chunks are exchanged within a row as
// the hardware's swizzle of that width does; parts begin at multiples of 1024 bytes. Otherwise a row has eight elements
// more than D, so that the eight rows of an ldmatrix hit all banks once.
constexpr int CHUNKS = D < 64 ? D / 8 : 8;
constexpr int TILE_SIZE = WGMMA ? TILE * D : TILE * (D + 8);

// Where row r and column c (a multiple of eight) of a tile are.
__device__ inline int place(int r, int c) {
    if (!WGMMA) return r * (D + 8) + c;
    int swizzle = CHUNKS == 8 ? r % 8 : r / 2 % 4;
    return c / (CHUNKS * 8) * (TILE * CHUNKS * 8) + r * CHUNKS * 8 + (c / 8 % CHUNKS ^ swizzle) * 8;
}

// The block's tiles, where shared memory is first aligned as they have to be.
__device__ inline T *aligned(T *shared) {
    return (T *)(((u64)shared + 1023) / 1024 * 1024);
}

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float minus_infinity() { return __int_as_float(0xFF800000); }

__device__ inline u32 pack2(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ inline u32 shared_address(const void *p) {
    return (u32)__cvta_generic_to_shared(p);
}

// d += a b: 16 x 16 by 16 x 8.
__device__ inline void mma(float *d, const u32 *a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void ldmatrix(u32 *r, const T *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

__device__ inline void ldmatrix_transposed(u32 *r, const T *p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

// Left operand: 16 rows from `row`, 16 columns from `column` of a tile.
__device__ inline void left(u32 *a, const T *tile, int row, int column) {
    int lane = threadIdx.x % 32;
    ldmatrix(a, tile + place(row + lane % 16, column + lane / 16 * 8));
}

// Right operand from a tile whose rows are the product's columns: columns n .. n + 16 in two halves (r[0], r[1]) and
// (r[2], r[3]), depth k .. k + 16.
__device__ inline void right(u32 *r, const T *tile, int n, int k) {
    int lane = threadIdx.x % 32;
    ldmatrix(r, tile + place(n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
}

// The same from a tile whose rows are the product's depth.
__device__ inline void right_by_depth(u32 *r, const T *tile, int n, int k) {
    int lane = threadIdx.x % 32;
    ldmatrix_transposed(r, tile + place(k + lane % 16, n + lane / 16 * 8));
}

// Starts copying rows `first` .. `first` + TILE of a matrix into a tile; rows from `limit` on become 0.
__device__ inline void fetch(T *tile, const T *matrix, long long stride, int first, int limit) {
    for (int c = threadIdx.x; c < TILE * (D / 8); c += 128) {
        int r = c / (D / 8), k = c % (D / 8) * 8;
        bool in = first + r < limit;
        const T *from = matrix + (in ? first + r : 0) * stride + k;
        int bytes = in ? 16 : 0;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(tile + place(r, k))),
                     "l"(from), "r"(bytes));
    }
}


#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// What wgmma knows of a right operand: its first element, the swizzle, and the bytes between groups of eight rows.
__device__ inline u64 describe(const T *p) {
    constexpr u64 GROUP = 8 * CHUNKS * 16, MODE = CHUNKS == 8 ? 1 : 2;
    return (shared_address(p) & 0x3FFFF) >> 4 | 1ull << 16 | GROUP / 16 << 32 | MODE << 62;
}

// d (64 rows of the block by 8 * N columns) += left (in registers) times right, whose tile's rows are the product's depth.
template <int N> __device__ inline void wgmma(float (*d)[4], const u32 *a, u64 right) {
    if constexpr (N == 8)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
                     "%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;\n"
                     : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
                       "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
                       "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
                       "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
                       "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
                       "+f"(d[7][2]), "+f"(d[7][3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, 1, 1, 1, 1;\n"
                     : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
                       "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
                       "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right));
}

__device__ inline void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wait_for_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// The compiler must not move what it does with these registers over this point.
template <int N> __device__ inline void settled(float (&d)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
        asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

template <int N> __device__ inline void settled(u32 (&a)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
        asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
}

// The same for 64 columns, with a left operand from a tile's rows and a right operand whose rows are the columns.
__device__ inline void wgmma_shared(float (*d)[4], u64 left, u64 right, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
                 "%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, 0;}\n"
                 : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
                   "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
                   "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
                   "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
                   "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
                   "+f"(d[7][2]), "+f"(d[7][3])
                 : "l"(left), "l"(right), "r"(add));
}

// The k-th sixteen columns of a tile.
__device__ inline u64 columns(const T *tile, int k) {
    return describe(tile + k * 16 / (CHUNKS * 8) * (TILE * CHUNKS * 8) + k * 16 % (CHUNKS * 8));
}

// product[n] = `left`, the block's whole tile, times the tile's rows as columns: scores of 64 columns. The registers `a`
// are free: with a left operand that is kept in registers over a loop, ptxas 13.0 gives them to others in between.
__device__ inline void held(u32 (*a)[4], const T *left, int warp) {}

__device__ inline void by_rows(float (*s)[4], const u32 (*a)[4], const T *left, const T *tile) {
#pragma unroll
    for (int k = 0; k < STEPS; k++) wgmma_shared(s, columns(left, k), columns(tile, k), k > 0);
}

// product[n] += weights (64 columns, packed) times the tile: D columns.
__device__ inline void by_depth(float (*o)[4], const u32 (*a)[4], const T *tile) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++)
#pragma unroll
        for (int part = 0; part < D / (CHUNKS * 8); part++)
            wgmma<CHUNKS>(o + part * CHUNKS, a[k], describe(tile + (part * TILE + k * 16) * CHUNKS * 8));
}
#else
__device__ inline void fence_registers() {}
__device__ inline void wait_for_products() {}
template <int N> __device__ inline void settled(float (&d)[N][4]) {}
template <int N> __device__ inline void settled(u32 (&a)[N][4]) {}

// A warp's rows of a tile as left operand.
__device__ inline void held(u32 (*a)[4], const T *tile, int warp) {
    for (int i = 0; i < STEPS; i++) left(a[i], tile, warp * 16, i * 16);
}

__device__ inline void by_rows(float (*s)[4], const u32 (*a)[4], const T *, const T *tile) {
    for (int n = 0; n < TILE / 8; n++)
        for (int c = 0; c < 4; c++) s[n][c] = 0.0f;
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int n = 0; n < TILE / 16; n++) {
            u32 r[4];
            right(r, tile, n * 16, k * 16);
            mma(s[2 * n], a[k], r[0], r[1]);
            mma(s[2 * n + 1], a[k], r[2], r[3]);
        }
}

__device__ inline void by_depth(float (*o)[4], const u32 (*a)[4], const T *tile) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++)
#pragma unroll
        for (int n = 0; n < STEPS; n++) {
            u32 r[4];
            right_by_depth(r, tile, n * 16, k * 16);
            mma(o[2 * n], a[k], r[0], r[1]);
            mma(o[2 * n + 1], a[k], r[2], r[3]);
        }
}
#endif

// All that was fetched is there, and all threads have done with what they read before. Nothing may be on its way when the
// fence comes: it would wait for it.
__device__ inline void arrive() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (WGMMA) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

// Before the first of some products: the registers they read and add to are written, and what they read in shared memory
// has arrived.
template <class... Registers> __device__ inline void products(Registers &...r) {
    (settled(r), ...);
    fence_registers();
}

// After the last of some products: their results may be read.
template <class... Results> __device__ inline void finish(Results &...d) {
    wait_for_products();
    (settled(d), ...);
}

// Weights in a result's layout become a left operand.
__device__ inline void packed(u32 (*a)[4], float (*p)[4]) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
        a[k][0] = pack2(p[2 * k][0], p[2 * k][1]);
        a[k][1] = pack2(p[2 * k][2], p[2 * k][3]);
        a[k][2] = pack2(p[2 * k + 1][0], p[2 * k + 1][1]);
        a[k][3] = pack2(p[2 * k + 1][2], p[2 * k + 1][3]);
    }
}

// Scores of keys from `first` on that a query may not see become minus infinity: beyond `keys`, masked, or not below the
// query's number plus `seen`. Accumulator layout, a thread's first row is query `row`.
__device__ inline void close(float (*s)[4], int first, int row, int keys, int seen, const u8 *mask) {
    int base = row / TILE * TILE;
    // Most tiles are open to all.
    if (!mask && first + TILE <= keys && first + TILE <= base + seen) return;
    int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int j = first + n * 8 + column + c % 2;
            if (j >= keys || j >= row + c / 2 * 8 + seen || (mask && !mask[j])) s[n][c] = minus_infinity();
        }
}

// Whether y, at a lower place or not, goes before x: the larger, of equals the lower.
__device__ inline int before(float y, float x, bool lower) { return lower ? y >= x : y > x; }

// A score as an integer of the same order (infinities too), with its place in its group (0 .. 4) in the two lowest bits, so
// that no two of a group are equal and the lower of two that are equal otherwise is larger. What differs by less than 4
// units in the last place counts as equal here.
__device__ inline int marked(float x, int place) {
    int bits = __float_as_int(x);
    return ((bits ^ (bits >> 31 & 0x7FFFFFFF)) & ~3) | (3 - place);
}

// kept[n][c]: whether score s[n][c] is among the `keep` largest of its group. Accumulator layout: a thread has columns
// 8 n + 2 (lane % 4) + c % 2 of rows lane / 4 + 8 (c / 2). Groups run along columns.
__device__ inline void survivors_of_columns(float (*s)[4], bool (*kept)[4], int keep) {
    if (!OF) return;
    constexpr int LANES = OF < 8 ? OF / 2 : 4;
    int lane = threadIdx.x % 4;
    if (OF == 4 && keep < 3) {
        // The larger and the smaller of a pair of lanes' pairs give the largest two of all.
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int c = 0; c < 4; c += 2) {
                int x0 = marked(s[n][c], lane % 2 * 2), x1 = marked(s[n][c + 1], lane % 2 * 2 + 1);
                int high = max(x0, x1), low = min(x0, x1);
                int high2 = __shfl_xor_sync(~0u, high, 1), low2 = __shfl_xor_sync(~0u, low, 1);
                int least = keep == 1 ? max(high, high2) : max(min(high, high2), max(low, low2));
                kept[n][c] = x0 >= least;
                kept[n][c + 1] = x1 >= least;
            }
        return;
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int c = 0; c < 4; c += 2) {
            float x0 = s[n][c], x1 = s[n][c + 1];
            int rank0 = x1 > x0, rank1 = x0 >= x1;
#pragma unroll
            for (int d = 1; d < LANES; d++) {
                float y0 = __shfl_xor_sync(~0u, x0, d), y1 = __shfl_xor_sync(~0u, x1, d);
                bool lower = (lane ^ d) < lane;
                rank0 += before(y0, x0, lower) + before(y1, x0, lower);
                rank1 += before(y0, x1, lower) + before(y1, x1, lower);
            }
            if (OF == 16) {
                const bool lower = n & 1;
#pragma unroll
                for (int d = 0; d < 4; d++) {
                    float y0 = __shfl_xor_sync(~0u, s[n ^ 1][c], d), y1 = __shfl_xor_sync(~0u, s[n ^ 1][c + 1], d);
                    rank0 += before(y0, x0, lower) + before(y1, x0, lower);
                    rank1 += before(y0, x1, lower) + before(y1, x1, lower);
                }
            }
            kept[n][c] = rank0 < keep;
            kept[n][c + 1] = rank1 < keep;
        }
}

// What survives the pattern is chosen in `forward` and handed to the backward kernels: for each tile of scores (batch and
// head, 64 queries, 64 keys) a word of each thread with its 32 choices, bit c / 2 * 16 + n * 2 + c % 2 for kept[n][c].
__device__ inline long long words_of_tile(long long batch_and_head, int query_tile, int key_tile, int queries, int keys) {
    int query_tiles = (queries + TILE - 1) / TILE, key_tiles = (keys + TILE - 1) / TILE;
    return ((batch_and_head * query_tiles + query_tile) * key_tiles + key_tile) * 128;
}

__device__ inline float drop(u32 index, u64 key, u32 below, float factor) {
    return !below ? 1.0f : random_bits(key, index) < below ? 0.0f : factor;
}

// Three blocks to a multiprocessor where their registers suffice.
#define BLOCK __launch_bounds__(128, WGMMA && D <= 64 ? 3 : 1)

// Block (64 queries, batch and head). `log_sums` [batch, heads, queries] and `survivors` are null when no backward
// follows.
extern "C" __global__ void BLOCK
    forward(T *out, float *log_sums, u32 *survivors, const T *q, const T *k, const T *v, const u8 *mask, OPTIONS) {
    extern __shared__ __align__(16) T shared[];
    T *const tiles = aligned(shared);
    T *const query = tiles;
    const float unit = scale * LOG2E;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * TILE;
    int h = blockIdx.y % heads, b = blockIdx.y / heads, g = h / (heads / kv_heads);
    q += (long long)b * queries * q_stride + h * D;
    k += (long long)b * keys * k_stride + g * D;
    v += (long long)b * keys * k_stride + g * D;
    // A query sees keys below this, plus its own number where attention is causal.
    int seen = causal ? keys - queries + 1 : keys;
    int most = causal ? min(first + TILE, queries) - 1 + seen : keys;
    int count = most <= 0 ? 0 : (min(most, keys) + TILE - 1) / TILE;
    auto tile = [&](int t, int which) { return tiles + (1 + 2 * (t % 2) + which) * TILE_SIZE; };
    fetch(query, q, q_stride, first, queries);
    fetch(tile(0, 0), k, k_stride, 0, keys);
    fetch(tile(0, 1), v, k_stride, 0, keys);
    int row = first + warp * 16 + lane / 4;
    float o[D / 8][4] = {}, top[2] = {minus_infinity(), minus_infinity()}, sum[2] = {};
    u32 a[STEPS][4];
    for (int t = 0; t < count; t++) {
        arrive();
        if (t == 0) held(a, query, warp);
        if (t + 1 < count) {
            fetch(tile(t + 1, 0), k, k_stride, (t + 1) * TILE, keys);
            fetch(tile(t + 1, 1), v, k_stride, (t + 1) * TILE, keys);
        }
        float s[8][4];
        bool kept[8][4];
        products();
        by_rows(s, a, query, tile(t, 0));
        finish(s);
        close(s, t * TILE, row, keys, causal ? seen : 2 * keys, mask ? mask + (long long)b * keys : mask);
        survivors_of_columns(s, kept, keep);
        if (OF && survivors) {
            u32 word = 0;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) word |= (u32)kept[n][c] << (c / 2 * 16 + n * 2 + c % 2);
            survivors[words_of_tile(blockIdx.y, blockIdx.x, t, queries, keys) + threadIdx.x] = word;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float highest = minus_infinity();
#pragma unroll
            for (int n = 0; n < 8; n++) highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            highest = fmaxf(top[r], highest * unit);
            // Nothing seen yet: any finite number does.
            float base = highest == minus_infinity() ? 0.0f : highest;
            float shrink = exp2_fast(top[r] - base);
            top[r] = highest;
            sum[r] *= shrink;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                o[n][2 * r] *= shrink;
                o[n][2 * r + 1] *= shrink;
            }
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int c = 2 * r; c < 2 * r + 2; c++) {
                    float p = exp2_fast(s[n][c] * unit - base);
                    sum[r] += p;
                    if (OF && !kept[n][c]) p = 0.0f;
                    if (drop_below) {
                        u32 at = ((u32)blockIdx.y * queries + row + 8 * r) * keys;
                        p *= drop(at + t * TILE + n * 8 + lane % 4 * 2 + c % 2, drop_key, drop_below, drop_factor);
                    }
                    s[n][c] = p;
                }
        }
        u32 weights[TILE / 16][4];
        packed(weights, s);
        products(o, weights);
        by_depth(o, weights, tile(t, 1));
        finish(o);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        int i = row + 8 * r;
        if (i >= queries) continue;
        float inverse = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
        T *to = out + (((long long)b * queries + i) * heads + h) * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(u32 *)(to + n * 8) = pack2(o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse);
        // A query without a key: its weights come out as 0 again.
        if (log_sums && lane % 4 == 0)
            log_sums[(long long)blockIdx.y * queries + i] =
                sum[r] == 0.0f ? -minus_infinity() : top[r] + log2f(sum[r]);
    }
}

// along [batch, heads, queries]: grad . out of each query and head, in the order of `out` (batch, query, head). A pack
// for each thread.
extern "C" __global__ void row_products(float *along, const T *grad, const T *out, long long n, int queries, int heads) {
    constexpr int THREADS = D / PACK;
    long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / THREADS;
    int part = threadIdx.x % THREADS;
    float sum = 0;
    if (at < n) {
        Pack a = *(const Pack *)(grad + at * D + part * PACK), b = *(const Pack *)(out + at * D + part * PACK);
        for (int k = 0; k < PACK; k++) sum += (float)a.v[k] * (float)b.v[k];
    }
    for (int d = THREADS / 2; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (at >= n || part) return;
    int h = (int)(at % heads);
    long long row = at / heads;
    along[(row / queries * heads + h) * queries + row % queries] = sum;
}

// Block (64 queries, batch and head): the queries' gradient.
extern "C" __global__ void BLOCK
    queries_backward(T *dq, const T *grad, const float *log_sums, const float *along, const u32 *survivors, const T *q,
                     const T *k, const T *v, const u8 *mask, OPTIONS) {
    extern __shared__ __align__(16) T shared[];
    T *const tiles = aligned(shared);
    const float unit = scale * LOG2E;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * TILE;
    int h = blockIdx.y % heads, b = blockIdx.y / heads, g = h / (heads / kv_heads);
    long long at_q = (long long)b * queries * q_stride + h * D;
    k += (long long)b * keys * k_stride + g * D;
    v += (long long)b * keys * k_stride + g * D;
    int seen = causal ? keys - queries + 1 : keys;
    int most = causal ? min(first + TILE, queries) - 1 + seen : keys;
    int count = most <= 0 ? 0 : (min(most, keys) + TILE - 1) / TILE;
    T *const query = tiles, *const slope = tiles + TILE_SIZE;
    auto tile = [&](int t, int which) { return tiles + (2 + 2 * (t % 2) + which) * TILE_SIZE; };
    fetch(query, q + at_q, q_stride, first, queries);
    fetch(slope, grad + ((long long)b * queries * heads + h) * D, heads * D, first, queries);
    fetch(tile(0, 0), k, k_stride, 0, keys);
    fetch(tile(0, 1), v, k_stride, 0, keys);
    u32 a[STEPS][4], d[STEPS][4];
    int row = first + warp * 16 + lane / 4;
    float log_sum[2], dot[2];
    for (int r = 0; r < 2; r++) {
        long long at = (long long)blockIdx.y * queries + row + 8 * r;
        bool in = row + 8 * r < queries;
        log_sum[r] = in ? log_sums[at] : -minus_infinity();
        dot[r] = in ? along[at] : 0.0f;
    }
    float o[D / 8][4] = {};
    for (int t = 0; t < count; t++) {
        arrive();
        if (t == 0) {
            held(a, query, warp);
            held(d, slope, warp);
        }
        if (t + 1 < count) {
            fetch(tile(t + 1, 0), k, k_stride, (t + 1) * TILE, keys);
            fetch(tile(t + 1, 1), v, k_stride, (t + 1) * TILE, keys);
        }
        float s[8][4], dp[8][4];
        u32 kept = OF ? survivors[words_of_tile(blockIdx.y, blockIdx.x, t, queries, keys) + threadIdx.x] : 0;
        products();
        by_rows(s, a, query, tile(t, 0));
        by_rows(dp, d, slope, tile(t, 1));
        finish(s, dp);
        close(s, t * TILE, row, keys, causal ? seen : 2 * keys, mask ? mask + (long long)b * keys : mask);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                float factor = OF && !(kept >> (c / 2 * 16 + n * 2 + c % 2) & 1) ? 0.0f : 1.0f;
                if (drop_below) {
                    u32 at = ((u32)blockIdx.y * queries + row + c / 2 * 8) * keys;
                    factor *= drop(at + t * TILE + n * 8 + lane % 4 * 2 + c % 2, drop_key, drop_below, drop_factor);
                }
                float p = exp2_fast(s[n][c] * unit - log_sum[c / 2]);
                s[n][c] = p * (factor * dp[n][c] - dot[c / 2]);
            }
        u32 slopes[TILE / 16][4];
        packed(slopes, s);
        products(o, slopes);
        by_depth(o, slopes, tile(t, 0));
        finish(o);
    }
    for (int r = 0; r < 2; r++) {
        if (row + 8 * r >= queries) continue;
        T *to = dq + at_q + (long long)(row + 8 * r) * q_stride + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) *(u32 *)(to + n * 8) = pack2(o[n][2 * r] * scale, o[n][2 * r + 1] * scale);
    }
}

// Block (64 keys, batch and key head): gradients of keys and values, over the queries of all heads that share them, in
// one order.
extern "C" __global__ void BLOCK
    keys_backward(T *dk, T *dv, const T *grad, const float *log_sums, const float *along, const u32 *survivors,
                  const T *q, const T *k, const T *v, const u8 *mask, OPTIONS) {
    extern __shared__ __align__(16) T shared[];
    T *const tiles = aligned(shared);
    __shared__ float column_log_sum[2][TILE], column_dot[2][TILE];
    const float unit = scale * LOG2E;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * TILE;
    int g = blockIdx.y % kv_heads, b = blockIdx.y / kv_heads, group = heads / kv_heads;
    long long at_k = (long long)b * keys * k_stride + g * D;
    int seen = causal ? keys - queries + 1 : keys;
    // Queries before this see none of the block's keys.
    int begin = causal ? max(0, first + 1 - seen) / TILE : 0, blocks = (queries + TILE - 1) / TILE - begin;
    int count = blocks <= 0 ? 0 : group * blocks;
    T *const key = tiles, *const value = tiles + TILE_SIZE;
    auto tile = [&](int t, int which) { return tiles + (2 + 2 * (t % 2) + which) * TILE_SIZE; };
    auto start = [&](int t) {
        int h = g * group + t / blocks, from = (begin + t % blocks) * TILE;
        fetch(tile(t, 0), q + (long long)b * queries * q_stride + h * D, q_stride, from, queries);
        fetch(tile(t, 1), grad + ((long long)b * queries * heads + h) * D, heads * D, from, queries);
        if (threadIdx.x < TILE) {
            int i = from + threadIdx.x;
            long long at = ((long long)b * heads + h) * queries + i;
            column_log_sum[t % 2][threadIdx.x] = i < queries ? log_sums[at] : -minus_infinity();
            column_dot[t % 2][threadIdx.x] = i < queries ? along[at] : 0.0f;
        }
    };
    fetch(key, k + at_k, k_stride, first, keys);
    fetch(value, v + at_k, k_stride, first, keys);
    if (count) start(0);
    int row = first + warp * 16 + lane / 4;
    bool open_row[2];
    for (int r = 0; r < 2; r++) {
        int j = row + 8 * r;
        open_row[r] = j < keys && !(mask && !mask[(long long)b * keys + j]);
    }
    bool open_all = __syncthreads_and(open_row[0] && open_row[1]);
    float ok[D / 8][4] = {}, ov[D / 8][4] = {};
    u32 a[STEPS][4], d[STEPS][4];
    for (int t = 0; t < count; t++) {
        arrive();
        if (t + 1 < count) start(t + 1);
        // Wide heads have no registers to keep these.
        if (t == 0 || D > 64) {
            held(a, key, warp);
            held(d, value, warp);
        }
        int h = g * group + t / blocks, from = (begin + t % blocks) * TILE;
        float s[8][4], dp[8][4], thin[8][4];
        // Here keys are rows and queries columns: of queries n / 2 * 16 + 2 (lane % 4) + c % 2 and eight more, word
        // n / 2, c % 2 has this thread's keys in bits n % 2 * 16 + c / 2 * 2 once it is shifted.
        u32 kept[4][2];
        if (OF) {
            const u32 *words = survivors + words_of_tile((long long)b * heads + h, from / TILE, blockIdx.x, queries, keys);
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    kept[m][e] = words[m * 32 + (lane % 4 * 2 + e) * 4 + lane / 8] >> (warp * 4 + lane / 4 % 2);
        }
        products();
        by_rows(s, a, key, tile(t, 0));
        by_rows(dp, d, value, tile(t, 1));
        finish(s, dp);
        if (!open_all || (causal && from + seen <= first + TILE - 1))
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    int i = from + n * 8 + lane % 4 * 2 + c % 2;
                    bool open = open_row[c / 2] && !(causal && row + c / 2 * 8 >= i + seen);
                    if (!open) s[n][c] = minus_infinity();
                }
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int column = n * 8 + lane % 4 * 2 + c % 2;
                float factor = OF && !(kept[n / 2][c % 2] >> (n % 2 * 16 + c / 2 * 2) & 1) ? 0.0f : 1.0f;
                if (drop_below) {
                    u32 at = (((u32)b * heads + h) * queries + from + column) * keys + row + c / 2 * 8;
                    factor *= drop(at, drop_key, drop_below, drop_factor);
                }
                float p = exp2_fast(s[n][c] * unit - column_log_sum[t % 2][column]);
                thin[n][c] = factor * p;
                s[n][c] = p * (factor * dp[n][c] - column_dot[t % 2][column]);
            }
        u32 weights[TILE / 16][4], slopes[TILE / 16][4];
        packed(weights, thin);
        packed(slopes, s);
        products(ov, ok, weights, slopes);
        by_depth(ov, weights, tile(t, 1));
        by_depth(ok, slopes, tile(t, 0));
        finish(ov, ok);
    }
    for (int r = 0; r < 2; r++) {
        if (row + 8 * r >= keys) continue;
        long long at = at_k + (long long)(row + 8 * r) * k_stride + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            *(u32 *)(dk + at + n * 8) = pack2(ok[n][2 * r] * scale, ok[n][2 * r + 1] * scale);
            *(u32 *)(dv + at + n * 8) = pack2(ov[n][2 * r], ov[n][2 * r + 1]);
        }
    }
}
