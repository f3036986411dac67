// The element-wise and row-wise operations. One block a row where rows are reduced; sums are taken in a fixed order.

KERNEL rms_norm(const float* x, const float* weight, float* y, int width, float eps) {
    __shared__ float shared[32];
    const float* row = x + (u64)blockIdx.x * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += row[i] * row[i];
    float scale = rsqrtf(block_sum(sum, shared) / width + eps);
    float* out = y + (u64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[i] = row[i] * scale * weight[i];
}

KERNEL rms_norm_backward(const float* x, const float* weight, const float* dy, float* dx, int width, float eps) {
    __shared__ float shared[32];
    u64 at = (u64)blockIdx.x * width;
    float squares = 0.0f, product = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float v = x[at + i];
        squares += v * v;
        product += weight[i] * dy[at + i] * v;
    }
    float scale = rsqrtf(block_sum(squares, shared) / width + eps);
    float mean = block_sum(product, shared) / width;
    float pull = scale * scale * scale * mean;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        dx[at + i] += scale * weight[i] * dy[at + i] - pull * x[at + i];
}

// One thread a rotated pair; `cos` and `sin` are [positions, half].
KERNEL rope(float* x, const float* cos, const float* sin, const u32* positions, u64 n_pairs, int heads, int half, float sign) {
    u64 idx = global_idx();
    if (idx >= n_pairs) return;
    int i = idx % half;
    u64 head = idx / half;
    u64 row = positions[head / heads];
    float c = cos[row * half + i], s = sign * sin[row * half + i];
    float* at = x + head * 2 * half + i;
    float a = at[0], b = at[half];
    at[0] = a * c - b * s;
    at[half] = b * c + a * s;
}

KERNEL swiglu(float* gate, const float* up, u64 n) {
    u64 i = global_idx();
    if (i >= n) return;
    float g = gate[i];
    gate[i] = g / (1.0f + expf(-g)) * up[i];
}

KERNEL swiglu_backward(const float* dy, float* gate, float* up, u64 n) {
    u64 i = global_idx();
    if (i >= n) return;
    float g = gate[i], u = up[i], d = dy[i];
    float sigmoid = 1.0f / (1.0f + expf(-g));
    gate[i] = d * u * sigmoid * (1.0f + g * (1.0f - sigmoid));
    up[i] = d * g * sigmoid;
}

KERNEL add(const float* x, float* y, u64 n) {
    u64 i = global_idx();
    if (i < n) y[i] += x[i];
}

KERNEL add_bias(float* y, const float* bias, u64 n, int width) {
    u64 i = global_idx();
    if (i < n) y[i] += bias[i % width];
}

KERNEL to_bf16(const float* x, u16* y, u64 n) {
    u64 i = global_idx();
    if (i < n) y[i] = float_to_bf16(x[i]);
}

// Takes the gradient of one sample into the sums that are there.
KERNEL take_gradient(const float* g, float* sum, float* absolute, float* square, u64 n) {
    u64 i = global_idx();
    if (i >= n) return;
    float v = g[i];
    if (sum) sum[i] += v;
    if (absolute) absolute[i] += fabsf(v);
    if (square) square[i] += v * v;
}

// Of each row of logits the largest element, the first of equals, and the sum of exp(x - max). NaN stays visible in the sum.
KERNEL row_summary(const float* x, int width, float* max, u32* best, double* sums) {
    __shared__ float values[32];
    __shared__ u32 places[32];
    __shared__ double partial[32];
    const float* row = x + (u64)blockIdx.x * width;
    float m = __int_as_float(0xff800000);
    u32 at = 0xffffffffu;
    for (u32 i = threadIdx.x; i < (u32)width; i += blockDim.x) {
        float v = row[i];
        if (v > m || at == 0xffffffffu) { m = v > m ? v : m; at = i; }
    }
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int offset = 16; offset > 0; offset >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, m, offset);
        u32 place = __shfl_xor_sync(0xffffffffu, at, offset);
        if (other > m || (other == m && place < at)) { m = other; at = place; }
    }
    if (lane == 0) { values[warp] = m; places[warp] = at; }
    __syncthreads();
    int n_warps = blockDim.x >> 5;
    m = lane < n_warps ? values[lane] : __int_as_float(0xff800000);
    at = lane < n_warps ? places[lane] : 0xffffffffu;
    for (int offset = 16; offset > 0; offset >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, m, offset);
        u32 place = __shfl_xor_sync(0xffffffffu, at, offset);
        if (other > m || (other == m && place < at)) { m = other; at = place; }
    }
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < (u32)width; i += blockDim.x) sum += (double)expf(row[i] - m);
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (int w = 0; w < n_warps; w++) total += partial[w];
        max[blockIdx.x] = m;
        best[blockIdx.x] = at;
        sums[blockIdx.x] = total;
    }
}

