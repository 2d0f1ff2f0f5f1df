// What Hopper's kernels are made of: the product of 64 features with BN tokens.
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

__device__ inline u32 shared_address(const void *p) {
    u32 a;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(a) : "l"(p));
    return a;
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
