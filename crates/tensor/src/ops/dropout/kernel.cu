extern "C" __global__ void dropout(T *out, const T *x, long long n, u64 key, u32 below, float factor) {
    EACH(i, n) out[i] = x[i] * (random_bits(key, (u32)i) < below ? 0.0f : factor);
}
