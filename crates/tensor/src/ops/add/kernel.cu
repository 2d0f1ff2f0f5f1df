// `out` may be `a`.
extern "C" __global__ void add(T *out, const T *a, const T *b, long long n) {
    PACKS(i, n) {
        Pack x = load(a, i, n), y = load(b, i, n);
        for (int k = 0; k < PACK; k++) x.v[k] = x.v[k] + y.v[k];
        store(out, i, n, x);
    }
}
