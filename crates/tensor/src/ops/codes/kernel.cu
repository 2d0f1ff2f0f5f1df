// FUNCTION is which activation comes first.

extern "C" __global__ void quantize(signed char *codes, const f16 *x, float s, long long n) {
    let_next_start();
    after_previous();
    Step step(s);
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < n; i += (long long)gridDim.x * blockDim.x * 8) {
        if (i + 8 > n) {
            for (long long k = i; k < n; k++) codes[k] = (signed char)step.code(Numbered<FUNCTION>::value(x[k]));
            continue;
        }
        uint4 a = *(const uint4 *)(x + i);
        const u32 pairs[4] = {a.x, a.y, a.z, a.w};
        u32 halves[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float2 v = floats_of_pair(pairs[k]);
            u32 low = step.code(Numbered<FUNCTION>::value(v.x)), high = step.code(Numbered<FUNCTION>::value(v.y));
            halves[k] = (low & 0xFF) | (high & 0xFF) << 8;
        }
        *(uint2 *)(codes + i) = make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
    }
}
