// Hopper: one warp loads activations by TMA, WGS warpgroups multiply and store (hopper.cuh).

// Blocks of a cluster either share their tokens (CLUSTER > 1: each loads a part for all) or a tile's inputs (SPLIT > 1:
// each sums a part, and finishes a part of the tokens).
constexpr int BLOCKS = CLUSTER * SPLIT;
static_assert(CLUSTER == 1 || SPLIT == 1, "one or the other");

__device__ inline void barrier_arrive(u32 bar, int cta) {
    if (CLUSTER == 1) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
    else
        asm volatile(
            "{ .reg .b32 r; mapa.shared::cluster.u32 r, %0, %1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [r]; }" ::"r"(bar), "r"(cta)
            : "memory");
}

__device__ inline void load_x(u32 to, const TensorMap *map, int col, int token, u32 bar) {
    if (CLUSTER == 1) fetch(to, map, col, token, bar);
    else
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
            "l"(map), "r"(col), "r"(token), "r"(bar), "h"((unsigned short)((1 << CLUSTER) - 1))
            : "memory");
}

// A box of shared memory to the output; what of it lies outside is not written.
__device__ inline void send(const TensorMap *map, int column, int token, u32 from, bool mine) {
    // Without a branch around it, which would end the overlap of products in the compiler's eyes.
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %4, 0;\n"
                 "@p cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];\n"
                 "cp.async.bulk.commit_group; }" ::"l"(map), "r"(column), "r"(token), "r"(from), "r"((int)mine)
                 : "memory");
}

// Which tiles a cluster owns: blocks of CLUSTER * ROWS features by BN tokens. A resident weight keeps its features.
// Others are taken in bands of so many blocks, in which features come before tokens, so that what is read at a time stays
// in the L2 cache.
constexpr int BAND = 8;

struct Tiles {
    int block, tile, end, by, blocks;
    __device__ inline Tiles(const Epilogue &e) {
        int cluster = blockIdx.x / BLOCKS, clusters = gridDim.x / BLOCKS;
        blocks = (e.rows + CLUSTER * ROWS - 1) / (CLUSTER * ROWS);
        int tiles = (e.tokens + BN - 1) / BN;
        if (RESIDENT) {
            block = cluster % blocks, tile = cluster / blocks, end = tiles;
            by = (clusters - block + blocks - 1) / blocks;
        } else block = 0, tile = cluster, end = tiles * blocks, by = clusters;
    }
    __device__ inline bool more() const { return tile < end; }
    __device__ inline void next() { tile += by; }
    // The band's first block, its blocks, and the tile's place in it.
    __device__ inline int3 band() const {
        int size = BAND * (end / blocks), first = tile / size * BAND;
        return {first, min(BAND, blocks - first), tile % size};
    }
    __device__ inline int token() const { return (RESIDENT ? tile : band().z / band().y) * BN; }
    __device__ inline int row() const {
        return (RESIDENT ? block : band().x + band().z % band().y) * CLUSTER * ROWS;
    }
};