KERNEL softmax_weighted(float* x, const float* weights, const double* log_sums, u64 n, int width) {
    u64 i = global_idx();
    if (i >= n) return;
    u64 row = i / width;
    x[i] = weights[row] * expf((float)((double)x[i] - log_sums[row]));
}

// One block a row.
KERNEL divergence_backward(const float* reference, const double* reference_sums, float* x, const double* log_sums,
                           const float* weights, double* divergences, int width) {
    __shared__ double partial[32];
    u64 at = (u64)blockIdx.x * width;
    double rs = reference_sums[blockIdx.x], ls = log_sums[blockIdx.x];
    float weight = weights[blockIdx.x];
    double sum = 0.0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float ln_p = (float)((double)reference[at + i] - rs), ln_q = (float)((double)x[at + i] - ls);
        float p = expf(ln_p), q = expf(ln_q);
        // A word of no probability adds nothing, however unlikely the other finds it.
        if (p > 0.0f) sum += (double)(p * (ln_p - ln_q));
        x[at + i] = weight * (q - p);
    }
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (int w = 0; w < (blockDim.x >> 5); w++) total += partial[w];
        divergences[blockIdx.x] = total;
    }
}

KERNEL pick(const float* x, const u64* at, float* y, u64 n) {
    u64 i = global_idx();
    if (i < n) y[i] = x[at[i]];
}

KERNEL add_at(float* x, const u64* at, const float* values, u64 n) {
    u64 i = global_idx();
    if (i < n) x[at[i]] += values[i];
}

KERNEL gather_rows(const float* x, const u64* rows, float* y, u64 n, int width) {
    u64 i = global_idx();
    if (i < n) y[i] = x[rows[i / width] * width + i % width];
}

// One thread a column, rows in their order: a row may come twice.
KERNEL add_rows(const float* x, const u64* rows, float* y, int n_rows, int width) {
    u64 column = global_idx();
    if (column >= width) return;
    for (int r = 0; r < n_rows; r++) y[rows[r] * width + column] += x[(u64)r * width + column];
}

KERNEL scale_rows(const float* x, const float* factors, float* y, u64 n, int width) {
    u64 i = global_idx();
    if (i < n) y[i] = x[i] * factors[i / width];
}

KERNEL row_squares(const float* x, double* sums, int width) {
    __shared__ double partial[32];
    const float* row = x + (u64)blockIdx.x * width;
    double sum = 0.0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum += (double)row[i] * (double)row[i];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (int w = 0; w < (blockDim.x >> 5); w++) total += partial[w];
        sums[blockIdx.x] = total;
    }
}

// A block has 32 columns and takes 32 rows at a time.
KERNEL column_squares(const float* x, double* sums, int n_rows, int width) {
    __shared__ double partial[32][33];
    int lane = threadIdx.x & 31, slice = threadIdx.x >> 5;
    u64 column = (u64)blockIdx.x * 32 + lane;
    double sum = 0.0;
    for (int r = slice; r < n_rows && column < width; r += 32) {
        double v = x[(u64)r * width + column];
        sum += v * v;
    }
    partial[slice][lane] = sum;
    __syncthreads();
    if (slice == 0 && column < width) {
        double total = 0.0;
        for (int s = 0; s < 32; s++) total += partial[s][lane];
        sums[column] = total;
    }
}
