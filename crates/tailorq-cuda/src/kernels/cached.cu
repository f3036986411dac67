// One new token of every sequence against its cache. Keys and values of a sequence are [tokens, kv_heads * head_dim] each.

// Writes row s of keys and values behind the `past[s]` tokens of sequence s. One block a sequence.
KERNEL push_rows(const float* keys, const float* values, const u64* key_at, const u64* value_at, const u64* past, int width) {
    int s = blockIdx.x;
    float* k = (float*)key_at[s] + past[s] * width;
    float* v = (float*)value_at[s] + past[s] * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        k[i] = keys[(u64)s * width + i];
        v[i] = values[(u64)s * width + i];
    }
}

#define WARPS 8
#define PER_LANE 8

// Query head blockIdx.x of sequence blockIdx.y over past[s] + 1 keys: each warp takes every eighth key, with a running
// maximum of its own; the warps are joined at the end. head_dim is at most 256.
KERNEL attention_step(const float* q, const u64* key_at, const u64* value_at, const u64* past, float* y, int heads, int kv_heads,
                      int head_dim, int window, float scale) {
    __shared__ float maxima[WARPS], sums[WARPS];
    __shared__ float mixed[WARPS][32 * PER_LANE];
    int head = blockIdx.x, s = blockIdx.y;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int kv_head = head / (heads / kv_heads);
    u64 width = (u64)kv_heads * head_dim;
    const float* query = q + ((u64)s * heads + head) * head_dim;
    const float* keys = (const float*)key_at[s] + kv_head * head_dim;
    const float* values = (const float*)value_at[s] + kv_head * head_dim;
    int end = (int)past[s] + 1;
    int start = window > 0 && end > window ? end - window : 0;
    float mine[PER_LANE], acc[PER_LANE];
    for (int i = 0; i < PER_LANE; i++) {
        int d = lane + 32 * i;
        mine[i] = d < head_dim ? query[d] * scale : 0.0f;
        acc[i] = 0.0f;
    }
    float max = __int_as_float(0xff800000), sum = 0.0f;
    for (int t = start + warp; t < end; t += WARPS) {
        float dot = 0.0f;
        for (int i = 0; i < PER_LANE; i++) {
            int d = lane + 32 * i;
            if (d < head_dim) dot += mine[i] * keys[t * width + d];
        }
        dot = warp_sum(dot);
        float larger = fmaxf(max, dot);
        float shrink = expf(max - larger), weight = expf(dot - larger);
        sum = sum * shrink + weight;
        for (int i = 0; i < PER_LANE; i++) {
            int d = lane + 32 * i;
            acc[i] = acc[i] * shrink + (d < head_dim ? weight * values[t * width + d] : 0.0f);
        }
        max = larger;
    }
    if (lane == 0) { maxima[warp] = max; sums[warp] = sum; }
    for (int i = 0; i < PER_LANE; i++) mixed[warp][lane + 32 * i] = acc[i];
    __syncthreads();
    float largest = maxima[0];
    for (int w = 1; w < WARPS; w++) largest = fmaxf(largest, maxima[w]);
    for (int d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float total = 0.0f, value = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            // A warp without a key has no maximum and adds nothing.
            float factor = expf(maxima[w] - largest);
            total += sums[w] * factor;
            value += mixed[w][d] * factor;
        }
        y[((u64)s * heads + head) * head_dim + d] = value / total;
    }
}
