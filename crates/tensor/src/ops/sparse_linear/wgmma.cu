// Hopper: one warp loads activations by TMA, WGS warpgroups multiply and store.
//
// D = W X^T: the weight is wgmma's sparse operand A, so a tile has features as rows and tokens as columns. What limits
// sparse wgmma is shared memory: m64nNk64 takes N / 2 cycles and reads 64 N bytes of X, all of the 128 bytes a cycle
// that there are. So the weight comes from registers, X is written once for as many rows as fit (WGS * 64), and where
// a group's rows fit in its registers (RESIDENT) the weight is read once and only tokens stream.

constexpr int STEP = SPARSE ? 64 : 32;            // inputs that one wgmma multiplies
constexpr int STEPS = 128 / STEP;                 // of a stage, which has 128 inputs
constexpr int CHUNK = STEPS * (2048 + 512 * SPARSE);  // bytes of 64 rows x 128 inputs of the weight
constexpr int X_BYTES = BN * 128;
constexpr int W_BYTES = RESIDENT ? 0 : WGS * CHUNK;
constexpr int STAGE = X_BYTES + W_BYTES;
constexpr int ROWS = WGS * 64;
// Blocks of a cluster either share their tokens (CLUSTER > 1: each loads a part for all) or a tile's inputs (SPLIT > 1:
// each sums a part, and finishes a part of the tokens).
constexpr int BLOCKS = CLUSTER * SPLIT;
static_assert(CLUSTER == 1 || SPLIT == 1, "one or the other");

__device__ inline u32 shared_address(const void *p) {
    u32 a;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
    return a;
}

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

__device__ inline void load_w(u32 to, const void *from, u32 bytes, u32 bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
}

#define N8(b) "%" #b "0,%" #b "1,%" #b "2,%" #b "3,%" #b "4,%" #b "5,%" #b "6,%" #b "7,%" #b "8,%" #b "9"
#define D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define D16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define D32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," N8(1) "," N8(2) ",%30,%31"
#define D48 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," N8(1) "," N8(2) "," N8(3) ",%40,%41,%42,%43,%44,%45,%46,%47"
#define D64 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," N8(1) "," N8(2) "," N8(3) "," N8(4) "," N8(5) ",%60,%61,%62,%63"
#define D96 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," N8(1) "," N8(2) "," N8(3) "," N8(4) "," N8(5) "," N8(6) "," N8(7) "," N8(8) ",%90,%91,%92,%93,%94,%95"
#define D112 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," N8(1) "," N8(2) "," N8(3) "," N8(4) "," N8(5) "," N8(6) "," N8(7) "," N8(8) "," N8(9) "," N8(10) ",%110,%111"
#define D128 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," N8(1) "," N8(2) "," N8(3) "," N8(4) "," N8(5) "," N8(6) "," N8(7) "," N8(8) "," N8(9) "," N8(10) "," N8(11) ",%120,%121,%122,%123,%124,%125,%126,%127"
#define R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define R32(i) R16(i), R16(i + 16)

// d (+)= a x: `keep` says whether d counts. The places of the other operands follow the accumulators'.
template <int N> struct Product;
#define PRODUCT(N, D, A0, A1, A2, A3, X, P, M, ...)                                                                     \
    template <> struct Product<N> {                                                                                     \
        static __device__ inline void run(int (&d)[N / 2], const u32 *a, u64 x, u32 meta, int keep) {                   \
            if constexpr (SPARSE)                                                                                       \
                asm volatile("{ .reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                               \
                             "wgmma.mma_async.sp.sync.aligned.m64n" #N "k64.s32.s8.s8 {" D "}, {" A0 "," A1 "," A2 "," A3 \
                             "}, " X ", " M ", 0, p; }"                                                                 \
                             : __VA_ARGS__                                                                              \
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(keep), "r"(meta));               \
            else                                                                                                        \
                asm volatile("{ .reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                               \
                             "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" D "}, {" A0 "," A1 "," A2 "," A3   \
                             "}, " X ", p; }"                                                                           \
                             : __VA_ARGS__                                                                              \
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(keep));                          \
        }                                                                                                               \
    };
PRODUCT(16, D8, "%8", "%9", "%10", "%11", "%12", "%13", "%14", R4(0), R4(4))
PRODUCT(32, D16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", R16(0))
PRODUCT(64, D32, "%32", "%33", "%34", "%35", "%36", "%37", "%38", R32(0))
PRODUCT(96, D48, "%48", "%49", "%50", "%51", "%52", "%53", "%54", R32(0), R16(32))
PRODUCT(128, D64, "%64", "%65", "%66", "%67", "%68", "%69", "%70", R32(0), R32(32))
PRODUCT(192, D96, "%96", "%97", "%98", "%99", "%100", "%101", "%102", R32(0), R32(32), R32(64))
PRODUCT(224, D112, "%112", "%113", "%114", "%115", "%116", "%117", "%118", R32(0), R32(32), R32(64), R16(96))
PRODUCT(256, D128, "%128", "%129", "%130", "%131", "%132", "%133", "%134", R32(0), R32(32), R32(64), R32(96))

// Where 128 inputs of X tokens lie, K-major in 128-byte swizzled rows: groups of eight rows 1,024 bytes apart.
__device__ inline u64 descriptor(u32 at) { return (u64)(at >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

template <int KEPT> __device__ inline void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(KEPT) : "memory");
}

struct Ring {
    int stage;
    u32 parity;
    __device__ inline void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

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
