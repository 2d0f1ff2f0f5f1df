// FUNCTION is which.
typedef Numbered<FUNCTION> F;

extern "C" __global__ void forward(T *out, const T *x, long long n) {
    PACKS(i, n) {
        Pack a = load(x, i, n);
        for (int k = 0; k < PACK; k++) a.v[k] = F::value(a.v[k]);
        store(out, i, n, a);
    }
}

// The INT8 codes of F(x) in the type that F(x) would have, and as bytes where these are wanted (n is a multiple of PACK
// then). With a `pair`, x is first rounded to its grid.
extern "C" __global__ void codes(T *out, Bytes *bytes, const T *x, const float *step, const float *pair, long long n) {
    float p = pair ? *pair : 1.0f;
    Codes codes(*step), grid(p);
    PACKS(i, n) {
        Pack a = load(x, i, n);
        Bytes b;
        for (int k = 0; k < PACK; k++) {
            if (pair) a.v[k] = grid(a.v[k]) * p;
            a.v[k] = F::value(a.v[k]);
            float above = codes.above(a.v[k]);
            a.v[k] = __fsub_rn(above, CODE_ZERO);
            b.v[k] = (signed char)__float_as_int(above);
        }
        store(out, i, n, a);
        if (bytes) bytes[i / PACK] = b;
    }
}

// From the gradient of the dequantised codes of F(x), or of F of x rounded to the grid of `pair`: that of x, and column
// sums of it and of the shares of both step sizes, as one operation after the other would have them.
template <int COUNT, bool PAIR>
__device__ inline void backward_of_codes(float *parts, T *dx, const T *grad, const T *x, const float *step,
                                      const float *pair, long long rows, long long width, long long per_part) {
    float inverse = 1.0f / *step, p = PAIR ? *pair : 1.0f, inverse_p = 1.0f / p;
    Codes grid(p);
    strip<COUNT, 2 + PAIR>(parts, rows, width, per_part, [&](long long r, long long c, float (*sum)[COUNT]) {
        Some<COUNT> a = some<COUNT>(x + r * width + c), g = some<COUNT>(grad + r * width + c);
        for (int k = 0; k < COUNT; k++) {
            T at = a.v[k], y, d;
            if (PAIR) at = grid(at) * p;
            float slope, part;
            y = F::value_and_slope(at, &slope);
            sum[1][k] += lsq_element(g.v[k], y, inverse, &part);
            d = part * slope;
            if (PAIR) {
                sum[1 + PAIR][k] += lsq_element(d, a.v[k], inverse_p, &part);
                d = part;
            }
            a.v[k] = d;
            sum[0][k] += (float)d;
        }
        *(Some<COUNT> *)(dx + r * width + c) = a;
    });
}

// The gradient and its column sums: what reads x is often the map whose bias has them as gradient.
template <int COUNT>
__device__ inline void backward_strip(float *parts, T *dx, const T *grad, const T *x, long long rows, long long width,
                                long long per_part) {
    strip<COUNT, 1>(parts, rows, width, per_part, [&](long long r, long long c, float (*sum)[COUNT]) {
        Some<COUNT> a = some<COUNT>(x + r * width + c), g = some<COUNT>(grad + r * width + c);
        for (int k = 0; k < COUNT; k++) {
            a.v[k] = (float)g.v[k] * F::slope(a.v[k]);
            sum[0][k] += (float)a.v[k];
        }
        *(Some<COUNT> *)(dx + r * width + c) = a;
    });
}

#define BACKWARD(COUNT, suffix)                                                                                      \
    extern "C" __global__ void backward##suffix(float *parts, T *dx, const T *grad, const T *x, long long rows,     \
                                                long long width, long long per_part) {                              \
        backward_strip<COUNT>(parts, dx, grad, x, rows, width, per_part);                                           \
    }                                                                                                               \
    extern "C" __global__ void codes_backward##suffix(float *parts, T *dx, const T *grad, const T *x,               \
                                                      const float *step, const float *pair, long long rows,         \
                                                      long long width, long long per_part) {                        \
        if (pair) backward_of_codes<COUNT, true>(parts, dx, grad, x, step, pair, rows, width, per_part);            \
        else backward_of_codes<COUNT, false>(parts, dx, grad, x, step, pair, rows, width, per_part);                \
    }
BACKWARD(PACK, _pack)
BACKWARD(1, _1)
