// Every GPU since Ampere: four warps multiply 64 features by BN tokens with mma (dense) or mma.sp, activations through
// shared memory by cp.async, the weight straight from global memory in the order that a lane needs it.

constexpr int STEP = SPARSE ? 64 : 32;
constexpr int STEPS = 128 / STEP;
constexpr int CHUNK = STEPS * (2048 + 512 * SPARSE);
constexpr int PITCH = 128 + 16;  // of a token's 128 inputs: lanes of a warp read 32 different banks
constexpr int X_BYTES = BN * PITCH;

__device__ inline void multiply(int *d, const u32 *a, const u32 *b, u32 meta) {
    if constexpr (SPARSE)
        asm volatile(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rows of X need an alignment of 4 bytes; those of 16 are copied four times as fast.
__device__ inline void copy_x(u32 to, const u8 *x, const Epilogue &e, int token0, int col0) {
    for (int i = threadIdx.x; i < BN * 8; i += 128) {
        int token = i / 8, chunk = i % 8, col = col0 + chunk * 16;
        bool inside = token0 + token < e.tokens;
        const u8 *from = x + (inside ? (long long)(token0 + token) * e.cols : 0);
        u32 at = to + token * PITCH + chunk * 16;
        if (e.cols % 16 == 0) {
            int bytes = inside && col < e.cols ? 16 : 0;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from + (bytes ? col : 0)), "r"(bytes));
        } else
#pragma unroll
            for (int k = 0; k < 16; k += 4) {
                int bytes = inside && col + k < e.cols ? 4 : 0;
                asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at + k), "l"(from + (bytes ? col + k : 0)),
                             "r"(bytes));
            }
    }
    asm volatile("cp.async.commit_group;");
}

extern "C" __global__ void __launch_bounds__(128) multiply_tiles(const u8 *__restrict__ x, const u8 *__restrict__ w,
                                                                  EPILOGUE) {
    const Epilogue e = {scale, bias, pair, step, out, tokens, rows, cols, fetch_table(step)};
    extern __shared__ uint4 dynamic[];
    u32 memory;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(memory) : "l"(dynamic));
    int blocks = (e.rows + 63) / 64, block = blockIdx.x % blocks, token0 = blockIdx.x / blocks * BN;
    int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
    int stages = (e.cols + 127) / 128;
    const u8 *from = w + (long long)block * stages * CHUNK;
    int acc[BN / 2] = {};
    let_next_start();
    after_previous();
#pragma unroll
    for (int k = 0; k < STAGES - 1; k++) copy_x(memory + k * X_BYTES, x, e, token0, k * 128);
    for (int k = 0; k < stages; k++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        __syncthreads();
        // The stage that all warps have left behind them.
        copy_x(memory + (k + STAGES - 1) % STAGES * X_BYTES, x, e, token0, (k + STAGES - 1) * 128);
        u32 at = memory + k % STAGES * X_BYTES + g * PITCH + t * 4;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            uint4 v = *(const uint4 *)(from + s * 2048 + thread * 16);
            const u32 a[4] = {v.x, v.y, v.z, v.w};
            u32 meta = SPARSE ? *(const u32 *)(from + STEPS * 2048 + s * 512 + thread * 4) : 0;
#pragma unroll
            for (int j = 0; j < BN / 8; j++) {
                u32 b[STEP / 16];
#pragma unroll
                for (int i = 0; i < STEP / 16; i++)
                    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(b[i]) : "r"(at + j * 8 * PITCH + s * STEP + i * 16));
                multiply(acc + j * 4, a, b, meta);
            }
        }
        from += CHUNK;
    }
    asm volatile("cp.async.wait_all;");
    __syncthreads();
    int row = block * 64, first = row + thread / 32 * 16 + g * 2;
    Feature f[2] = {feature(e, first), feature(e, first + 1)};
    if constexpr (STORE == ACCUMULATORS) store_sums(acc, e, row, token0);
    else
#pragma unroll
        for (int first = 0; first < DONE; first += EN) {
            stage(acc + first / 2, f, memory);
            __syncthreads();
            copy_out(e, memory, row, token0 + first);
            __syncthreads();
        }
}
