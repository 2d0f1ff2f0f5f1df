// FUNCTION of f16 numbers, in place; n is a multiple of 8.
extern "C" __global__ void __launch_bounds__(256) activate(f16 *y, long long n) {
    after_previous();
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < n; i += (long long)gridDim.x * blockDim.x * 8) {
        struct alignas(16) Eight {
            f16 v[8];
        } e = *(const Eight *)(y + i);
#pragma unroll
        for (int k = 0; k < 8; k++) e.v[k] = Numbered<FUNCTION>::value((float)e.v[k]);
        *(Eight *)(y + i) = e;
    }
    let_next_start();
}
