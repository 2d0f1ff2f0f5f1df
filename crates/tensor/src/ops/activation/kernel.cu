#define KERNELS(name, F)                                                                                  \
    extern "C" __global__ void name(T *out, const T *x, long long n) {                                    \
        PACKS(i, n) {                                                                                     \
            Pack a = load(x, i, n);                                                                       \
            for (int k = 0; k < PACK; k++) a.v[k] = F::value(a.v[k]);                                     \
            store(out, i, n, a);                                                                          \
        }                                                                                                 \
    }
#define BACKWARD(name, F)                                                                                 \
    extern "C" __global__ void name(T *dx, const T *grad, const T *x, long long n) {                      \
        PACKS(i, n) {                                                                                     \
            Pack a = load(x, i, n), g = load(grad, i, n);                                                 \
            for (int k = 0; k < PACK; k++) a.v[k] = g.v[k] * F::slope(a.v[k]);                            \
            store(dx, i, n, a);                                                                           \
        }                                                                                                 \
    }

KERNELS(gelu, Gelu)
BACKWARD(gelu_backward, Gelu)
KERNELS(gelu_tanh, GeluTanh)
BACKWARD(gelu_tanh_backward, GeluTanh)
KERNELS(relu, Relu)
BACKWARD(relu_backward, Relu)
KERNELS(silu, Silu)
BACKWARD(silu_backward, Silu)
KERNELS(tanh_, Tanh)
BACKWARD(tanh_backward, Tanh)
