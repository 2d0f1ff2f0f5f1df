// Attention by wgmma, for Hopper (Shah et al. 2024, arXiv 2407.08608). A block owns 64 * WARPGROUPS queries of one head, a
// warpgroup 64. Keys and values pass through shared memory in tiles of 64, PARTS of each at a time: halves copied three tiles
// ahead, codes through registers; queries and weights stay in registers. Warpgroups of a multiprocessor take turns by themselves: while one has its
// products made, another takes exponentials. Where there are few queries, SPLIT groups of warpgroups share the keys out,
// each every SPLIT-th tile, and add up what they have in the end.

// Bytes of a row of queries and keys. Rows of tiles lie 32, 64 or 128 bytes apart, swizzled so that wgmma reads them; of
// 256 bytes there are two halves, one after the other.
constexpr int BYTES = CODES_IN ? D : 2 * D, ROW = BYTES < 128 ? BYTES : 128;
constexpr int VALUE_ROW = D < 64 ? 2 * D : 128;
constexpr int KEY_TILE = TILE * BYTES, VALUE_TILE = TILE * 2 * D;
constexpr int PARTS = 4, PART = KEY_TILE + VALUE_TILE, RING = PARTS * PART;
// Sixteen rows of ones, which stand beside the values of any 16 keys.
constexpr int ONES_BYTES = 16 * VALUE_ROW;
// Threads that share tiles.
constexpr int THREADS = 128 * WARPGROUPS;
constexpr int STEPS = BYTES / 32;

// Of rows of a tile. Its low word has an address and, 16 bits above, the distance between halves of a row, both in units of
// 16 bytes and below 2^14, so that sums of low words are what is meant and few instructions stand between products.
__device__ inline u64 descriptor(u32 low, int row) {
    u32 swizzle = row == 128 ? 1 : row == 64 ? 2 : 3;
    return (u64)(swizzle << 30 | 8 * row >> 4) << 32 | low;
}

// Where 16 bytes of row r from byte k of a tile lie, with `row` bytes from row to row.
__device__ inline u32 place(u32 r, u32 k, u32 row) {
    u32 at = r * row + k % row;
    return k / row * (TILE * row) + (at ^ ((at >> 7 & (row / 16 - 1)) << 4));
}

__device__ inline void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ inline void wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

#define EIGHT(c, x, n) c(x[n][0]), c(x[n][1]), c(x[n][2]), c(x[n][3]), c(x[n + 1][0]), c(x[n + 1][1]), c(x[n + 1][2]), c(x[n + 1][3])
#define ADDED(v) "+f"(v)
#define COUNTED(v) "+r"(v)
#define FOUR(c, x, n) c(x[n][0]), c(x[n][1]), c(x[n][2]), c(x[n][3])
#define R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

// Scores of 64 keys, += or =.
__device__ inline void score(float (*s)[4], const u32 *a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" R32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;}"
                 : EIGHT(ADDED, s, 0), EIGHT(ADDED, s, 2), EIGHT(ADDED, s, 4), EIGHT(ADDED, s, 6)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

__device__ inline void score(int (*s)[4], const u32 *a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" R32 "}, {%32,%33,%34,%35}, %36, p;}"
                 : EIGHT(COUNTED, s, 0), EIGHT(COUNTED, s, 2), EIGHT(COUNTED, s, 4), EIGHT(COUNTED, s, 6)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// Outputs += weights of 16 keys times their values; behind the outputs sums of weights, with ONES_COLUMN, by eight more columns.
