// Matrices on their way to the host's memory and back, and between the types of elements.

// A row as halves, divided by the power of two that brings its largest element to [2^14, 2^15). One block a row.
KERNEL to_halves(const float* x, u16* y, float* scales, int width) {
    __shared__ float shared[32];
    const float* row = x + (u64)blockIdx.x * width;
    float m = 0.0f;
    bool bad = false;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float v = fabsf(row[i]);
        bad |= !(v <= 3.4028235e38f);
        m = fmaxf(m, v);
    }
    m = block_max(m, shared);
    // The exponent of the largest element, less 14; subnormal rows are taken for zeros of the smallest exponent.
    int exponent = (int)(__float_as_uint(m) >> 23) - 127 - 14;
    exponent = exponent < -126 ? -126 : exponent;
    float scale = __uint_as_float((u32)(exponent + 127) << 23);
    float inverse = __uint_as_float((u32)(127 - exponent) << 23);
    // What is not a number, or infinite, stays so.
    if (__syncthreads_or(bad)) { scale = 1.0f; inverse = 1.0f; }
    u16* out = y + (u64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[i] = float_to_half(row[i] * inverse);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

KERNEL from_halves(const u16* y, const float* scales, float* x, int width) {
    float scale = scales[blockIdx.x];
    u64 at = (u64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) x[at + i] = half_to_float(y[at + i]) * scale;
}

KERNEL from_bf16(const u16* x, float* y, u64 n) {
    u64 i = global_idx();
    if (i < n) y[i] = bf16_to_float(x[i]);
}

// To 10 bits of mantissa, to nearest, ties to even: what tensor cores read of a float. NaN and infinity stay.
KERNEL to_tf32(const float* x, float* y, u64 n) {
    u64 i = global_idx();
    if (i >= n) return;
    u32 bits = __float_as_uint(x[i]);
    if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u;
    y[i] = __uint_as_float(bits);
}

// Adds the lower triangle of a square to that of a part of a matrix.
KERNEL add_lower(const float* square, float* h, int n, u64 stride) {
    u64 i = global_idx();
    u64 r = i / n, c = i % n;
    if (r < (u64)n && c <= r) h[r * stride + c] += square[i];
}

// Counts elements that are infinite or not a number.
KERNEL count_not_finite(const float* x, u64 n, u32* count) {
    u64 i = global_idx();
    bool bad = i < n && (__float_as_uint(x[i]) & 0x7f800000u) == 0x7f800000u;
    u32 found = __syncthreads_count(bad);
    if (threadIdx.x == 0 && found > 0) atomicAdd(count, found);
}
