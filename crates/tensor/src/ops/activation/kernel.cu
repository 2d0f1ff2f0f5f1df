// The INT8 codes of F(x) in the type that F(x) would have, and as bytes where these are wanted (n is a multiple of PACK
// then).
template <class F> __device__ inline void codes(T *out, Bytes *bytes, const T *x, const float *step, long long n) {
    float s = *step;
    PACKS(i, n) {
        Pack a = load(x, i, n);
        Bytes b;
        for (int k = 0; k < PACK; k++) {
            a.v[k] = F::value(a.v[k]);
            float code = lsq_code(a.v[k], s);
            a.v[k] = code;
            b.v[k] = (signed char)code;
        }
        store(out, i, n, a);
        if (bytes) bytes[i / PACK] = b;
    }
}

// F(x) and its slope.
template <class F> __device__ inline float value_and_slope(float x, float *slope) {
    *slope = F::slope(x);
    return F::value(x);
}

template <> __device__ inline float value_and_slope<Gelu>(float x, float *slope) {
    float e, p = Gelu::phi(x, &e);
    *slope = p + x * 0.39894228f * e;
    return x * p;
}

// From the gradient of the dequantised codes of F(x): that of x, and column sums of it and of the step size's shares.
template <class F, int COUNT>
__device__ inline void codes_backward(float *parts, T *dx, const T *grad, const T *x, const float *step, long long rows,
                                      long long width, long long per_part) {
    float inverse = 1.0f / *step;
    strip<COUNT, 2>(parts, rows, width, per_part, [&](long long r, long long c, float (*sum)[COUNT]) {
        Some<COUNT> a = some<COUNT>(x + r * width + c), g = some<COUNT>(grad + r * width + c), y;
        for (int k = 0; k < COUNT; k++) {
            float slope, d;
            y.v[k] = value_and_slope<F>(a.v[k], &slope);
            sum[1][k] += lsq_element(g.v[k], y.v[k], inverse, &d);
            a.v[k] = d * slope;
            sum[0][k] += (float)a.v[k];
        }
        *(Some<COUNT> *)(dx + r * width + c) = a;
    });
}

// The gradient and its column sums: what reads x is often the map whose bias has them as gradient.
template <class F, int COUNT>
__device__ inline void backward(float *parts, T *dx, const T *grad, const T *x, long long rows, long long width,
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

#define FORWARD_KERNELS(name, F)                                                                                    \
    extern "C" __global__ void name(T *out, const T *x, long long n) {                                              \
        PACKS(i, n) {                                                                                               \
            Pack a = load(x, i, n);                                                                                 \
            for (int k = 0; k < PACK; k++) a.v[k] = F::value(a.v[k]);                                               \
            store(out, i, n, a);                                                                                    \
        }                                                                                                           \
    }                                                                                                               \
    extern "C" __global__ void name##_codes(T *out, Bytes *bytes, const T *x, const float *step, long long n) {     \
        codes<F>(out, bytes, x, step, n);                                                                           \
    }
#define BACKWARD_KERNELS(name, F, COUNT)                                                                            \
    extern "C" __global__ void name(float *parts, T *dx, const T *grad, const T *x, long long rows,                 \
                                    long long width, long long per_part) {                                          \
        backward<F, COUNT>(parts, dx, grad, x, rows, width, per_part);                                              \
    }                                                                                                               \
    extern "C" __global__ void name##_of_codes(float *parts, T *dx, const T *grad, const T *x, const float *step,   \
                                               long long rows, long long width, long long per_part) {               \
        codes_backward<F, COUNT>(parts, dx, grad, x, step, rows, width, per_part);                                  \
    }
#define KERNELS(name, F)                                                                                            \
    FORWARD_KERNELS(name, F)                                                                                        \
    BACKWARD_KERNELS(name##_pack, F, PACK)                                                                          \
    BACKWARD_KERNELS(name##_1, F, 1)

KERNELS(gelu, Gelu)
KERNELS(gelu_tanh, GeluTanh)
KERNELS(relu, Relu)
KERNELS(silu, Silu)
KERNELS(tanh_, Tanh)
