// Where the codes are wanted as bytes too, n is a multiple of PACK.
extern "C" __global__ void codes(T *out, Bytes *bytes, const T *x, const float *scale, long long n) {
    Codes codes(*scale);
    PACKS(i, n) {
        Pack a = load(x, i, n);
        Bytes b;
        for (int k = 0; k < PACK; k++) {
            float above = codes.above(a.v[k]);
            a.v[k] = __fsub_rn(above, CODE_ZERO);
            b.v[k] = (signed char)__float_as_int(above);
        }
        store(out, i, n, a);
        if (bytes) bytes[i / PACK] = b;
    }
}

extern "C" __global__ void dequantised(T *out, const T *x, const float *scale, long long n) {
    float s = *scale;
    Codes codes(s);
    PACKS(i, n) {
        Pack a = load(x, i, n);
        for (int k = 0; k < PACK; k++) a.v[k] = codes(a.v[k]) * s;
        store(out, i, n, a);
    }
}

// With `add`, dx has gradients already.
extern "C" __global__ void backward(T *dx, float *parts, const T *grad, const T *x, const float *scale, long long n,
                                    int add) {
    float inverse = 1.0f / *scale, sum = 0;
    PACKS(i, n) {
        Pack g = load(grad, i, n), a = load(x, i, n), before;
        if (add) before = load(dx, i, n);
        for (int k = 0; k < PACK; k++) {
            float d;
            sum += lsq_element(g.v[k], a.v[k], inverse, &d);
            a.v[k] = add ? (float)before.v[k] + d : d;
        }
        store(dx, i, n, a);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// Of values with a step size for each `range` columns (a multiple of PACK): the gradient, and column sums of it (that of
// a bias) and of the step sizes' shares.
extern "C" __global__ void ranges_backward(float *parts, T *dx, const T *grad, const T *x, const float *s0,
                                           const float *s1, const float *s2, long long range, long long rows,
                                           long long width, long long per_part) {
    long long own = ((long long)blockIdx.x * 32 + threadIdx.x % 32) * PACK, part = (own < width ? own : 0) / range;
    float inverse = 1.0f / *(part == 0 ? s0 : part == 1 ? s1 : s2);
    strip<PACK, 2>(parts, rows, width, per_part, [&](long long r, long long c, float (*sum)[PACK]) {
        Some<PACK> g = some<PACK>(grad + r * width + c), a = some<PACK>(x + r * width + c);
        for (int k = 0; k < PACK; k++) {
            float d;
            sum[1][k] += lsq_element(g.v[k], a.v[k], inverse, &d);
            a.v[k] = d;
            sum[0][k] += d;
        }
        *(Some<PACK> *)(dx + r * width + c) = a;
    });
}

// A weight. The codes are wanted as T, or as bytes and dequantised. A warp for each row, eight rows a block.
struct Weight {
    const float *w, *scale;
    const u8 *mask;
    T *codes;
    signed char *bytes;
    T *values;
    float *scales;
    long long rows, width, first_block;
};

// Runs f(column, count) over a row, four columns at a time where rows allow it.
template <class F> __device__ inline void quads(long long width, int lane, F f) {
    if (width % 4)
        for (long long c = lane; c < width; c += 32) f(c, 1);
    else
        for (long long c = lane * 4; c < width; c += 128) f(c, 4);
}

extern "C" __global__ void weight_codes(const Weight *table, int entries) {
    const Weight &e = own_entry(table, entries, blockIdx.x);
    long long row = (blockIdx.x - e.first_block) * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (row >= e.rows) return;
    float s = e.scale[row];
    Codes codes(s);
    if (lane == 0) e.scales[row] = s;
    quads(e.width, lane, [&](long long c, int count) {
        long long at = row * e.width + c;
        float4 w;
        uchar4 mask;
        if (count == 4) {
            w = *(const float4 *)(e.w + at);
            mask = *(const uchar4 *)(e.mask + at);
        } else {
            w.x = e.w[at];
            mask.x = e.mask[at];
        }
        float code[4] = {codes(w.x * (float)mask.x)};
        if (count == 4) {
            code[1] = codes(w.y * (float)mask.y);
            code[2] = codes(w.z * (float)mask.z);
            code[3] = codes(w.w * (float)mask.w);
        }
        for (int k = 0; k < count; k++) {
            if (e.codes) e.codes[at + k] = code[k];
            if (e.values) e.values[at + k] = __fmul_rn(code[k], s);
        }
        if (!e.bytes) return;
        char4 b = {(signed char)code[0], (signed char)code[1], (signed char)code[2], (signed char)code[3]};
        if (count == 4) *(char4 *)(e.bytes + at) = b;
        else e.bytes[at] = b.x;
    });
}

// Where a weight's gradient is, which that of its codes becomes in place, and where its step sizes' gradients go; null if
// it has none.
struct Gradients {
    float *w, *scale;
};

extern "C" __global__ void weight_backward(const Weight *table, const Gradients *gradients, int entries) {
    const Weight &e = own_entry(table, entries, blockIdx.x);
    const Gradients &to = gradients[&e - table];
    long long row = (blockIdx.x - e.first_block) * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (row >= e.rows || !to.w) return;
    float inverse = 1.0f / e.scale[row], sum = 0;
    quads(e.width, lane, [&](long long c, int count) {
        long long at = row * e.width + c;
        auto one = [&](float g, float w, float m) {
            float d;
            sum += lsq_element(g, w * m, inverse, &d);
            return d * m;
        };
        if (count == 1) {
            to.w[at] = one(to.w[at], e.w[at], (float)e.mask[at]);
            return;
        }
        float4 g = *(const float4 *)(to.w + at), w = *(const float4 *)(e.w + at), d;
        uchar4 m = *(const uchar4 *)(e.mask + at);
        d.x = one(g.x, w.x, (float)m.x);
        d.y = one(g.y, w.y, (float)m.y);
        d.z = one(g.z, w.z, (float)m.z);
        d.w = one(g.w, w.w, (float)m.w);
        *(float4 *)(to.w + at) = d;
    });
    sum = warp_sum(sum);
    if (lane == 0) to.scale[row] = sum / sqrtf(e.width * QMAX);
}
