extern "C" __global__ void forward(float *out, const float *gate, const float *up, long long n) {
    EACH(i, n) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

extern "C" __global__ void backward(float *dgate, float *dup, const float *grad, const float *gate, const float *up,
                                    long long n) {
    EACH(i, n) {
        float x = gate[i], s = 1.0f / (1.0f + expf(-x));
        dgate[i] = grad[i] * up[i] * s * (1.0f + x * (1.0f - s));
        dup[i] = grad[i] * x * s;
    }
}
