// Barriers in shared memory and the copy engine (TMA), for Hopper's kernels; addresses are those of shared memory.

struct alignas(64) TensorMap {
    u64 opaque[16];
};

__device__ inline void barrier_init(u32 bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ inline void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done: }" ::"r"(bar), "r"(parity)
        : "memory");
}

__device__ inline void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// Starts copying a box of a matrix from this column and row on; what lies outside becomes 0. The barrier counts the bytes.
__device__ inline void fetch(u32 to, const TensorMap *matrix, int column, int row, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(matrix), "r"(column), "r"(row), "r"(bar)
        : "memory");
}
