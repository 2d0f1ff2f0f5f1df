// A product would leave -0.0 and NaN behind, so the choice is made by the mask alone. T is the result's type.
__device__ inline void mask_pack(T *out, const float *x, const u8 *mask, long long i, long long n) {
    float v[PACK];
    load_floats(x, i, n, v);
    Pack r;
    for (int k = 0; k < PACK; k++) r.v[k] = !mask || (i + k < n && mask[i + k]) ? v[k] : 0.0f;
    store(out, i, n, r);
}

extern "C" __global__ void masked(T *out, const float *x, const u8 *mask, long long n) {
    PACKS(i, n) mask_pack(out, x, mask, i, n);
}

// A weight: its mask may be null.
struct Entry {
    T *out;
    const float *x;
    const u8 *mask;
    long long n, first_block;
};

// A block makes CHUNK elements of one weight.
constexpr long long CHUNK = 8192;

extern "C" __global__ void multiplied(const Entry *table, int entries) {
    Entry e = own_entry(table, entries, blockIdx.x);
    long long from = (blockIdx.x - e.first_block) * CHUNK, to = from + CHUNK < e.n ? from + CHUNK : e.n;
    // A part of a result may begin between packs.
    if ((u64)e.out % 16)
        for (long long i = from + threadIdx.x; i < to; i += blockDim.x) e.out[i] = !e.mask || e.mask[i] ? e.x[i] : 0.0f;
    else
        for (long long i = from + threadIdx.x * PACK; i < to; i += blockDim.x * PACK)
            mask_pack(e.out, e.x, e.mask, i, e.n);
}
