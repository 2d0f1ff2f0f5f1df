// A warp for each row, four rows a block. WIDTH is the row's, NORM which one; rows of up to 1,024 stay in registers.

enum { NONE, LAYER, RMS };

constexpr int CHUNKS = WIDTH / 8, HELD = (CHUNKS + 31) / 32;

struct Normal {
    const float *gain, *bias;
    float eps;
};

struct Output {
    f16 *hidden;
    signed char *codes;
    float step;
};

// Where a row's numbers come from: eight from column c, or one.
struct Sum {
    const f16 *x, *residual;
    __device__ void read(float *v, int c) const {
        uint4 a = *(const uint4 *)(x + c), b = residual ? *(const uint4 *)(residual + c) : make_uint4(0, 0, 0, 0);
        const u32 xs[4] = {a.x, a.y, a.z, a.w}, rs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float2 x = floats_of_pair(xs[k]), r = floats_of_pair(rs[k]);
            v[2 * k] = x.x + r.x;
            v[2 * k + 1] = x.y + r.y;
        }
    }
    __device__ float one(int c) const { return (float)x[c] + (residual ? (float)residual[c] : 0.0f); }
};

struct Embedded {
    const f16 *tables[3];
    float scale;
    __device__ void read(float *v, int c) const {
#pragma unroll
        for (int t = 0; t < 3; t++) {
            if (!tables[t]) continue;
            uint4 a = *(const uint4 *)(tables[t] + c);
            const u32 xs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float2 x = floats_of_pair(xs[k]);
                v[2 * k] = t ? v[2 * k] + x.x : x.x * scale;
                v[2 * k + 1] = t ? v[2 * k + 1] + x.y : x.y * scale;
            }
        }
    }
    __device__ float one(int c) const {
        float v = (float)tables[0][c] * scale;
        for (int t = 1; t < 3; t++)
            if (tables[t]) v += (float)tables[t][c];
        return v;
    }
};

__device__ inline void write(const Output &out, const Step &step, const float *v, int c) {
    if (out.hidden)
        *(uint4 *)(out.hidden + c) =
            make_uint4(f16_pair(v[0], v[1]), f16_pair(v[2], v[3]), f16_pair(v[4], v[5]), f16_pair(v[6], v[7]));
    if (out.codes) {
        u32 word[2];
#pragma unroll
        for (int w = 0; w < 2; w++) {
            u32 a = step.code(v[4 * w]) & 0xFF, b = step.code(v[4 * w + 1]) & 0xFF, c = step.code(v[4 * w + 2]) & 0xFF,
                d = step.code(v[4 * w + 3]);
            word[w] = a | b << 8 | c << 16 | d << 24;
        }
        *(uint2 *)(out.codes + c) = make_uint2(word[0], word[1]);
    }
}

template <class From>
__device__ inline void held(const From &from, const Normal &norm, const Output &out, int lane) {
    float v[HELD][8], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int h = 0; h < HELD; h++) {
        int c = (h * 32 + lane) * 8;
        if (c < WIDTH) from.read(v[h], c);
    }
#pragma unroll
    for (int h = 0; h < HELD; h++)
        if ((h * 32 + lane) * 8 < WIDTH)
#pragma unroll
            for (int k = 0; k < 8; k++) sum += v[h][k];
    float mean = NORM == LAYER ? warp_sum(sum) * (1.0f / WIDTH) : 0.0f, r = 1.0f;
    if (NORM != NONE) {
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if ((h * 32 + lane) * 8 < WIDTH)
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    v[h][k] -= mean;
                    squares += v[h][k] * v[h][k];
                }
        r = 1.0f / sqrtf(warp_sum(squares) * (1.0f / WIDTH) + norm.eps);
    }
    Step step(out.codes ? out.step : 1.0f);
#pragma unroll
    for (int h = 0; h < HELD; h++) {
        int c = (h * 32 + lane) * 8;
        if (c >= WIDTH) continue;
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
            if (NORM == NONE) continue;
            float4 g = *(const float4 *)(norm.gain + c + k), b = make_float4(0, 0, 0, 0);
            if (norm.bias) b = *(const float4 *)(norm.bias + c + k);
            v[h][k] = v[h][k] * r * g.x + b.x;
            v[h][k + 1] = v[h][k + 1] * r * g.y + b.y;
            v[h][k + 2] = v[h][k + 2] * r * g.z + b.z;
            v[h][k + 3] = v[h][k + 3] * r * g.w + b.w;
        }
        write(out, step, v[h], c);
    }
}

// Rows of other widths are read for each pass.
template <class From>
__device__ inline void streamed(const From &from, const Normal &norm, const Output &out, int lane) {
    float sum = 0.0f, squares = 0.0f;
    if (NORM == LAYER)
        for (int c = lane; c < WIDTH; c += 32) sum += from.one(c);
    float mean = NORM == LAYER ? warp_sum(sum) * (1.0f / WIDTH) : 0.0f, r = 1.0f;
    if (NORM != NONE) {
        for (int c = lane; c < WIDTH; c += 32) {
            float v = from.one(c) - mean;
            squares += v * v;
        }
        r = 1.0f / sqrtf(warp_sum(squares) * (1.0f / WIDTH) + norm.eps);
    }
    Step step(out.codes ? out.step : 1.0f);
    for (int c = lane; c < WIDTH; c += 32) {
        float v = from.one(c);
        if (NORM != NONE) v = (v - mean) * r * norm.gain[c] + (norm.bias ? norm.bias[c] : 0.0f);
        if (out.hidden) out.hidden[c] = v;
        if (out.codes) out.codes[c] = (signed char)step.code(v);
    }
}

template <class From> __device__ inline void row(const From &from, const Normal &norm, Output out, long long at, int lane) {
    if (out.hidden) out.hidden += at;
    if (out.codes) out.codes += at;
    if constexpr (WIDTH % 8 == 0 && WIDTH <= 1024) held(from, norm, out, lane);
    else streamed(from, norm, out, lane);
}

// In place: `hidden` may be `x` or `residual`, of which a warp reads its row before it writes.
extern "C" __global__ void __launch_bounds__(128)
    add_norm(f16 *hidden, signed char *codes, const f16 *x, const f16 *residual, const float *gain, const float *bias,
             float eps, float step, int rows) {
    after_previous();
    int r = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    long long at = (long long)r * WIDTH;
    if (r < rows) row(Sum{x + at, residual ? residual + at : nullptr}, {gain, bias, eps}, {hidden, codes, step}, at, lane);
    let_next_start();
}

// An id that no table has an entry for takes the last: rows beyond a batch may have any.
extern "C" __global__ void __launch_bounds__(128)
    embed_norm(f16 *hidden, signed char *codes, const f16 *words, const f16 *positions, const f16 *types,
               const int *word_ids, const int *position_ids, const int *type_ids, int word_entries, int position_entries,
               int type_entries, float scale, const float *gain, const float *bias, float eps, float step, int rows) {
    after_previous();
    int r = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r < rows) {
        auto entry = [&](const f16 *table, const int *ids, int entries) {
            return table ? table + (long long)min((u32)ids[r], (u32)entries - 1) * WIDTH : nullptr;
        };
        Embedded from{{entry(words, word_ids, word_entries), entry(positions, position_ids, position_entries),
                       entry(types, type_ids, type_entries)},
                      scale};
        row(from, {gain, bias, eps}, {hidden, codes, step}, (long long)r * WIDTH, lane);
    }
    let_next_start();
}
