extern "C" __global__ void narrow(T *out, const float *x, long long n) {
    PACKS(i, n) {
        float v[PACK];
        load_floats(x, i, n, v);
        Pack r;
        for (int k = 0; k < PACK; k++) r.v[k] = v[k];
        store(out, i, n, r);
    }
}

extern "C" __global__ void widen(float *out, const T *x, long long n) {
    PACKS(i, n) {
        Pack a = load(x, i, n);
        for (int k = 0; k < PACK && i + k < n; k++) out[i + k] = a.v[k];
    }
}
