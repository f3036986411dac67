// What stands between the matrix products of attention. Scores are [heads, queries, keys].

// Softmax over the keys that a query sees: query i of the chunk stands at position `past + i`. Others get 0.
KERNEL causal_softmax(float* scores, int n_queries, int n_keys, int past, int window) {
    __shared__ float shared[32];
    int i = blockIdx.x;
    float* row = scores + ((u64)blockIdx.y * n_queries + i) * n_keys;
    int end = past + i + 1;
    int start = window > 0 && end > window ? end - window : 0;
    float max = __int_as_float(0xff800000);
    for (int k = start + threadIdx.x; k < end; k += blockDim.x) max = fmaxf(max, row[k]);
    max = block_max(max, shared);
    float sum = 0.0f;
    for (int k = start + threadIdx.x; k < end; k += blockDim.x) {
        float e = expf(row[k] - max);
        row[k] = e;
        sum += e;
    }
    float inverse = 1.0f / block_sum(sum, shared);
    for (int k = threadIdx.x; k < n_keys; k += blockDim.x) row[k] = k >= start && k < end ? row[k] * inverse : 0.0f;
}

// d_scores = p (dp - sum(p dp)) scale, in the place of dp.
KERNEL softmax_backward(const float* p, float* dp, int n_keys, float scale) {
    __shared__ float shared[32];
    u64 at = (u64)blockIdx.x * n_keys;
    float sum = 0.0f;
    for (int k = threadIdx.x; k < n_keys; k += blockDim.x) sum += p[at + k] * dp[at + k];
    sum = block_sum(sum, shared);
    for (int k = threadIdx.x; k < n_keys; k += blockDim.x) {
        float weight = p[at + k];
        // Hidden keys have no weight, and what the product left for them may be anything.
        dp[at + k] = weight == 0.0f ? 0.0f : weight * (dp[at + k] - sum) * scale;
    }
}
