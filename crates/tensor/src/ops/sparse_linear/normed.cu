// Hopper, few tokens: the blocks of a cluster have all WIDTH features of a tile's tokens between them, so that residual, norm
// and codes follow the product without a kernel of their own (hopper.cuh, row.cuh).
//
// Each block multiplies ROWS features; SPLIT of them share out the inputs of the same features and then exchange sums through
// distributed shared memory. Finished numbers, codes of the output pair or halves, go to the block whose warp normalises the
// token. What arrives is counted in bytes by a barrier of its reader: nobody waits for anybody else.

constexpr int PEERS = WIDTH / ROWS, BLOCKS = PEERS * SPLIT;
static_assert(PEERS * ROWS == WIDTH, "blocks have whole features");
// Tokens of the tile that a block normalises, at most.
constexpr int SLOTS = (BN + BLOCKS - 1) / BLOCKS;
constexpr int ROW_BYTES = WIDTH * OUT_BYTES;
constexpr int SUMS = (SPLIT - 1) * ROWS * DONE * 4;
constexpr int THREADS = WGS * 128 + (RESIDENT ? 0 : 32);
using Summand = Kind<STORE == CODES>;

// To the same place of another block's shared memory, whose barrier counts the bytes.
__device__ inline void send(u32 to, int block, u32 v, u32 bar) {
    asm volatile("{ .reg .b32 r, b; mapa.shared::cluster.u32 r, %0, %1; mapa.shared::cluster.u32 b, %2, %1;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [r], %3, [b]; }" ::"r"(to),
                 "r"(block), "r"(bar), "r"(v)
                 : "memory");
}

__device__ inline void send(u32 to, int block, uint2 v, u32 bar) {
    asm volatile("{ .reg .b32 r, b; mapa.shared::cluster.u32 r, %0, %1; mapa.shared::cluster.u32 b, %2, %1;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [r], {%3, %4}, [b]; }" ::"r"(to),
                 "r"(block), "r"(bar), "r"(v.x), "r"(v.y)
                 : "memory");
}

__device__ inline void send(u32 to, int block, const int *v, u32 bar) {
    asm volatile("{ .reg .b32 r, b; mapa.shared::cluster.u32 r, %0, %1; mapa.shared::cluster.u32 b, %2, %1;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [r], {%3, %4, %5, %6}, [b]; }" ::"r"(to),
                 "r"(block), "r"(bar), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

__device__ inline void received(uint2 &v, u32 at) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
}

__device__ inline void received(uint4 &v, u32 at) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
}

