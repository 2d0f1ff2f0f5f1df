// Sums over rows of [rows, width], for one part of the rows for each blockIdx.y. 32 columns by 8 rows a block.
extern "C" __global__ void column_sums(float *out, const float *x, const float *y, long long rows, long long width,
                                       long long per_part) {
    __shared__ float part[8][32];
    int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    long long column = (long long)blockIdx.x * 32 + lane;
    long long first = blockIdx.y * per_part, last = first + per_part < rows ? first + per_part : rows;
    float sum = 0;
    if (column < width)
        for (long long r = first + row; r < last; r += 8) {
            float v = x[r * width + column];
            sum += y ? v * y[r * width + column] : v;
        }
    part[row][lane] = sum;
    __syncthreads();
    if (row == 0 && column < width) {
        for (int i = 1; i < 8; i++) sum += part[i][lane];
        out[blockIdx.y * width + column] = sum;
    }
}
