// A product would leave -0.0 and NaN behind, so the choice is made by the mask alone. T is the result's type.
extern "C" __global__ void masked(T *out, const float *x, const u8 *mask, long long n) {
    PACKS(i, n) {
        float v[PACK];
        load_floats(x, i, n, v);
        Pack r;
        for (int k = 0; k < PACK; k++) r.v[k] = i + k < n && mask[i + k] ? v[k] : 0.0f;
        store(out, i, n, r);
    }
}