__device__ inline void apply(float (*o)[4], const u32 *a, u64 b) {
    if constexpr (D == 32 && ONES_COLUMN)
        asm volatile("wgmma.mma_async.sync.aligned.m64n40k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,"
                     "%17,%18,%19}, {%20,%21,%22,%23}, %24, 1, 1, 1, 1;"
                     : EIGHT(ADDED, o, 0), EIGHT(ADDED, o, 2), FOUR(ADDED, o, 4)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else if constexpr (D == 32)
        asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
                     "{%16,%17,%18,%19}, %20, 1, 1, 1, 1;"
                     : EIGHT(ADDED, o, 0), EIGHT(ADDED, o, 2)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else if constexpr (D == 64 && ONES_COLUMN)
        asm volatile("wgmma.mma_async.sync.aligned.m64n72k16.f32.f16.f16 {" R32 ",%32,%33,%34,%35}, {%36,%37,%38,%39}, %40, 1, 1, 1, 1;"
                     : EIGHT(ADDED, o, 0), EIGHT(ADDED, o, 2), EIGHT(ADDED, o, 4), EIGHT(ADDED, o, 6), FOUR(ADDED, o, 8)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else if constexpr (D == 64)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" R32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                     : EIGHT(ADDED, o, 0), EIGHT(ADDED, o, 2), EIGHT(ADDED, o, 4), EIGHT(ADDED, o, 6)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" R32
                     ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"
                     "%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                     : EIGHT(ADDED, o, 0), EIGHT(ADDED, o, 2), EIGHT(ADDED, o, 4), EIGHT(ADDED, o, 6), EIGHT(ADDED, o, 8),
                       EIGHT(ADDED, o, 10), EIGHT(ADDED, o, 12), EIGHT(ADDED, o, 14)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Sums += weights of 16 keys: where the ones cannot stand as far from the first half of the values as the second does.
__device__ inline void add_up(float *o, const u32 *a, u64 ones) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
                 : "+f"(o[0]), "+f"(o[1]), "+f"(o[2]), "+f"(o[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(ones));
}

// What this thread wrote, and halves that it copied but for the last LEFT groups, are there for wgmma too, once a barrier says so.
template <int LEFT> __device__ inline void written() {
    if constexpr (!CODES_IN) asm volatile("cp.async.wait_group %0;" ::"n"(LEFT));
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// All threads that share tiles come here.
__device__ inline void meet() {
    if constexpr (SPLIT == 1) __syncthreads();
    else asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.x / THREADS), "n"(THREADS) : "memory");
}

// Of two warpgroups each says when it is here, and later waits for the other, which may be ahead. Each waits at a barrier of
// its own, and next time at another, so that who is ahead arrives at none twice.
struct Meeting {
    u32 own = 4 + threadIdx.x / 128;
    __device__ void arrive() const {
        if constexpr (WARPGROUPS == 2) asm volatile("bar.arrive %0, 256;" ::"r"(own ^ 1) : "memory");
    }
    __device__ void wait() {
        if constexpr (WARPGROUPS == 2) asm volatile("bar.sync %0, 256;" ::"r"(own) : "memory");
        else meet();
        own ^= 2;
    }
};

// The threads that share tiles are counted from 0; written so that the compiler sees that all of a block may be these.
__device__ inline u32 thread() { return SPLIT == 1 ? threadIdx.x : threadIdx.x % THREADS; }

// What a thread has of a tile: 16 bytes of so many rows of keys, and of values if these are halves; of values that are codes
// as much as of keys.
constexpr int CHUNKS = KEY_TILE / 16, OWN = (CHUNKS + THREADS - 1) / THREADS;

struct Copies {
    // Row in the tile; where its keys begin in the matrix; their place in the tile, and that of values that were codes, whose
    // 16 bytes become 32.
    int row[OWN];
    const char *from[OWN];
    u32 to[OWN], value_to[OWN][2];
    __device__ Copies(const char *matrix, u32 stride) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            u32 c = thread() + i * THREADS, k = c % (BYTES / 16) * 16;
            row[i] = c / (BYTES / 16);
            from[i] = matrix + k + (CODES_IN ? 0 : row[i] * stride);
            to[i] = place(column_of(row[i]), k, ROW);
#pragma unroll
            for (int w = 0; w < 2; w++) value_to[i][w] = place(column_of(row[i]), 2 * k + 16 * w, VALUE_ROW);
            // Not to be computed anew for each tile.
            asm volatile("" : "+l"(from[i]), "+r"(to[i]));
            if constexpr (CODES_IN) asm volatile("" : "+r"(value_to[i][0]), "+r"(value_to[i][1]));
        }
    }
    // Whether it is one of fewer than there are threads.
    __device__ bool none(int i) const { return CHUNKS % THREADS && row[i] >= TILE; }
    // Starts copying to a tile rows `first` .. `first` + 64, `beyond` bytes behind the keys; rows from `limit` on become 0.
    __device__ void start(u32 tile, u32 beyond, u32 stride, int first, int limit) const {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (none(i)) break;
            int bytes = row[i] < limit - first ? 16 : 0;
            const char *from = this->from[i] + (u64)(u32)first * stride + beyond;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tile + to[i]), "l"(from), "r"(bytes));
        }
    }
    // Codes of such rows.
    __device__ void load(uint4 *codes, u32 beyond, u32 stride, int first, int limit) const {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            // Behind the last row that one again, with weights of 0: a choice here would wait for what is loaded.
            const char *from = this->from[i] + (u64)(u32)min(first + row[i], limit - 1) * stride + beyond;
            asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(codes[i].x), "=r"(codes[i].y), "=r"(codes[i].z), "=r"(codes[i].w)
                         : "l"(from));
        }
    }
    __device__ static void put(u32 at, u32 a, u32 b, u32 c, u32 d) {
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d));
    }
    __device__ void put_keys(u32 tile, const uint4 *codes) const {
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (!none(i)) put(tile + to[i], codes[i].x, codes[i].y, codes[i].z, codes[i].w);
    }
    // As halves.
    __device__ void put_values(u32 tile, const uint4 *codes) const {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (none(i)) continue;
            uint2 a = halves_of_codes(codes[i].x), b = halves_of_codes(codes[i].y);
            uint2 c = halves_of_codes(codes[i].z), d = halves_of_codes(codes[i].w);
            put(tile + value_to[i][0], a.x, a.y, b.x, b.y);
            put(tile + value_to[i][1], c.x, c.y, d.x, d.y);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS * SPLIT, D == 128 || SPLIT > 1 ? 1 : 4 / WARPGROUPS)
    forward(void *out, const void *qkv, const Tile *tiles, int heads, float unit, float value, float step) {
    extern __shared__ char memory[];
    __shared__ float2 bases[SPLIT > 1 ? 64 * WARPGROUPS : 1];
    let_next_start();
    after_previous();
    Problem p{out, qkv, tiles, heads, unit, value, step};
    Tile own = tiles[blockIdx.x];
    if (own.query >= own.length) return;
    int lane = threadIdx.x % 32, h = blockIdx.y, length = own.length;
    int row = own.query + thread() / 32 * 16, share = SPLIT == 1 ? 0 : threadIdx.x / THREADS;
    constexpr int SIZE = CODES_IN ? 1 : 2;
    u32 stride = 3 * heads * D * SIZE;
    const char *q = (const char *)qkv + (u64)(u32)own.first * stride + h * D * SIZE;
    const char *k = q + heads * D * SIZE, *v = k + heads * D * SIZE;
    // Swizzling counts from a multiple of 1,024.
    u32 front = (shared_address(memory) + 1023) & ~1023u, base = front + share * RING, ones = front + SPLIT * RING;
    if (ONES_COLUMN && threadIdx.x < ONES_BYTES / 16)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(ones + 16 * threadIdx.x), "r"(0x3C003C00));
    auto keys = [&](int t) { return base + (u32)t % PARTS * PART; };
    auto values = [&](int t) { return keys(t) + KEY_TILE; };
    // This group's tiles, of those there are, and the first key of each.
    int all = (length + TILE - 1) / TILE, count = (all - share + SPLIT - 1) / SPLIT;
    auto key = [&](int t) { return (t * SPLIT + share) * TILE; };
    const Copies copies(k, stride);
    u32 apart = (u32)(v - k);
    auto start = [&](int t) {
        if (t < count) {
            copies.start(keys(t), 0, stride, key(t), length);
            copies.start(values(t), apart, stride, key(t), length);
        }
        asm volatile("cp.async.commit_group;");
    };
    // Of codes, the keys of a tile and the values of the one before.
    uint4 next_keys[OWN], next_values[OWN];
    auto load = [&](int t) {
        copies.load(next_keys, 0, stride, key(t), length);
        copies.load(next_values, apart, stride, key(t - 1), length);
    };
    auto put = [&](int t) {
        copies.put_keys(keys(t), next_keys);
        copies.put_values(values(t - 1), next_values);
    };
    uint4 first_keys[OWN];
    if constexpr (CODES_IN) {
        copies.load(first_keys, 0, stride, key(0), length);
        load(1);
    } else
        for (int t = 0; t < 3; t++) start(t);
    // The left operand of a product, straight from memory: rows g and g + 8, four bytes at 4 j and 16 later.
    u32 a[STEPS][4];
