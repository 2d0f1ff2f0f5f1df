// `pairs` pairs in each token; a head has `half` of them, its first half of elements paired with its second.
extern "C" __global__ void rotate(T *out, const T *x, const u32 *positions, const float *cos,
                                  const float *sin, long long n, long long pairs, long long half, float sign) {
    EACH(i, n) {
        long long token = i / pairs, c = i % half;
        long long at = token * pairs * 2 + i % pairs / half * half * 2 + c;
        long long angle = positions[token] * half + c;
        float a = x[at], b = x[at + half], s = sign * sin[angle];
        out[at] = a * cos[angle] - b * s;
        out[at + half] = b * cos[angle] + a * s;
    }
}