// `hidden` may be `residual`, of which a warp reads its row before it writes, and no other row. A resident weight needs no warp
// that loads: all of the tokens fit in shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(BLOCKS, 1, 1)
    linear_norm(const __grid_constant__ TensorMap x, const u8 *__restrict__ w, const float *scale, const float *bias,
                const float *pair, const float *steps, float pair_step, const f16 *residual, const float *gain,
                const float *norm_bias, float eps, f16 *hidden, signed char *codes, float step, int tokens, int cols) {
    const Epilogue e = {scale, bias, pair, steps, nullptr, tokens, WIDTH, cols, 0};
    const Normal norm = {gain, norm_bias, eps};
    extern __shared__ u8 dynamic[];
    __shared__ alignas(8) u64 barriers[2 * STAGES + 2];
    u32 memory = shared_address(dynamic) + 1023 & ~1023u;
    u32 full = shared_address(barriers), empty = full + 8 * STAGES, summed = full + 16 * STAGES, complete = summed + 8;
    u32 exchange = memory + STAGES * STAGE, arrived = exchange + SUMS;
    int rank = blockIdx.x % BLOCKS, peer = rank / SPLIT, part = rank % SPLIT, token0 = blockIdx.x / BLOCKS * BN;
    int stages = (cols + 127) / 128, from_stage = stages * part / SPLIT, to_stage = stages * (part + 1) / SPLIT;
    int group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, WGS);
        barrier_init(summed, 1), barrier_init(complete, 1);
        asm volatile("fence.mbarrier_init.release.cluster;");
        asm volatile("fence.proxy.async;");
        if (SPLIT > 1) barrier_expect(summed, SUMS);
        barrier_expect(complete, (BN - rank + BLOCKS - 1) / BLOCKS * ROW_BYTES);
    }
    __syncthreads();
    // The others wait for it before they send.
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    let_next_start();
    if (!RESIDENT && group == WGS) {
        if (threadIdx.x == WGS * 128) {
            auto weight = [&](int k, int stage) {
                u32 bar = full + 8 * stage, at = memory + stage * STAGE + X_BYTES;
                barrier_expect(bar, STAGE);
#pragma unroll 1
                for (int i = 0; i < WGS; i++)
                    load_w(at + i * CHUNK, w + ((long long)(peer * WGS + i) * stages + k) * CHUNK, CHUNK, bar);
            };
            // The weight is nobody's to write.
            int ahead = min(STAGES, to_stage - from_stage);
#pragma unroll 1
            for (int k = 0; k < ahead; k++) weight(from_stage + k, k);
            after_previous();
            Ring ring = {0, 1};
#pragma unroll 1
            for (int k = from_stage; k < to_stage; k++, ring.next()) {
                if (k - from_stage >= ahead) {
                    barrier_wait(empty + 8 * ring.stage, ring.parity);
                    weight(k, ring.stage);
                }
                fetch(memory + ring.stage * STAGE, &x, k * 128, token0, full + 8 * ring.stage);
            }
        }
        asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
        return;
    }
    int thread = threadIdx.x % 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int own = peer * WGS + group, first = own * 64 + thread / 32 * 16 + g * 2;
    Feature f[2] = {feature(e, first), feature(e, first + 1)};
    float gains[HELD][8], biases[HELD][8];
    if (GAIN_FIRST) fetch_norm(gains, biases, norm);
    constexpr int KS = RESIDENT ? COLS / STEP : STEPS;
    u32 a[RESIDENT ? KS : 2 * KS][4], meta[RESIDENT ? KS : 2 * KS];
    if constexpr (RESIDENT) {
        static_assert(KS / STEPS <= STAGES, "all of the tokens fit");
        const u8 *from = w + ((long long)own * stages + from_stage) * CHUNK;
#pragma unroll
        for (int k = 0; k < KS; k++) {
            const u8 *chunk = from + k / STEPS * CHUNK;
            uint4 v = *(const uint4 *)(chunk + k % STEPS * 2048 + thread * 16);
            a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
            meta[k] = SPARSE ? *(const u32 *)(chunk + STEPS * 2048 + k % STEPS * 512 + thread * 4) : 0;
        }
    }
    // Weight, gain, bias and steps are nobody's to write.
    after_previous();
    if (RESIDENT && threadIdx.x == 0) {
#pragma unroll 1
        for (int k = 0; k < KS / STEPS; k++) {
            barrier_expect(full + 8 * k, X_BYTES);
            fetch(memory + k * STAGE, &x, (from_stage + k) * 128, token0, full + 8 * k);
        }
    }
    __syncwarp();
    // Before the products: read after them, it takes back what was gained (README).
    uint4 held[HELD];
    auto token = [&](int slot) { return slot * BLOCKS + rank; };
    auto mine = [&](int slot) { return token(slot) < BN && token0 + token(slot) < tokens; };
    auto at = [&](int slot, int h) { return (long long)(token0 + token(slot)) * WIDTH + column(h); };
    auto hold = [&](int slot) {
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if (mine(slot) && in(h)) held[h] = *(const uint4 *)(residual + at(slot, h));
    };
    hold(warp);
    int acc[BN / 2];
    Ring ring = {0, 0};
    int done = 0;
    auto committed = [&] {
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        ring.next();
    };
    if constexpr (RESIDENT) {
#pragma unroll
        for (int k = 0; k < KS; k++) {
            if (k % STEPS == 0) {
                barrier_wait(full + 8 * ring.stage, ring.parity);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            }
            Product<BN>::run(acc, a[k], descriptor(memory + ring.stage * STAGE + k % STEPS * STEP), meta[k], k > 0);
            if (k % STEPS == STEPS - 1) committed();
        }
    } else {
        // A stage's share of the weight is in registers until its products are done, and so are two stages'.
#pragma unroll 1
        for (int k0 = from_stage; k0 < to_stage; k0 += 2) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (k0 + k >= to_stage) break;
                barrier_wait(full + 8 * ring.stage, ring.parity);
                u32 own_x = memory + ring.stage * STAGE, own_w = own_x + X_BYTES + group * CHUNK;
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    u32 *v = a[k * STEPS + s];
                    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                                 : "r"(own_w + s * 2048 + thread * 16));
                    if (SPARSE)
                        asm volatile("ld.shared.b32 %0, [%1];"
                                     : "=r"(meta[k * STEPS + s])
                                     : "r"(own_w + STEPS * 2048 + s * 512 + thread * 4));
                    else meta[k * STEPS + s] = 0;
                }
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    int i = k * STEPS + s;
                    Product<BN>::run(acc, a[i], descriptor(own_x + s * STEP), meta[i], k0 + k + s > from_stage);
                }
                committed();
                if (k0 + k == from_stage) continue;
                wait_products<1>();
                if (thread == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + 8 * done) : "memory");
                if (++done == STAGES) done = 0;
            }
        }
    }
    wait_products<0>();
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    int sums[DONE / 2];
    auto place = [&](int from, int j) { return exchange + (((from * WGS + group) * (DONE / 8) + j) * 128 + thread) * 16; };
