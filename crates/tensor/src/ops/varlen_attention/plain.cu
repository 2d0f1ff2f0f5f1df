// Any head width up to 1,024 and any pattern: a block walks over 64 queries of one head, 256 keys at a time. CODES_IN and
// CODES_OUT are whether queries, keys and values, and the output, are codes.

constexpr int KEYS = 256, COLUMNS = 8;

// As in common.cuh.
using rounding::TILE, rounding::ONES, rounding::LARGEST;
constexpr float GRID = CODES_IN ? rounding::GRID : 0.0f, SCALE = CODES_IN ? rounding::SCALE : 0.0f;
constexpr float ROOM = CODES_IN ? rounding::ROOM : 0.0f;

extern "C" __global__ void __launch_bounds__(128)
    forward(void *out, const void *qkv, const int4 *tiles, int heads, float unit, float value, float step, int width,
            int keep, int of) {
    __shared__ float scores[KEYS], weights[KEYS];
    let_next_start();
    after_previous();
    int4 tile = tiles[blockIdx.x];
    int first_row = tile.x, length = tile.y, h = blockIdx.y, hidden = heads * width;
    auto get = [&](int row, int part, int c) {
        long long i = (long long)(first_row + row) * 3 * hidden + part * hidden + h * width + c;
        return CODES_IN ? (float)((const signed char *)qkv)[i] : (float)((const f16 *)qkv)[i];
    };
    for (int query = tile.z; query < min(tile.z + 64, length); query++) {
        float base = 0.0f, sum = 0.0f, y[COLUMNS] = {};
        bool huge = false;
        for (int begin = 0; begin < length; begin += KEYS) {
            int count = min(KEYS, length - begin);
            for (int k = threadIdx.x; k < count; k += blockDim.x) {
                float dot = 0.0f;
                for (int c = 0; c < width; c++) dot += get(query, 0, c) * get(begin + k, 1, c);
                scores[k] = dot;
            }
            for (int t = 0; t < count; t += TILE) {
                int end = min(t + TILE, count);
                __syncthreads();
                float top = -__int_as_float(0x7F800000);
                for (int k = t + threadIdx.x; k < end; k += blockDim.x) top = fmaxf(top, scores[k]);
                top = block_max(top);
                float bits = top * unit;
                if (begin + t == 0 || (huge ? top > base : bits >= base + ROOM)) {
                    bool large = fabsf(bits) >= LARGEST;
                    float next = large ? top : ceilf(bits);
                    float fall = huge && large ? (base - next) * unit : (huge ? base * unit : base) - (large ? bits : next);
                    float shrink = begin + t == 0 ? 0.0f : exp2f(fall);
                    base = next;
                    huge = large;
                    sum *= shrink;
                    for (int i = 0; i < COLUMNS; i++) y[i] *= shrink;
                }
                float part = 0.0f;
                for (int k = t + threadIdx.x; k < end; k += blockDim.x) {
                    int rank = 0, group = of ? k / of * of : k;
                    for (int i = group; i < min(group + of, count); i++)
                        rank += i < k ? scores[i] >= scores[k] : scores[i] > scores[k];
                    float bits = huge ? __fadd_rn(__fmul_rn(scores[k] - base, unit), GRID)
                                      : __fmaf_rn(scores[k], unit, GRID - base);
                    float p = exp2f(bits - (GRID + SCALE));
                    part += !CODES_IN ? p : of ? p + ONES - ONES : (float)f16(p);
                    weights[k] = !of || rank < keep ? (float)f16(p) : 0.0f;
                }
                sum += block_sum(part);
                __syncthreads();
                for (int i = 0; i < COLUMNS; i++) {
                    int c = threadIdx.x + i * blockDim.x;
                    if (c < width)
                        for (int k = t; k < end; k++) y[i] += weights[k] * get(begin + k, 2, c);
                }
            }
            __syncthreads();
        }
        for (int i = 0; i < COLUMNS; i++) {
            int c = threadIdx.x + i * blockDim.x;
            if (c >= width) continue;
            long long at = (long long)(first_row + query) * hidden + h * width + c;
            float v = y[i] * (value / sum);
            if (CODES_OUT) ((signed char *)out)[at] = (signed char)Step(step).code(v);
            else ((f16 *)out)[at] = v;
        }
    }
}
