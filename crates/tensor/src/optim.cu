// One AdamW step (optim.rs has the recurrence): returns m' / (sqrt(v') + eps).
__device__ inline float moments(float *m, float *v, float g, float beta1, float beta2, float eps, float c1, float c2) {
    *m = beta1 * *m + (1.0f - beta1) * g;
    *v = beta2 * *v + (1.0f - beta2) * g * g;
    return *m * c1 / (sqrtf(*v * c2) + eps);
}

#define ADAMW(name, gradient, step)                                                                              \
    extern "C" __global__ void name(float *p, float *m, float *v, const float *grad, long long n, float lr,       \
                                    float beta1, float beta2, float eps, float decay, float clip, float c1,       \
                                    float c2) {                                                                   \
        EACH(i, n) {                                                                                              \
            float d = moments(m + i, v + i, clip * (gradient), beta1, beta2, eps, c1, c2);                        \
            p[i] = step;                                                                                          \
        }                                                                                                         \
    }

ADAMW(adamw, grad[i], p[i] - lr * (d + decay * p[i]))
// On the logarithm of p, whose gradient is grad * p.
ADAMW(adamw_positive, grad[i] * p[i], fminf(fmaxf(p[i] * expf(-lr * d), 1e-30f), 1e30f))
