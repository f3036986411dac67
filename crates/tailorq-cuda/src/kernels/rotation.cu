// Rotations of rows, and what turns a triangle into a matrix and rows into columns.

// Part of each row, from column `first` on: blockIdx.y counts blocks of `block` elements (a power of two), which are multiplied by
// their signs and go through the butterflies of the Walsh-Hadamard matrix, at distance 1, 2, 4 and so on: the sums of the host.
KERNEL rotate(float* x, const float* signs, u64 width, u64 first, int block) {
    extern __shared__ float values[];
    float* row = x + blockIdx.x * width + first + (u64)blockIdx.y * block;
    signs += (u64)blockIdx.y * block;
    for (int i = threadIdx.x; i < block; i += blockDim.x) values[i] = row[i] * signs[i];
    for (int half = 1; half < block; half *= 2) {
        __syncthreads();
        for (int pair = threadIdx.x; pair < block / 2; pair += blockDim.x) {
            int i = pair / half * 2 * half + pair % half;
            float a = values[i], b = values[i + half];
            values[i] = a + b, values[i + half] = a - b;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < block; i += blockDim.x) row[i] = values[i];
}

// Squares of 32 x 32 of an [n, n] matrix, 32 x 8 threads each: those at and above the diagonal with their mirror images below it.
// With `swap` both change places; without, what is above the diagonal becomes what is below it.
KERNEL mirror(float* x, u64 n, int swap) {
    __shared__ float above[32][33], below[32][33];
    u64 top = (u64)blockIdx.y * 32, left = (u64)blockIdx.x * 32;
    if (top > left) return;
    int lane = threadIdx.x % 32, line = threadIdx.x / 32;
    for (int r = line; r < 32; r += 8) {
        if (top + r < n && left + lane < n) above[r][lane] = x[(top + r) * n + left + lane];
        if (left + r < n && top + lane < n) below[r][lane] = x[(left + r) * n + top + lane];
    }
    __syncthreads();
    for (int r = line; r < 32; r += 8) {
        // On the diagonal both are one square, of which only what is above it is written here.
        bool is_above = top + r < left + lane;
        if (is_above && top + r < n && left + lane < n) x[(top + r) * n + left + lane] = below[lane][r];
        if (swap && top + lane < left + r && left + r < n && top + lane < n) x[(left + r) * n + top + lane] = above[lane][r];
    }
}
