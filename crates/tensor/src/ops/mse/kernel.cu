// A warp for each row, eight rows a block. `counts` is null if every row counts.

// Runs f(first column, columns) over a row: by packs where rows begin at pack boundaries.
template <class F> __device__ inline void columns(int lane, long long width, F f) {
    if (width % PACK == 0)
        for (long long c = lane * PACK; c < width; c += 32 * PACK) f(c, PACK);
    else
        for (long long c = lane; c < width; c += 32) f(c, 1);
}

// The sum of squares of each row; 0 for a row that does not count.
extern "C" __global__ void row_sums(float *out, const T *x, const T *target, const u8 *counts, long long rows,
                                    long long width) {
    OWN_ROW;
    if (row >= rows) return;
    float sum = 0.0f;
    if (!counts || counts[row])
        columns(lane, width, [&](long long c, int count) {
            const T *a = x + row * width + c, *b = target + row * width + c;
            if (count == 1) {
                float d = (float)*a - (float)*b;
                sum += d * d;
                return;
            }
            Pack p = *(const Pack *)a, q = *(const Pack *)b;
            for (int k = 0; k < PACK; k++) {
                float d = (float)p.v[k] - (float)q.v[k];
                sum += d * d;
            }
        });
    sum = warp_sum(sum);
    if (lane == 0) out[row] = sum;
}

// The slope with respect to x; the loss was the mean of n squares.
extern "C" __global__ void backward(T *dx, const float *grad, const T *x, const T *target, const u8 *counts, float n,
                                    long long rows, long long width) {
    OWN_ROW;
    if (row >= rows) return;
    float f = counts && !counts[row] ? 0.0f : 2.0f * *grad / n;
    columns(lane, width, [&](long long c, int count) {
        long long at = row * width + c;
        if (count == 1) {
            dx[at] = f * ((float)x[at] - (float)target[at]);
            return;
        }
        Pack p = *(const Pack *)(x + at), q = *(const Pack *)(target + at);
        for (int k = 0; k < PACK; k++) p.v[k] = f * ((float)p.v[k] - (float)q.v[k]);
        *(Pack *)(dx + at) = p;
    });
}
