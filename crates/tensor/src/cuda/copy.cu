// Between host memory that the GPU reaches itself and its own, in 16 bytes at a time. Both begin at multiples of 16.
extern "C" __global__ void copy(u8 *to, const u8 *from, long long bytes) {
    let_next_start();
    after_previous();
    EACH(i, (bytes + 15) / 16) {
        long long at = i * 16;
        if (at + 16 <= bytes) *(uint4 *)(to + at) = *(const uint4 *)(from + at);
        else
            for (; at < bytes; at++) to[at] = from[at];
    }
}
