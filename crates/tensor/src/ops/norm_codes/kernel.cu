// A warp for a row (row.cuh), four warps a block, which go on to other rows. CODED says whether what is added to the residual
// are codes, BLOCKS how many run on a multiprocessor; rows of up to 1,024 stay in registers.

using Summand = Kind<CODED>;

// Where a row's numbers come from: eight from column c, or one. What is fetched is kept as it comes until it is needed, so
// that the next row is under way while this one is worked on.
struct Sum {
    const Summand::One *x;
    const f16 *residual;
    float step;
    struct Raw {
        Summand::Eight x;
        uint4 residual;
    };
    __device__ void fetch(Raw &raw, int c) const {
        raw.x = *(const Summand::Eight *)(x + c);
        raw.residual = residual ? *(const uint4 *)(residual + c) : make_uint4(0, 0, 0, 0);
    }
    __device__ float value(int c) const {
        if constexpr (!CODED) return (float)x[c];
        f16 half;
        half = __fmul_rn((float)x[c], step);
        return (float)half;
    }
    __device__ void sum(float *v, const Raw &raw) const {
        u32 xs[4];
        halves_of(xs, raw.x, step);
        add(v, xs, raw.residual);
    }
    __device__ float one(int c) const { return value(c) + (residual ? (float)residual[c] : 0.0f); }
};

struct Embedded {
    const f16 *tables[3];
    float scale;
    struct Raw {
        uint4 of[3];
    };
    __device__ void fetch(Raw &raw, int c) const {
#pragma unroll
        for (int t = 0; t < 3; t++) raw.of[t] = tables[t] ? *(const uint4 *)(tables[t] + c) : make_uint4(0, 0, 0, 0);
    }
    __device__ void sum(float *v, const Raw &raw) const {
#pragma unroll
        for (int t = 0; t < 3; t++) {
            const u32 xs[4] = {raw.of[t].x, raw.of[t].y, raw.of[t].z, raw.of[t].w};
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float2 x = floats_of_pair(xs[k]);
                v[2 * k] = t ? v[2 * k] + x.x : __fmul_rn(x.x, scale);
                v[2 * k + 1] = t ? v[2 * k + 1] + x.y : __fmul_rn(x.y, scale);
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

// A warp's rows, one after the other: `from` says where a row comes from.
template <class From, class Of>
__device__ inline void held(Of from, const Normal &norm, const Output &out, int rows) {
    float gain[HELD][8], bias[HELD][8];
    fetch_norm(gain, bias, norm);
    Step step(out.codes ? out.step : 1.0f);
    // Gain, bias and step are nobody's to write.
    after_previous();
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, next = gridDim.x * (blockDim.x / 32);
    typename From::Raw raw[HELD];
    if (row < rows) {
        From f = from(row);
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if (in(h)) f.fetch(raw[h], column(h));
    }
    for (; row < rows; row += next) {
        float v[HELD][8];
        From f = from(min(row + next, rows - 1));
#pragma unroll
        for (int h = 0; h < HELD; h++) {
            if (!in(h)) continue;
            f.sum(v[h], raw[h]);
            if (row + next < rows) f.fetch(raw[h], column(h));
        }
        normalise_row(v, gain, bias, norm.eps);
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if (in(h)) write(out, step, v[h], (long long)row * WIDTH + column(h));
    }
}

// Rows of other widths are read for each pass.
template <class From, class Of>
__device__ inline void streamed(Of from_row, const Normal &norm, const Output &out, int rows) {
    after_previous();
    int lane = threadIdx.x % 32;
    Step step(out.codes ? out.step : 1.0f);
    for (int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; row < rows; row += gridDim.x * (blockDim.x / 32)) {
        From from = from_row(row);
        float sum = 0.0f, squares = 0.0f;
        if (NORM == LAYER)
            for (int c = lane; c < WIDTH; c += 32) sum += from.one(c);
        float mean = NORM == LAYER ? warp_sum(sum) * (1.0f / WIDTH) : 0.0f, r = 1.0f;
        if (NORM != PLAIN) {
            for (int c = lane; c < WIDTH; c += 32) {
                float v = from.one(c) - mean;
                squares += v * v;
            }
            r = 1.0f / sqrtf(warp_sum(squares) * (1.0f / WIDTH) + norm.eps);
        }
        for (int c = lane; c < WIDTH; c += 32) {
            float v = from.one(c);
            if (NORM != PLAIN) v = (v - mean) * r * norm.gain[c] + (NORM == LAYER ? norm.bias[c] : 0.0f);
            if (out.hidden) out.hidden[(long long)row * WIDTH + c] = v;
            if (out.codes) out.codes[(long long)row * WIDTH + c] = (signed char)step.code(v);
        }
    }
}

template <class From, class Of>
__device__ inline void normalise(Of from, const Normal &norm, const Output &out, int rows) {
    let_next_start();
    if constexpr (WIDTH % 8 == 0 && WIDTH <= 1024) held<From>(from, norm, out, rows);
    else streamed<From>(from, norm, out, rows);
}

// In place: `hidden` may be `x` or `residual`, of which a warp reads its row before it writes, and no other row.
extern "C" __global__ void __launch_bounds__(128, BLOCKS)
    add_norm(f16 *hidden, signed char *codes, const Summand::One *x, float x_step, const f16 *residual, const float *gain,
             const float *bias, float eps, float step, int rows) {
    auto from = [&](int row) {
        long long at = (long long)row * WIDTH;
        return Sum{x + at, residual ? residual + at : nullptr, x_step};
    };
    normalise<Sum>(from, {gain, bias, eps}, {hidden, codes, step}, rows);
}

// An id that no table has an entry for takes the last: rows beyond a batch may have any.
extern "C" __global__ void __launch_bounds__(128, BLOCKS)
    embed_norm(f16 *hidden, signed char *codes, const f16 *words, const f16 *positions, const f16 *types,
               const int *word_ids, const int *position_ids, const int *type_ids, int word_entries, int position_entries,
               int type_entries, float scale, const float *gain, const float *bias, float eps, float step, int rows) {
    auto entry = [&](int row, const f16 *table, const int *ids, int entries) {
        return table ? table + (long long)min((u32)ids[row], (u32)entries - 1) * WIDTH : nullptr;
    };
    auto from = [&](int row) {
        return Embedded{{entry(row, words, word_ids, word_entries), entry(row, positions, position_ids, position_entries),
                         entry(row, types, type_ids, type_entries)},
                        scale};
    };
    normalise<Embedded>(from, {gain, bias, eps}, {hidden, codes, step}, rows);
}
