// A product would leave -0.0 and NaN behind, so the choice is made by the mask alone.
extern "C" __global__ void masked(float *out, const float *x, const u8 *mask, long long n) {
    EACH(i, n) out[i] = mask[i] ? x[i] : 0.0f;
}
