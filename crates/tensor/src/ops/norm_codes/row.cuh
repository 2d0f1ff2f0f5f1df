// A row of WIDTH numbers in a warp, of which a lane has eight neighbouring ones of each chunk of 256; NORM says how it is
// normalised. For every kernel that ends in a norm.

enum { PLAIN, LAYER, RMS };

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

// Eight numbers and a residual's, as floats.
__device__ inline void add(float *v, const u32 (&xs)[4], const uint4 &residual) {
    const u32 rs[4] = {residual.x, residual.y, residual.z, residual.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float2 x = floats_of_pair(xs[k]), r = floats_of_pair(rs[k]);
        v[2 * k] = x.x + r.x;
        v[2 * k + 1] = x.y + r.y;
    }
}

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

// A lane's gain and bias.
__device__ inline void fetch_norm(float (&gain)[HELD][8], float (&bias)[HELD][8], const Normal &norm) {
#pragma unroll
    for (int h = 0; h < HELD; h++)
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
            if (NORM == PLAIN || !in(h)) continue;
            *(float4 *)(gain[h] + k) = *(const float4 *)(norm.gain + column(h) + k);
            if (NORM == LAYER) *(float4 *)(bias[h] + k) = *(const float4 *)(norm.bias + column(h) + k);
        }
}

// Sums, products and roots are rounded one by one, in the CPU's order, so that codes are the CPU's.
__device__ inline void normalise_row(float (&v)[HELD][8], const float (&gain)[HELD][8], const float (&bias)[HELD][8], float eps) {
    if (NORM == PLAIN) return;
    float part[8] = {};
#pragma unroll
    for (int h = 0; h < HELD; h++)
        if (in(h))
#pragma unroll
            for (int k = 0; k < 8; k++) part[k] += v[h][k];
    float mean = NORM == LAYER ? __fmul_rn(row_sum(part), 1.0f / WIDTH) : 0.0f;
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
    float r = 1.0f / sqrtf(__fadd_rn(__fmul_rn(row_sum(part), 1.0f / WIDTH), eps));
#pragma unroll
    for (int h = 0; h < HELD; h++)
        if (in(h))
#pragma unroll
            for (int k = 0; k < 8; k++)
                v[h][k] = __fadd_rn(__fmul_rn(__fmul_rn(v[h][k], r), gain[h][k]), NORM == LAYER ? bias[h][k] : 0.0f);
}
