extern "C" __global__ void fill_rows(T *y, const float *row, long long n, long long width) {
    EACH(i, n) y[i] = row[i % width];
}

extern "C" __global__ void scale_rows(T *out, const T *w, const float *scale, long long n, long long width) {
    EACH(i, n) out[i] = __fmul_rn(w[i], scale[i / width]);
}

// product = factor * product + before, where there is something before.
extern "C" __global__ void scale_and_add(float *product, const float *before, const float *factor, long long n) {
    float f = *factor;
    EACH(i, n) product[i] = f * product[i] + (before ? before[i] : 0.0f);
}

// Adds an exact partial sum of integers to the 32-bit integers so far; the last part makes floats of them:
// sum * (sx * sw) + bias, each operation rounded by itself, as the integer engine does.
extern "C" __global__ void add_part(T *y, int *sum, const float *part, const float *sx, const float *sw,
                                    const float *bias, long long n, long long width, int first, int last) {
    EACH(i, n) {
        int total = (int)part[i] + (first ? 0 : sum[i]);
        if (!last) {
            sum[i] = total;
            continue;
        }
        float v = __fmul_rn((float)total, __fmul_rn(*sx, sw[i % width]));
        y[i] = bias ? __fadd_rn(v, bias[i % width]) : v;
    }
}
