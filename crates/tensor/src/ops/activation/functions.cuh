// Each function with its slope; the kernels differ in nothing else.

constexpr float SQRT_HALF = 0.70710678f;
constexpr float SQRT_2_OVER_PI = 0.79788456f;

struct Gelu {
    // The normal distribution's Phi(x), and e^(-x^2 / 2).
    static __device__ float phi(float x, float *e) {
        if constexpr (sizeof(T) == 4) {
            *e = expf(-0.5f * x * x);
            return 0.5f * (1.0f + erff(x * SQRT_HALF));
        }
        // Within 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26), far finer than bf16; erff would take longer than memory.
        float z = fabsf(x) * SQRT_HALF, t = __fdividef(1.0f, 1.0f + 0.3275911f * z);
        *e = __expf(-z * z);
        float tail = 0.5f * *e * t *
            (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
        return x < 0.0f ? tail : 1.0f - tail;
    }
    static __device__ float value(float x) {
        float e;
        return x * phi(x, &e);
    }
    // Phi(x) + x * phi(x), phi the normal density.
    static __device__ float slope(float x) {
        float e, p = phi(x, &e);
        return p + x * 0.39894228f * e;
    }
    static __device__ float value_and_slope(float x, float *s) {
        float e, p = phi(x, &e);
        *s = p + x * 0.39894228f * e;
        return x * p;
    }
};

// Both, of functions whose value and slope share little.
#define VALUE_AND_SLOPE                                          \
    static __device__ float value_and_slope(float x, float *s) { \
        *s = slope(x);                                           \
        return value(x);                                         \
    }

struct GeluTanh {
    static __device__ float inner(float x) { return tanhf(SQRT_2_OVER_PI * (x + 0.044715f * x * x * x)); }
    static __device__ float value(float x) { return 0.5f * x * (1.0f + inner(x)); }
    static __device__ float slope(float x) {
        float t = inner(x);
        return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * SQRT_2_OVER_PI * (1.0f + 3.0f * 0.044715f * x * x);
    }
    VALUE_AND_SLOPE
};

struct Relu {
    static __device__ float value(float x) { return fmaxf(x, 0.0f); }
    static __device__ float slope(float x) { return x > 0.0f ? 1.0f : 0.0f; }
    VALUE_AND_SLOPE
};

struct Silu {
    static __device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
    static __device__ float value(float x) { return x * sigmoid(x); }
    static __device__ float slope(float x) {
        float s = sigmoid(x);
        return s * (1.0f + x * (1.0f - s));
    }
    VALUE_AND_SLOPE
};

struct Tanh {
    static __device__ float value(float x) { return tanhf(x); }
    static __device__ float slope(float x) {
        float t = tanhf(x);
        return 1.0f - t * t;
    }
    VALUE_AND_SLOPE
};

struct Identity {
    static __device__ float value(float x) { return x; }
};

// By number, as activation/cuda.rs has them.
template <int N> struct Numbered;
template <> struct Numbered<0> : Identity {};
template <> struct Numbered<1> : Gelu {};
template <> struct Numbered<2> : GeluTanh {};
template <> struct Numbered<3> : Relu {};
template <> struct Numbered<4> : Silu {};
template <> struct Numbered<5> : Tanh {};