#pragma unroll
    for (int to = 0; to < SPLIT; to++) {
        const int *of = acc + to * (DONE / 2);
        if (to == part)
#pragma unroll
            for (int i = 0; i < DONE / 2; i++) sums[i] = of[i];
        else
#pragma unroll
            for (int j = 0; j < DONE / 8; j++) send(place(part - (part > to), j), peer * SPLIT + to, of + j * 4, summed);
    }
    if (SPLIT > 1) barrier_wait(summed, 0);
#pragma unroll
    for (int from = 0; from < SPLIT - 1; from++)
#pragma unroll
        for (int j = 0; j < DONE / 8; j++) {
            uint4 v;
            received(v, place(from, j));
            sums[j * 4] += v.x, sums[j * 4 + 1] += v.y, sums[j * 4 + 2] += v.z, sums[j * 4 + 3] += v.w;
        }
    // Lanes of neighbouring features exchange a token, so that each has four numbers of one.
#pragma unroll
    for (int j = 0; j < DONE / 8; j++) {
        const int *s = sums + j * 4;
        int second = g & 1, of = part * DONE + j * 8 + 2 * t + second;
        u32 to = arrived + of / BLOCKS * ROW_BYTES + (first & ~3) * OUT_BYTES;
        auto exchanged = [&](u32 even, u32 odd) { return __shfl_xor_sync(~0u, second ? even : odd, 4); };
        if constexpr (STORE == CODES) {
            u32 even = code_pair(s[0], s[2], f), odd = code_pair(s[1], s[3], f), other = exchanged(even, odd);
            send(to, of % BLOCKS, second ? __byte_perm(other, odd, 0x5410) : __byte_perm(even, other, 0x5410), complete);
        } else {
            u32 even = halves(value(s[0], f[0]), value(s[2], f[1])), odd = halves(value(s[1], f[0]), value(s[3], f[1]));
            u32 other = exchanged(even, odd);
            send(to, of % BLOCKS, second ? make_uint2(other, odd) : make_uint2(even, other), complete);
        }
    }
    if (!GAIN_FIRST) fetch_norm(gains, biases, norm);
    Step coded(codes ? step : 1.0f);
    barrier_wait(complete, 0);
#pragma unroll 1
    for (int slot = warp; mine(slot); slot += WGS * 4) {
        float v[HELD][8];
#pragma unroll
        for (int h = 0; h < HELD; h++) {
            if (!in(h)) continue;
            Summand::Eight eight;
            received(eight, arrived + slot * ROW_BYTES + column(h) * OUT_BYTES);
            u32 xs[4];
            halves_of(xs, eight, pair_step);
            add(v[h], xs, held[h]);
        }
        normalise_row(v, gains, biases, eps);
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if (in(h)) write({hidden, codes, step}, coded, v[h], at(slot, h));
        hold(slot + WGS * 4);
    }
}
