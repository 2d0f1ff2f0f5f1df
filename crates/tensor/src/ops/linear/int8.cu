// The product of INT8 codes on Hopper's tensor cores: sums are exact 32-bit integers, and scale, bias and the output's
// fake quantisation happen before anything is written. T is the type of the output.
//
// A block of two warpgroups has 128 rows (tokens) by 128 columns (outputs); both operands pass through shared memory,
// 128 codes of depth at a time, in rows of 128 bytes whose 16-byte chunks lie as wgmma's 128-byte swizzle wants: one thread
// has the copy engine (TMA) bring them. The products of a step run while the next is waited for.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int TILE = 128, DEPTH = 128, STAGES = 3;
// Bytes of one operand's tile.
constexpr int OPERAND = TILE * DEPTH;
// Elements from row to row of the output's tile, which takes the operands' place at the end.
constexpr int ROW = TILE + 16 / (int)sizeof(T);

__device__ inline u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// A tile's 32 codes of depth from byte k on, for wgmma: first byte, 1024 bytes between groups of eight rows, swizzle.
__device__ inline u64 describe(const u8 *tile, int k) {
    return (shared_address(tile + k) & 0x3FFFF) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// d (64 x 128) = a b, plus d where `add`.
__device__ inline void wgmma(int (*d)[4], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,"
                 "%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,"
                 "%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,"
                 "%56,%57,%58,%59,%60,%61,%62,%63"
                 "}, %64, %65, p;}\n"
                 : "+r"(d[0][0]), "+r"(d[0][1]), "+r"(d[0][2]), "+r"(d[0][3]),
                   "+r"(d[1][0]), "+r"(d[1][1]), "+r"(d[1][2]), "+r"(d[1][3]),
                   "+r"(d[2][0]), "+r"(d[2][1]), "+r"(d[2][2]), "+r"(d[2][3]),
                   "+r"(d[3][0]), "+r"(d[3][1]), "+r"(d[3][2]), "+r"(d[3][3]),
                   "+r"(d[4][0]), "+r"(d[4][1]), "+r"(d[4][2]), "+r"(d[4][3]),
                   "+r"(d[5][0]), "+r"(d[5][1]), "+r"(d[5][2]), "+r"(d[5][3]),
                   "+r"(d[6][0]), "+r"(d[6][1]), "+r"(d[6][2]), "+r"(d[6][3]),
                   "+r"(d[7][0]), "+r"(d[7][1]), "+r"(d[7][2]), "+r"(d[7][3]),
                   "+r"(d[8][0]), "+r"(d[8][1]), "+r"(d[8][2]), "+r"(d[8][3]),
                   "+r"(d[9][0]), "+r"(d[9][1]), "+r"(d[9][2]), "+r"(d[9][3]),
                   "+r"(d[10][0]), "+r"(d[10][1]), "+r"(d[10][2]), "+r"(d[10][3]),
                   "+r"(d[11][0]), "+r"(d[11][1]), "+r"(d[11][2]), "+r"(d[11][3]),
                   "+r"(d[12][0]), "+r"(d[12][1]), "+r"(d[12][2]), "+r"(d[12][3]),
                   "+r"(d[13][0]), "+r"(d[13][1]), "+r"(d[13][2]), "+r"(d[13][3]),
                   "+r"(d[14][0]), "+r"(d[14][1]), "+r"(d[14][2]), "+r"(d[14][3]),
                   "+r"(d[15][0]), "+r"(d[15][1]), "+r"(d[15][2]), "+r"(d[15][3])
                 : "l"(a), "l"(b), "r"(add));
}

__device__ inline void put(float *p, float a, float b) { *(float2 *)p = {a, b}; }
__device__ inline void put(bf16 *p, float a, float b) {
    bf16 v[2] = {bf16(a), bf16(b)};
    *(u32 *)p = *(const u32 *)v;
}

