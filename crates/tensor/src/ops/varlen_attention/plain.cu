// Any head width up to 1,024 and any pattern: a block walks over 64 queries of one head, 256 keys at a time, twice: for the
// softmax's sum, and for the values. CODES_IN and CODES_OUT are whether queries, keys and values, and the output, are codes.

constexpr int KEYS = 256, COLUMNS = 8;

extern "C" __global__ void __launch_bounds__(128)
    forward(void *out, const void *qkv, const int4 *tiles, int heads, float unit, float value, float step, int width,
            int keep, int of) {
    __shared__ float scores[KEYS], weights[KEYS];
    let_next_start();
    after_previous();
    int4 tile = tiles[blockIdx.x];
    int first = tile.x, length = tile.y, h = blockIdx.y, hidden = heads * width;
    auto get = [&](int row, int part, int c) {
        long long i = (long long)(first + row) * 3 * hidden + part * hidden + h * width + c;
        return CODES_IN ? (float)((const signed char *)qkv)[i] : (float)((const f16 *)qkv)[i];
    };
    for (int query = tile.z; query < min(tile.z + 64, length); query++) {
        float most = -__int_as_float(0x7F800000), sum = 0.0f, y[COLUMNS] = {};
        for (int pass = 0; pass < 2; pass++)
            for (int begin = 0; begin < length; begin += KEYS) {
                int count = min(KEYS, length - begin);
                float highest = most;
                for (int k = threadIdx.x; k < count; k += blockDim.x) {
                    float dot = 0.0f;
                    for (int c = 0; c < width; c++) dot += get(query, 0, c) * get(begin + k, 1, c);
                    scores[k] = dot;
                    highest = fmaxf(highest, dot);
                }
                if (pass == 0) {
                    highest = block_max(highest);
                    float part = 0.0f;
                    for (int k = threadIdx.x; k < count; k += blockDim.x) part += exp2f((scores[k] - highest) * unit);
                    sum = sum * (begin ? exp2f((most - highest) * unit) : 0.0f) + block_sum(part);
                    most = highest;
                } else {
                    __syncthreads();
                    for (int k = threadIdx.x; k < count; k += blockDim.x) {
                        int rank = 0, group = of ? k / of * of : k;
                        for (int i = group; i < min(group + of, count); i++)
                            rank += i < k ? scores[i] >= scores[k] : scores[i] > scores[k];
                        weights[k] = !of || rank < keep ? exp2f((scores[k] - most) * unit) : 0.0f;
                    }
                    __syncthreads();
                    for (int i = 0; i < COLUMNS; i++) {
                        int c = threadIdx.x + i * blockDim.x;
                        if (c < width)
                            for (int k = 0; k < count; k++) y[i] += weights[k] * get(begin + k, 2, c);
                    }
                }
                __syncthreads();
            }
        for (int i = 0; i < COLUMNS; i++) {
            int c = threadIdx.x + i * blockDim.x;
            if (c >= width) continue;
            long long at = (long long)(first + query) * hidden + h * width + c;
            float v = y[i] * value / sum;
            if (CODES_OUT) ((signed char *)out)[at] = (signed char)Step(step).code(v);
            else ((f16 *)out)[at] = v;
        }
    }
}
