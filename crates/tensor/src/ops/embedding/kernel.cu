// out[t] (+)= factor * table[ids[t]], one block per token t. The first lookup writes, later ones add.
extern "C" __global__ void gather(
    float *out, const float *table, const u32 *ids, float factor, int first, long long width
) {
    out += blockIdx.x * width;
    table += ids[blockIdx.x] * width;
    for (long long c = threadIdx.x; c < width; c += blockDim.x) {
        float v = factor * table[c];
        out[c] = first ? v : out[c] + v;
    }
}

// sum[ids[k]] += factor * (grad rows order[starts[k]..starts[k + 1]]), for distinct ids: block (k, tile) has 32
// columns to itself. Its 8 warps take every eighth row, because one id may have all rows (token types), and are
// then added in order.
extern "C" __global__ void scatter(
    float *sum, const float *grad, const u32 *ids, const u32 *starts, const u32 *order, float factor, long long width
) {
    __shared__ float part[8][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long c = blockIdx.y * 32LL + lane, end = starts[blockIdx.x + 1];
    float s = 0.0f;
    if (c < width) {
        for (long long j = (long long)starts[blockIdx.x] + warp; j < end; j += 8) s += grad[order[j] * width + c];
    }
    part[warp][lane] = s;
    __syncthreads();
    if (warp == 0 && c < width) {
        for (int w = 1; w < 8; w++) s += part[w][lane];
        sum[ids[blockIdx.x] * width + c] += factor * s;
    }
}
