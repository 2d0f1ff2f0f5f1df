extern "C" __global__ void fill_rows(float *y, const float *row, long long n, long long width) {
    EACH(i, n) y[i] = row[i % width];
}

extern "C" __global__ void scale_columns(float *out, const float *x, const float *scale, long long n,
                                         long long width) {
    EACH(i, n) out[i] = __fmul_rn(x[i], scale[i % width]);
}

extern "C" __global__ void add_scaled(float *sum, const float *x, const float *factor, long long n) {
    float f = *factor;
    EACH(i, n) sum[i] += f * x[i];
}

// Adds an exact partial sum of integers to the 32-bit integers kept in y; the last part makes floats of them:
// sum * (sx * sw) + bias, each operation rounded by itself, as the integer engine does.
extern "C" __global__ void add_part(float *y, const float *part, const float *sx, const float *sw, const float *bias,
                                    long long n, long long width, int first, int last) {
    EACH(i, n) {
        int sum = (int)part[i] + (first ? 0 : __float_as_int(y[i]));
        if (!last) {
            y[i] = __int_as_float(sum);
            continue;
        }
        float v = __fmul_rn((float)sum, __fmul_rn(*sx, sw[i % width]));
        y[i] = bias ? __fadd_rn(v, bias[i % width]) : v;
    }
}
