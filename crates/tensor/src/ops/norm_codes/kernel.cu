// A warp for a row, four warps a block, which go on to other rows. WIDTH is the row's, NORM which one, CODED whether what is
// added to the residual are codes, BLOCKS how many run on a multiprocessor; rows of up to 1,024 stay in registers.

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

template <bool> struct Kind {
    using One = f16;
    using Eight = uint4;
};
template <> struct Kind<true> {
    using One = signed char;
    using Eight = uint2;
};
using Summand = Kind<CODED>;

// Eight numbers as pairs of halves. A code becomes a float in the last bits of 2^23 + 128 + code.
__device__ inline void halves_of(u32 *to, const uint4 &of, float) { to[0] = of.x, to[1] = of.y, to[2] = of.z, to[3] = of.w; }
__device__ inline void halves_of(u32 *to, const uint2 &of, float step) {
    const u32 words[2] = {of.x ^ 0x80808080, of.y ^ 0x80808080};
    auto value = [&](int i) {
        u32 bits = __byte_perm(words[i / 4], 0x4B000000, 0x7540 + i % 4);
        return __fmul_rn(__fsub_rn(__uint_as_float(bits), 8388736.0f), step);
    };
#pragma unroll
    for (int k = 0; k < 4; k++) to[k] = f16_pair(value(2 * k), value(2 * k + 1));
}

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
        const u32 rs[4] = {raw.residual.x, raw.residual.y, raw.residual.z, raw.residual.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float2 x = floats_of_pair(xs[k]), r = floats_of_pair(rs[k]);
            v[2 * k] = x.x + r.x;
            v[2 * k + 1] = x.y + r.y;
        }
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

__device__ inline void write(const Output &out, const Step &step, const float *v, long long at) {
    if (out.hidden)
        *(uint4 *)(out.hidden + at) =
            make_uint4(f16_pair(v[0], v[1]), f16_pair(v[2], v[3]), f16_pair(v[4], v[5]), f16_pair(v[6], v[7]));
    if (out.codes) {
        u32 word[2];
#pragma unroll
        for (int w = 0; w < 2; w++) {
            u32 a = step.code(v[4 * w]) & 0xFF, b = step.code(v[4 * w + 1]) & 0xFF, c = step.code(v[4 * w + 2]) & 0xFF,
                d = step.code(v[4 * w + 3]);
            word[w] = a | b << 8 | c << 16 | d << 24;
        }
        *(uint2 *)(out.codes + at) = make_uint2(word[0], word[1]);
    }
}

// A lane's eight columns of chunk h begin here; whether there are any.
__device__ inline int column(int h) { return (h * 32 + (int)threadIdx.x % 32) * 8; }
__device__ inline bool in(int h) { return CHUNKS % 32 == 0 || column(h) < WIDTH; }

// The sum of a row of which a lane has `part` in its eight columns of all chunks: the order of layer_norm/cpu.rs.
__device__ inline float row_sum(const float *part) {
    return warp_sum(((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7])));
}

// Sums, products and roots are rounded one by one, in the CPU's order, so that codes are the CPU's.
// A warp's rows, one after the other: `from` says where a row comes from.
template <class From, class Of>
__device__ inline void held(Of from, const Normal &norm, const Output &out, int rows) {
    float gain[HELD][8], bias[HELD][8];
#pragma unroll
    for (int h = 0; h < HELD; h++)
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
            if (NORM == NONE || !in(h)) continue;
            *(float4 *)(gain[h] + k) = *(const float4 *)(norm.gain + column(h) + k);
            if (NORM == LAYER) *(float4 *)(bias[h] + k) = *(const float4 *)(norm.bias + column(h) + k);
        }
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
        float v[HELD][8], part[8] = {};
        From f = from(min(row + next, rows - 1));
#pragma unroll
        for (int h = 0; h < HELD; h++) {
            if (!in(h)) continue;
            f.sum(v[h], raw[h]);
            if (row + next < rows) f.fetch(raw[h], column(h));
        }
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if (in(h))
#pragma unroll
                for (int k = 0; k < 8; k++) part[k] += v[h][k];
        float mean = NORM == LAYER ? __fmul_rn(row_sum(part), 1.0f / WIDTH) : 0.0f, r = 1.0f;
        if (NORM != NONE) {
#pragma unroll
            for (int k = 0; k < 8; k++) part[k] = 0.0f;
#pragma unroll
            for (int h = 0; h < HELD; h++)
                if (in(h))
#pragma unroll
                    for (int k = 0; k < 8; k++) {
                        v[h][k] -= mean;
                        part[k] = __fadd_rn(part[k], __fmul_rn(v[h][k], v[h][k]));
                    }
            r = 1.0f / sqrtf(__fadd_rn(__fmul_rn(row_sum(part), 1.0f / WIDTH), norm.eps));
        }
#pragma unroll
        for (int h = 0; h < HELD; h++) {
            if (!in(h)) continue;
#pragma unroll
            for (int k = 0; k < 8; k++)
                if (NORM != NONE)
                    v[h][k] = __fadd_rn(__fmul_rn(__fmul_rn(v[h][k], r), gain[h][k]), NORM == LAYER ? bias[h][k] : 0.0f);
            write(out, step, v[h], (long long)row * WIDTH + column(h));
        }
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
        if (NORM != NONE) {
            for (int c = lane; c < WIDTH; c += 32) {
                float v = from.one(c) - mean;
                squares += v * v;
            }
            r = 1.0f / sqrtf(warp_sum(squares) * (1.0f / WIDTH) + norm.eps);
        }
        for (int c = lane; c < WIDTH; c += 32) {
            float v = from.one(c);
            if (NORM != NONE) v = (v - mean) * r * norm.gain[c] + (NORM == LAYER ? norm.bias[c] : 0.0f);
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
