extern "C" __global__ void forward(T *out, const T *gate, const T *up, long long n) {
    PACKS(i, n) {
        Pack g = load(gate, i, n), u = load(up, i, n);
        for (int k = 0; k < PACK; k++) g.v[k] = g.v[k] / (1.0f + expf(-g.v[k])) * u.v[k];
        store(out, i, n, g);
    }
}

extern "C" __global__ void backward(T *dgate, T *dup, const T *grad, const T *gate, const T *up, long long n) {
    PACKS(i, n) {
        Pack g = load(grad, i, n), a = load(gate, i, n), u = load(up, i, n);
        for (int k = 0; k < PACK; k++) {
            float x = a.v[k], s = 1.0f / (1.0f + expf(-x)), d = g.v[k];
            a.v[k] = d * u.v[k] * s * (1.0f + x * (1.0f - s));
            u.v[k] = d * x * s;
        }
        store(dgate, i, n, a);
        store(dup, i, n, u);
    }
}