#pragma unroll
    for (int i = 0; i < STEPS; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int r = row + lane / 4 + c % 2 * 8;
            a[i][c] = r < length ? *(const u32 *)(q + (u64)(u32)r * stride + i * 32 + c / 2 * 16 + lane % 4 * 4) : 0;
        }
    Sum sums[TILE / 8][4];
    float o[BLOCKS][4] = {};
    Softmax m;
    // Low words of descriptors. The ones stay where they are while the values of a product move on.
    constexpr bool BESIDE = ONES_COLUMN && D != 128;
    constexpr u32 MOVE = BESIDE ? 1 - (1 << 16) : 1;
    u32 key_words = (front >> 4) + share * (RING / 16);
    u32 value_words = key_words + KEY_TILE / 16 + ((BESIDE ? (SPLIT - share) * RING - KEY_TILE : TILE * VALUE_ROW) / 16 << 16);
    auto scores = [&](int t) {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            score(sums, a[i], descriptor(key_words + (u32)t % PARTS * (PART / 16) + i * 32 / ROW * (TILE * ROW / 16) + i * 32 % ROW / 16, ROW), i > 0);
    };
    if constexpr (CODES_IN) copies.put_keys(keys(0), first_keys);
    written<2>();
    meet();
    fence();
    scores(0);
    commit();
    // While products are made. What is loaded before the fence, that waits for.
    auto prepare = [&](int t) {
        if constexpr (CODES_IN) put(t);
        written<1>();
        if constexpr (CODES_IN) load(t + 1);
    };
    prepare(1);
    wait<0>();
    // What was put is there, and what was read can be written to.
    Meeting meeting;
    meeting.arrive();
    // Scores become the left operand of the product with values.
    u32 w[TILE / 16][4];
    auto soften = [&](bool first, bool last) {
        float(*s)[4] = (float(*)[4])sums;
        if constexpr (CODES_IN)
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    s[n][c] = score_of(sums[n][c]);
        if (last && length - key(count - 1) < TILE) close(s, length - key(count - 1));
        // Bases are those of the sequence's first tile, however tiles are shared out.
        float2 *own = bases + thread() / 32 * 16 + lane / 4;
        if (SPLIT > 1 && first && share) {
            __syncthreads();
#pragma unroll
            for (int r = 0; r < 2; r++) m.base[r] = own[8 * r].x, m.huge[r] = own[8 * r].y != 0.0f;
            m.measure(unit);
        }
        float shrink[2];
        if (weigh(s, m, unit, w, first && !share, shrink)) rescale(o, shrink);
        if (SPLIT > 1 && first && !share) {
            if (lane % 4 == 0)
#pragma unroll
                for (int r = 0; r < 2; r++) own[8 * r] = make_float2(m.base[r], m.huge[r]);
            __syncthreads();
        }
    };
    auto outputs = [&](int t) {
#pragma unroll
        for (int i = 0; i < TILE / 16; i++) {
            apply(o, w[i], descriptor(value_words + (u32)t % PARTS * (PART / 16 * MOVE) + i * VALUE_ROW * MOVE, VALUE_ROW));
            if (ONES_COLUMN && D == 128) add_up(o[BLOCKS - 1], w[i], ones >> 4);
        }
    };
    for (int t = 0; t < count - 1; t++) {
        soften(t == 0, false);
        meeting.wait();
        // Into the part that was read last turn.
        if constexpr (!CODES_IN) start(t + 3);
        fence();
        outputs(t);
        scores(t + 1);
        commit();
        prepare(t + 2);
        wait<0>();
        meeting.arrive();
    }
    if (SPLIT == 1 || count > 0) {
        soften(count == 1, true);
        meeting.wait();
        fence();
        outputs(count - 1);
        commit();
        wait<0>();
    } else __syncthreads();
    if constexpr (SPLIT > 1) {
        // Where the group's tiles were.
        auto mine = [&](int part) { return (float *)(memory + (base - shared_address(memory)) + part * RING) + thread(); };
        if (share) {
            // The others may still read them.
            meet();
            float *to = mine(0);
#pragma unroll
            for (int i = 0; i < 4 * BLOCKS; i++) to[i * THREADS] = o[i / 4][i % 4];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                to[(4 * BLOCKS + r) * THREADS] = m.base[r];
                to[(4 * BLOCKS + 2 + r) * THREADS] = m.sum[r];
                to[(4 * BLOCKS + 4 + r) * THREADS] = m.huge[r];
            }
        }
        __syncthreads();
        if (share) return;
#pragma unroll
        for (int part = 1; part < SPLIT; part++) {
            const float *from = mine(part);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float other = from[(4 * BLOCKS + r) * THREADS];
                bool huge = from[(4 * BLOCKS + 4 + r) * THREADS] != 0.0f;
                float higher = above(other, huge, m.base[r], m.huge[r], unit);
                float own = exp2_fast(fminf(-higher, 0.0f)), its = exp2_fast(fminf(higher, 0.0f));
                if (higher > 0.0f) m.base[r] = other, m.huge[r] = huge;
                m.sum[r] = m.sum[r] * own + from[(4 * BLOCKS + 2 + r) * THREADS] * its;
#pragma unroll
                for (int n = 0; n < BLOCKS; n++)
#pragma unroll
                    for (int c = 2 * r; c < 2 * r + 2; c++) o[n][c] = o[n][c] * own + from[(4 * n + c) * THREADS] * its;
            }
        }
    }
    finish(o, m, p, (long long)own.first * heads * D + h * D, row, length);
}
