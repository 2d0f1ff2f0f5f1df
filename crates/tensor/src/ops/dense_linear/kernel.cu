// A warp for each output of four rows, so that a row of weights is read once for four of activations. FUNCTION is which
// activation follows; HALF whether the output is f16.

constexpr int ROWS = 4;

extern "C" __global__ void __launch_bounds__(128)
    forward(void *y, const f16 *x, const f16 *weight, const float *bias, int rows, int outputs, int width) {
    let_next_start();
    after_previous();
    int output = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x * ROWS;
    if (output >= outputs) return;
    const f16 *w = weight + (long long)output * width;
    float sum[ROWS] = {};
    if (width % 8 == 0) {
        for (int c = lane * 8; c < width; c += 256) {
            uint4 a = *(const uint4 *)(w + c);
            const u32 ws[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (row + r >= rows) continue;
                uint4 b = *(const uint4 *)(x + (long long)(row + r) * width + c);
                const u32 xs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    float2 v = floats_of_pair(xs[k]), u = floats_of_pair(ws[k]);
                    sum[r] += v.x * u.x;
                    sum[r] += v.y * u.y;
                }
            }
        }
    } else {
        for (int c = lane; c < width; c += 32)
            for (int r = 0; r < ROWS; r++)
                if (row + r < rows) sum[r] += (float)x[(long long)(row + r) * width + c] * (float)w[c];
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float v = warp_sum(sum[r]);
        if (row + r >= rows || lane) continue;
        v = Numbered<FUNCTION>::value(v + (bias ? bias[output] : 0.0f));
        long long at = (long long)(row + r) * outputs + output;
        if (HALF) ((f16 *)y)[at] = v;
        else ((float *)y)[at] = v;
    }
}