__device__ inline void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Sums of a tile whose inputs were shared out: each block sends the others their tokens' sums and adds up its own.
__device__ inline void gather(const int (&acc)[BN / 2], int (&sums)[DONE / 2], u32 exchange, int rank, int group) {
    int thread = threadIdx.x % 128;
    // Four sums of each thread lie together.
    auto place = [&](int from, int j) { return exchange + (((from * WGS + group) * (DONE / 8) + j) * 128 + thread) * 16; };
#pragma unroll
    for (int to = 0; to < SPLIT; to++) {
        const int *a = acc + to * (DONE / 2);
        if (SPLIT == 1 || to == rank)
#pragma unroll
            for (int i = 0; i < DONE / 2; i++) sums[i] = a[i];
        else
#pragma unroll
            for (int j = 0; j < DONE / 8; j++)
                asm volatile("{ .reg .b32 r; mapa.shared::cluster.u32 r, %0, %1;\n"
                             "st.shared::cluster.v4.b32 [r], {%2, %3, %4, %5}; }" ::"r"(place(rank, j)),
                             "r"(to), "r"(a[j * 4]), "r"(a[j * 4 + 1]), "r"(a[j * 4 + 2]), "r"(a[j * 4 + 3])
                             : "memory");
    }
    if (SPLIT == 1) return;
    cluster_barrier();
    for (int from = 0; from < SPLIT; from++) {
        if (from == rank) continue;
#pragma unroll
        for (int j = 0; j < DONE / 8; j++) {
            int v[4];
            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                         : "r"(place(from, j)));
#pragma unroll
            for (int i = 0; i < 4; i++) sums[j * 4 + i] += v[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(WGS * 128 + 128, PER_SM) __cluster_dims__(BLOCKS, 1, 1)
sparse_linear(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y, const u8 *__restrict__ w, EPILOGUE) {
    const Epilogue e = {scale, bias, pair, step, out, tokens, rows, cols, fetch_table(step)};
    extern __shared__ u8 dynamic[];
    __shared__ alignas(8) u64 barriers[2 * STAGES];
    u32 memory = shared_address(dynamic) + 1023 & ~1023u;
    u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    int group = threadIdx.x / 128;
    // Which of the blocks that share tokens, and which of those that share inputs.
    int rank = blockIdx.x % CLUSTER, part = blockIdx.x % SPLIT;
    int stages = (e.cols + 127) / 128, from_stage = stages * part / SPLIT, to_stage = stages * (part + 1) / SPLIT;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, WGS * CLUSTER);
        asm volatile("fence.mbarrier_init.release.cluster;");
        asm volatile("fence.proxy.async;");
    }
    if (BLOCKS == 1) __syncthreads();
    else cluster_barrier();
    let_next_start();

    if (group == WGS) {
        if (WGS > 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WGS == 3 ? 32 : 24));
        if (threadIdx.x == WGS * 128) {
            // The others write nothing before they have what is loaded here.
            after_previous();
            Ring ring = {0, 1};
            for (Tiles tiles(e); tiles.more(); tiles.next()) {
                int token = tiles.token() + rank * (BN / CLUSTER);
#pragma unroll 1
                for (int k = from_stage; k < to_stage; k++, ring.next()) {
                    u32 bar = full + 8 * ring.stage, at = memory + ring.stage * STAGE;
                    barrier_wait(empty + 8 * ring.stage, ring.parity);
                    barrier_expect(bar, STAGE);
                    load_x(at + rank * (X_BYTES / CLUSTER), &x, k * 128, token, bar);
                    if (!RESIDENT)
#pragma unroll 1
                        for (int i = 0; i < WGS; i++) {
                            long long own = min((tiles.row() + rank * ROWS) / 64 + i, (e.rows - 1) / 64);
                            load_w(at + X_BYTES + i * CHUNK, w + (own * stages + k) * CHUNK, CHUNK, bar);
                        }
                }
            }
        }
        if (SPLIT > 1) cluster_barrier();
    } else {
        if (WGS > 1) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WGS == 3 ? 160 : 240));
        int thread = threadIdx.x % 128;
        int own = rank * ROWS + group * 64;
        int first = own + thread / 32 * 16 + thread % 32 / 4 * 2;
        auto sync = [&] { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); };
        // Two halves: one is filled while the copy engine empties the other.
        u32 staging = memory + STAGES * STAGE + group * 2 * STAGED, other = staging + STAGED;
        // Groups take turns, so that one's epilogue runs under the products of the others.
        auto turn = [&] { if (ORDERED) asm volatile("bar.sync %0, 256;" ::"r"(8 + group) : "memory"); };
        auto pass = [&] { if (ORDERED) asm volatile("bar.arrive %0, 256;" ::"r"(8 + (group + 1) % WGS) : "memory"); };
        Ring ring = {0, 0};
        int acc[BN / 2];
        // Stages whose products may still run; older ones go back to those who fill them.
        int held = 0, oldest = 0;
        auto release = [&] {
            if (thread < CLUSTER) barrier_arrive(empty + 8 * oldest, thread);
            if (++oldest == STAGES) oldest = 0;
        };
        auto issued = [&] {
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            ring.next();
            if (held == DEPTH) {
                wait_products<DEPTH>();
                release();
            } else held++;
        };
        auto finish = [&] {
            wait_products<0>();
            for (; held > 0; held--) release();
        };
        auto store = [&](const Feature *f, int row, int token) {
            int sums[DONE / 2];
            gather(acc, sums, memory + STAGES * STAGE + WGS * 2 * STAGED, part, group);
            token += part * DONE;
            if constexpr (STORE == ACCUMULATORS) return store_sums(sums, e, row, token);
#pragma unroll
            for (int i = 0; i < DONE; i += EN) {
                stage(sums + i / 2, f, staging);
                // The copy engine has read the other half: after the barrier all may write to it.
                asm volatile("fence.proxy.async.shared::cta;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
                sync();
                if (ALIGNED) send(&y, row * OUT_BYTES, token + i, staging, thread == 0);
                else copy_out(e, staging, row, token + i);
                u32 now = staging;
                staging = other, other = now;
            }
        };
        if constexpr (RESIDENT) {
            if (group == WGS - 1) pass();
            constexpr int KS = COLS / STEP;
            // When the next group may begin: of three, two multiply at a time, which keeps the tensor cores busier than
            // one whose products wait for each other.
            constexpr int PASS = WGS == 3 ? KS / 2 : KS - 1;
            u32 a[KS][4], meta[KS];
            Tiles tiles(e);
            const u8 *from = w + (long long)min((tiles.row() + own) / 64, (e.rows - 1) / 64) * stages * CHUNK;
            from += from_stage * CHUNK;
#pragma unroll
            for (int k = 0; k < KS; k++) {
                const u8 *chunk = from + k / STEPS * CHUNK;
                uint4 v = *(const uint4 *)(chunk + k % STEPS * 2048 + thread * 16);
                a[k][0] = v.x, a[k][1] = v.y, a[k][2] = v.z, a[k][3] = v.w;
                meta[k] = SPARSE ? *(const u32 *)(chunk + STEPS * 2048 + k % STEPS * 512 + thread * 4) : 0;
            }
            Feature f[2] = {feature(e, tiles.row() + first), feature(e, tiles.row() + first + 1)};
            for (; tiles.more(); tiles.next()) {
                turn();
#pragma unroll
                for (int k = 0; k < KS; k++) {
                    if (k % STEPS == 0) {
                        barrier_wait(full + 8 * ring.stage, ring.parity);
                        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
                    }
                    u32 at = memory + ring.stage * STAGE + k % STEPS * STEP;
                    Product<BN>::run(acc, a[k], descriptor(at), meta[k], k > 0);
                    if (k % STEPS == STEPS - 1 || k == KS - 1) issued();
                    if (k == PASS) pass();
                }
                finish();
                store(f, tiles.row() + own, tiles.token());
            }
        } else {
            for (Tiles tiles(e); tiles.more(); tiles.next()) {
                // A stage's share of the weight is in registers until its products are done.
                u32 a[DEPTH + 1][STEPS][4], meta[DEPTH + 1][STEPS];
                Feature f[2] = {feature(e, tiles.row() + first), feature(e, tiles.row() + first + 1)};
#pragma unroll 1
                for (int k0 = from_stage; k0 < to_stage; k0 += DEPTH + 1) {
#pragma unroll
                    for (int k = 0; k < DEPTH + 1; k++) {
                        if (k0 + k >= to_stage) break;
                        barrier_wait(full + 8 * ring.stage, ring.parity);
                        u32 at = memory + ring.stage * STAGE, from = at + X_BYTES + group * CHUNK;
#pragma unroll
                        for (int s = 0; s < STEPS; s++) {
                            u32 *v = a[k][s];
                            asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                                         : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                                         : "r"(from + s * 2048 + thread * 16));
                            if (SPARSE)
                                asm volatile("ld.shared.b32 %0, [%1];"
                                             : "=r"(meta[k][s])
                                             : "r"(from + STEPS * 2048 + s * 512 + thread * 4));
                            else meta[k][s] = 0;
                        }
                        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                        for (int s = 0; s < STEPS; s++)
                            Product<BN>::run(acc, a[k][s], descriptor(at + s * STEP), meta[k][s], k0 + k + s > from_stage);
                        issued();
                    }
                }
                finish();
                store(f, tiles.row() + own, tiles.token());
            }
        }
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    // Nobody leaves while others may still write to its memory.
    if (CLUSTER > 1) cluster_barrier();
}
