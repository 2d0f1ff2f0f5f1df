// Column sums of x into parts [parts, width], or with y of x and of x * y into [parts, 2, width].
template <int COUNT>
__device__ inline void sums(float *parts, const T *x, const T *y, long long rows, long long width, long long per_part) {
    if (!y)
        return strip<COUNT, 1>(parts, rows, width, per_part, [&](long long r, long long c, float (*sum)[COUNT]) {
            Some<COUNT> a = some<COUNT>(x + r * width + c);
            for (int k = 0; k < COUNT; k++) sum[0][k] += (float)a.v[k];
        });
    strip<COUNT, 2>(parts, rows, width, per_part, [&](long long r, long long c, float (*sum)[COUNT]) {
        Some<COUNT> a = some<COUNT>(x + r * width + c), b = some<COUNT>(y + r * width + c);
        for (int k = 0; k < COUNT; k++) {
            sum[0][k] += (float)a.v[k];
            sum[1][k] += (float)a.v[k] * (float)b.v[k];
        }
    });
}

// By packs where rows allow it.
extern "C" __global__ void column_sums_pack(float *parts, const T *x, const T *y, long long rows, long long width,
                                            long long per_part) {
    sums<PACK>(parts, x, y, rows, width, per_part);
}

extern "C" __global__ void column_sums_1(float *parts, const T *x, const T *y, long long rows, long long width,
                                         long long per_part) {
    sums<1>(parts, x, y, rows, width, per_part);
}
