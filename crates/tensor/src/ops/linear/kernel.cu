// A block for each row of the result.
extern "C" __global__ void fill_rows(T *y, const float *row, long long width) {
    for (long long c = threadIdx.x; c < width; c += blockDim.x) y[blockIdx.x * width + c] = row[c];
}

extern "C" __global__ void scale_rows(T *out, const T *w, const float *scale, long long width) {
    float s = scale[blockIdx.x];
    for (long long c = threadIdx.x; c < width; c += blockDim.x) {
        long long at = blockIdx.x * width + c;
        out[at] = __fmul_rn(w[at], s);
    }
}

// Adds an exact partial sum of integers to the 32-bit integers so far; the last part makes floats of them:
// sum * (sx * sw) + bias, each operation rounded by itself, as the integer engine does.
__device__ inline void add_element(T *y, int *sum, const float *part, float sx, const float *sw, const float *bias,
                                   long long at, long long c, int first, int last) {
    int total = (int)part[at] + (first ? 0 : sum[at]);
    if (!last) {
        sum[at] = total;
        return;
    }
    float v = __fmul_rn((float)total, __fmul_rn(sx, sw[c]));
    y[at] = bias ? __fadd_rn(v, bias[c]) : v;
}

extern "C" __global__ void add_part(T *y, int *sum, const float *part, const float *sx, const float *sw,
                                    const float *bias, long long width, int first, int last) {
    long long row = blockIdx.x * width;
    float s = *sx;
    if (width % PACK || !first || !last) {
        for (long long c = threadIdx.x; c < width; c += blockDim.x)
            add_element(y, sum, part, s, sw, bias, row + c, c, first, last);
        return;
    }
    // One part, the usual case: by packs.
    for (long long c = threadIdx.x * PACK; c < width; c += blockDim.x * PACK) {
        float v[PACK], w[PACK], b[PACK];
        load_floats(part, row + c, row + width, v);
        load_floats(sw, c, width, w);
        if (bias) load_floats(bias, c, width, b);
        Pack r;
        for (int k = 0; k < PACK; k++) {
            // A float below 2^24 that is an integer stays what it is.
            float p = __fmul_rn(v[k], __fmul_rn(s, w[k]));
            r.v[k] = bias ? __fadd_rn(p, b[k]) : p;
        }
        *(Pack *)(y + row + c) = r;
    }
}