// y[t, o] = sum over i of x[t, i] w[o, i] * (sx * sw[o]) + bias[o], each operation rounded by itself as the integer
// engine does; z is y's value on the grid of its step size: s0, s1 or s2 for each of the ranges of `range` columns. y or z
// may be null, the bias too. `width` is a multiple of 16, `out` of 8 and so is `range`.
extern "C" __global__ void __launch_bounds__(256, 2)
    product(T *y, T *z, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const float *sx, const float *sw, const float *bias, const float *s0,
            const float *s1, const float *s2, int range, int tokens, int out, int width) {
    extern __shared__ __align__(16) u8 shared[];
    u8 *const tiles = (u8 *)(((u64)shared + 1023) / 1024 * 1024);
    int row = blockIdx.y * TILE, column = blockIdx.x * TILE, steps = (width + DEPTH - 1) / DEPTH;
    auto tile = [&](int step, int which) { return tiles + (step % STAGES * 2 + which) * OPERAND; };
    __shared__ alignas(8) u64 barriers[STAGES];
    u32 full = shared_address(barriers);
    auto start = [&](int step) {
        if (step >= steps) return;
        u32 bar = full + 8 * (step % STAGES);
        barrier_expect(bar, 2 * OPERAND);
        fetch(shared_address(tile(step, 0)), &x, step * DEPTH, row, bar);
        fetch(shared_address(tile(step, 1)), &w, step * DEPTH, column, bar);
    };
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(full + 8 * s, 1);
        asm volatile("fence.mbarrier_init.release.cluster;");
        asm volatile("fence.proxy.async;");
        for (int s = 0; s < STAGES - 1; s++) start(s);
    }
    __syncthreads();
    int group = threadIdx.x / 128, d[16][4];
    for (int step = 0; step < steps; step++) {
        barrier_wait(full + 8 * (step % STAGES), step / STAGES & 1);
        const u8 *a = tile(step, 0) + group * 64 * DEPTH, *b = tile(step, 1);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < DEPTH; k += 32) wgmma(d, describe(a, k), describe(b, k), step + k > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        // All have multiplied the step before, whose tiles are filled again.
        __syncthreads();
        if (threadIdx.x == 0) start(step + STAGES - 1);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    // The compiler must not read a result before the wait.
    for (int n = 0; n < 16; n++) asm volatile("" : "+r"(d[n][0]), "+r"(d[n][1]), "+r"(d[n][2]), "+r"(d[n][3])::"memory");
    __syncthreads();
    T *const result = (T *)tiles;
    float step_x = *sx;
    int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < 16; n++) {
        int c = n * 8 + lane % 4 * 2;
        bool in = column + c < out;
        float2 scale = in ? *(const float2 *)(sw + column + c) : float2{0.0f, 0.0f}, b = {0.0f, 0.0f};
        if (bias && in) b = *(const float2 *)(bias + column + c);
        float first = __fmul_rn(step_x, scale.x), second = __fmul_rn(step_x, scale.y);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float u = __fmul_rn((float)d[n][2 * r], first), v = __fmul_rn((float)d[n][2 * r + 1], second);
            if (bias) {
                u = __fadd_rn(u, b.x);
                v = __fadd_rn(v, b.y);
            }
            put(result + (own + 8 * r) * ROW + c, u, v);
        }
    }
    __syncthreads();
    constexpr int PACKS_A_ROW = TILE / PACK;
    for (int id = threadIdx.x; id < TILE * PACKS_A_ROW; id += 256) {
        int r = id / PACKS_A_ROW, c = id % PACKS_A_ROW * PACK;
        if (row + r >= tokens || column + c >= out) continue;
        Pack p = *(const Pack *)(result + r * ROW + c);
        long long at = (long long)(row + r) * out + column + c;
        if (y) *(Pack *)(y + at) = p;
        if (!z) continue;
        int part = (column + c) / range;
        float s = *(part == 0 ? s0 : part == 1 ? s1 : s2);
        Codes codes(s);
#pragma unroll
        for (int k = 0; k < PACK; k++) p.v[k] = codes(p.v[k]) * s;
        *(Pack *)(z + at) = p;
    }
}
#endif
