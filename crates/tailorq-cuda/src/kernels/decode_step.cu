// What lies between the matrices of a step: norms, rotary embedding, attention over the cache, the choice of a token.

// Writes one number of one token as a fragment, and with the other lanes of its half warp the sum of sixteen. All lanes of a
// warp call this with neighbouring columns.
__device__ __forceinline__ void write_fragment(u16* out, float* sums, u32 c, u32 n, u32 i, bool is_there, float x) {
    u16 rounded = saturated_half(is_there ? x : 0.0f);
    float sum = half_warp_sum(half_to_float(rounded));
    if (!is_there) return;
    out[fragment_place(c, n, i)] = rounded;
    if ((c & 15) == 0) sums[(u64)(c >> 4) * n + i] = sum;
}

struct Norm {
    const u16* embedding;  // [vocabulary, width] in half precision, or null: the stream is there
    const u32* tokens;     // [n]
    float* residual;       // [n, width]
    const float* weight;   // [width]
    u16* out;
    float* out_sums;
    float* plain;          // [n, width] or null
    float eps;
    u32 width, n;
};

// A block a token: RMS norm of the stream, which begins with the token's embedding.
extern "C" __global__ void __launch_bounds__(1024) rms_norm(const __grid_constant__ Norm a) {
    extern __shared__ float row[];
    __shared__ float partial[32];
    u32 i = blockIdx.x;
    let_next_start();
    wait_for_previous();
    float* residual = a.residual + (u64)i * a.width;
    const u16* embedding = a.embedding ? a.embedding + (u64)a.tokens[i] * a.width : nullptr;
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < a.width; c += blockDim.x) {
        float x;
        if (embedding) residual[c] = x = half_to_float(embedding[c]);
        else x = residual[c];
        row[c] = x;
        sum = fmaf(x, x, sum);
    }
    float scale = rsqrtf(block_sum(sum, partial) / (float)a.width + a.eps);
    for (u32 c = threadIdx.x; c < ((a.width + 31) & ~31u); c += blockDim.x) {
        bool is_there = c < a.width;
        float x = is_there ? row[c] * scale * a.weight[c] : 0.0f;
        // Columns up to the end of a step are there too, as zeros.
        write_fragment(a.out, a.out_sums, c, a.n, i, c < ((a.width + 15) & ~15u), x);
        if (is_there && a.plain) a.plain[(u64)i * a.width + c] = x;
    }
}

struct Arrange {
    const float* x;  // [n, width]
    const float* up; // [n, width] or null; if there, x is a gate
    u16* out;
    float* out_sums;
    float* plain;    // [n, width] or null
    u32 width, n;
};

// Numbers become fragments, two streams of a feed-forward its hidden numbers.
extern "C" __global__ void __launch_bounds__(256) arrange(const __grid_constant__ Arrange a) {
    let_next_start();
    wait_for_previous();
    u32 i = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x;
    bool is_there = c < a.width;
    u64 at = (u64)i * a.width + c;
    float x = is_there ? a.x[at] : 0.0f;
    if (is_there && a.up) x = x / (1.0f + __expf(-x)) * a.up[at];
    write_fragment(a.out, a.out_sums, c, a.n, i, c < ((a.width + 15) & ~15u), x);
    if (is_there && a.plain) a.plain[at] = x;
}

struct Rotate {
    const float* x;      // [n, width]
    const float* signs;  // of the whole blocks, then of the last one where they leave a rest
    u16* out;
    float* out_sums;
    u32 width, block, part, n;
};

__device__ __forceinline__ void walsh(float* x, u32 length, u32 block) {
    for (u32 half = 1; half < block; half *= 2) {
        __syncthreads();
        for (u32 p = threadIdx.x; p < length / 2; p += blockDim.x) {
            u32 at = p / half * 2 * half + p % half;
            float a = x[at], b = x[at + half];
            x[at] = a + b, x[at + half] = a - b;
        }
    }
    __syncthreads();
}

// The input transform: signs and butterflies over blocks of a power of two, a second time over the last block's worth of
// inputs when the width is no multiple. A block computes `part` inputs: whole blocks, or all when there is a second pass.
extern "C" __global__ void __launch_bounds__(512) rotate(const __grid_constant__ Rotate a) {
    extern __shared__ float row[];
    let_next_start();
    wait_for_previous();
    u32 i = blockIdx.y, first = blockIdx.x * a.part, length = min(a.part, a.width - first);
    const float* x = a.x + (u64)i * a.width + first;
    u32 whole = length - length % a.block;
    for (u32 c = threadIdx.x; c < length; c += blockDim.x) row[c] = c < whole ? x[c] * a.signs[first + c] : x[c];
    walsh(row, whole, a.block);
    if (whole < length) {
        float* last = row + length - a.block;
        for (u32 c = threadIdx.x; c < a.block; c += blockDim.x) last[c] *= a.signs[whole + c];
        walsh(last, a.block, a.block);
    }
    for (u32 c = threadIdx.x; c < ((length + 31) & ~31u); c += blockDim.x) {
        float y = c < length ? row[c] : 0.0f;
        write_fragment(a.out, a.out_sums, first + c, a.n, i, c < ((length + 15) & ~15u), y);
    }
}

struct Attend {
    const float* heads;      // [n, (heads + 2 kv_heads) head_dim]: queries, keys, values
    const float* query_norm; // [head_dim] or null
    const float* key_norm;
    const float* cos;        // [positions, head_dim / 2]
    const float* sin;
    const int* positions;    // [n], negative: nothing to do
    const u32* sequences;    // [n]
    u16* keys;               // [sequences, kv_heads, capacity, head_dim] in half precision
    u16* values;
    u16* out;
    float* out_sums;
    float* plain;            // [n, heads head_dim] or null
    float* parts;            // [n, kv_heads, splits, heads of a kv head, head_dim + 2]
    u32* arrivals;           // [n, kv_heads], zero between launches
    float eps, scale;
    u32 n_heads, n_kv_heads, head_dim, capacity, window, split, n_splits, n, stores;
};

// One warp: a head with its norm and its rotation; `into` is in shared memory (`factor` times) or, as half precision, in the cache.
__device__ void rotated_head(const Attend& a, const float* head, const float* weight, u32 position, float factor, float* into, u16* cache) {
    u32 lane = threadIdx.x & 31, half = a.head_dim / 2;
    float scale = 1.0f;
    if (weight) {
        float sum = 0.0f;
        for (u32 d = lane; d < a.head_dim; d += 32) sum = fmaf(head[d], head[d], sum);
        scale = rsqrtf(warp_sum(sum) / (float)a.head_dim + a.eps);
    }
    for (u32 d = lane; d < half; d += 32) {
        float x = head[d] * scale, y = head[d + half] * scale;
        if (weight) x *= weight[d], y *= weight[d + half];
        float cos = a.cos[(u64)position * half + d], sin = a.sin[(u64)position * half + d];
        float first = (x * cos - y * sin) * factor, second = (y * cos + x * sin) * factor;
        if (into) into[d] = first, into[d + half] = second;
        if (cache) cache[d] = saturated_half(first), cache[d + half] = saturated_half(second);
    }
}

// One warp: the key and the value of a token into the cache.
__device__ void store_token(const Attend& a, u32 row, u32 kv_head, u32 position) {
    u32 lane = threadIdx.x & 31;
    const float* heads = a.heads + (u64)row * (a.n_heads + 2 * a.n_kv_heads) * a.head_dim;
    u64 at = (((u64)a.sequences[row] * a.n_kv_heads + kv_head) * a.capacity + position) * a.head_dim;
    rotated_head(a, heads + (u64)(a.n_heads + kv_head) * a.head_dim, a.key_norm, position, 1.0f, nullptr, a.keys + at);
    const float* value = heads + (u64)(a.n_heads + a.n_kv_heads + kv_head) * a.head_dim;
    for (u32 d = lane; d < a.head_dim; d += 32) a.values[at + d] = saturated_half(value[d]);
}

// Tokens of one sequence see each other: their keys are stored before any of them attends. One warp a head.
extern "C" __global__ void __launch_bounds__(32) store(const __grid_constant__ Attend a) {
    let_next_start();
    wait_for_previous();
    int position = a.positions[blockIdx.y];
    if (position >= 0) store_token(a, blockIdx.y, blockIdx.x, position);
}

__device__ __forceinline__ void eight_floats(uint4 v, float* x) {
    x[0] = half_to_float((u16)v.x), x[1] = half_to_float((u16)(v.x >> 16));
    x[2] = half_to_float((u16)v.y), x[3] = half_to_float((u16)(v.y >> 16));
    x[4] = half_to_float((u16)v.z), x[5] = half_to_float((u16)(v.z >> 16));
    x[6] = half_to_float((u16)v.w), x[7] = half_to_float((u16)(v.w >> 16));
}

#define ATTENTION_THREADS 128
#define HEADS_AT_ONCE 4
#define AT_ONCE 4

// Blocks: splits of the positions, heads of keys, tokens. Each split leaves its part of the sum; the last one to be done
// adds them up in the order of positions.
extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS) attend(const __grid_constant__ Attend a) {
    extern __shared__ float shared[];
    __shared__ bool is_last;
    u32 kv_head = blockIdx.y, i = blockIdx.z, width = a.head_dim, group = a.n_heads / a.n_kv_heads;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = ATTENTION_THREADS / 32;
    let_next_start();
    wait_for_previous();
    int place = a.positions[i];
    if (place < 0) return;
    u32 position = place, oldest = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
    u32 first = blockIdx.x * a.split;
    if (first > position || first + a.split <= oldest) return;
    u32 from = max(first, oldest), to = min(position + 1, first + a.split);
    float* queries = shared;                 // [group, width]
    float* weights = queries + group * width; // [group, split]
    float* reduced = weights + group * a.split; // [thread groups, HEADS_AT_ONCE, width]
    const float* heads = a.heads + (u64)i * (a.n_heads + 2 * a.n_kv_heads) * width;
    for (u32 h = warp; h < group; h += n_warps) {
        rotated_head(a, heads + (u64)(kv_head * group + h) * width, a.query_norm, position, a.scale, queries + h * width, nullptr);
    }
    if (a.stores && to == position + 1 && warp == n_warps - 1) store_token(a, i, kv_head, position);
    __syncthreads();

    u64 origin = ((u64)a.sequences[i] * a.n_kv_heads + kv_head) * a.capacity * width;
    u32 lanes = 2;  // of a position, eight numbers each
    while (lanes * 8 < width) lanes *= 2;
    u32 sub = lane % lanes, a_warp = 32 / lanes;
    // Several positions at once, so that their loads do not wait for each other.
    for (u32 base = from + warp * a_warp; base < to; base += n_warps * a_warp * AT_ONCE) {
        uint4 packed[AT_ONCE];
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            u32 p = base + j * n_warps * a_warp + lane / lanes;
            packed[j] = make_uint4(0, 0, 0, 0);
            if (p < to && sub * 8 < width) packed[j] = *(const uint4*)(a.keys + origin + (u64)p * width + sub * 8);
        }
        for (u32 h = 0; h < group; h++) {
            float q[8] = {};
            if (sub * 8 < width) {
#pragma unroll
                for (u32 d = 0; d < 8; d++) q[d] = queries[h * width + sub * 8 + d];
            }
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) {
                float key[8], dot = 0.0f;
                eight_floats(packed[j], key);
#pragma unroll
                for (u32 d = 0; d < 8; d++) dot = fmaf(q[d], key[d], dot);
                for (u32 offset = lanes / 2; offset > 0; offset >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
                u32 p = base + j * n_warps * a_warp + lane / lanes;
                if (sub == 0 && p < to) weights[h * a.split + p - first] = dot;
            }
        }
    }
    __syncthreads();

    float* part = a.parts + ((u64)(i * a.n_kv_heads + kv_head) * a.n_splits) * group * (width + 2);
    float* mine = part + (u64)blockIdx.x * group * (width + 2);
    for (u32 h = warp; h < group; h += n_warps) {
        float* w = weights + h * a.split;
        float most = __int_as_float(0xff800000);
        for (u32 p = from + lane; p < to; p += 32) most = fmaxf(most, w[p - first]);
        most = warp_max(most);
        float sum = 0.0f;
        for (u32 p = from + lane; p < to; p += 32) {
            float e = __expf(w[p - first] - most);
            w[p - first] = e;
            sum += e;
        }
        sum = warp_sum(sum);
        if (lane == 0) mine[h * (width + 2) + width] = most, mine[h * (width + 2) + width + 1] = sum;
    }
    __syncthreads();

    u32 n_teams = ATTENTION_THREADS / lanes, team = threadIdx.x / lanes, member = threadIdx.x % lanes;
    for (u32 h0 = 0; h0 < group; h0 += HEADS_AT_ONCE) {
        float acc[HEADS_AT_ONCE][8] = {};
        if (member * 8 < width) {
            for (u32 base = from + team; base < to; base += n_teams * AT_ONCE) {
                uint4 packed[AT_ONCE];
#pragma unroll
                for (u32 j = 0; j < AT_ONCE; j++) {
                    u32 p = base + j * n_teams;
                    packed[j] = make_uint4(0, 0, 0, 0);
                    if (p < to) packed[j] = *(const uint4*)(a.values + origin + (u64)p * width + member * 8);
                }
#pragma unroll
                for (u32 j = 0; j < AT_ONCE; j++) {
                    u32 p = base + j * n_teams;
                    float value[8];
                    eight_floats(packed[j], value);
#pragma unroll
                    for (u32 h = 0; h < HEADS_AT_ONCE; h++) {
                        float w = h0 + h < group && p < to ? weights[(h0 + h) * a.split + p - first] : 0.0f;
#pragma unroll
                        for (u32 d = 0; d < 8; d++) acc[h][d] = fmaf(w, value[d], acc[h][d]);
                    }
                }
            }
#pragma unroll
            for (u32 h = 0; h < HEADS_AT_ONCE; h++)
#pragma unroll
                for (u32 d = 0; d < 8; d++) reduced[(team * HEADS_AT_ONCE + h) * width + member * 8 + d] = acc[h][d];
        }
        __syncthreads();
        for (u32 at = threadIdx.x; at < HEADS_AT_ONCE * width; at += ATTENTION_THREADS) {
            u32 h = at / width, d = at % width;
            if (h0 + h >= group) break;
            float sum = 0.0f;
            for (u32 t = 0; t < n_teams; t++) sum += reduced[(t * HEADS_AT_ONCE + h) * width + d];
            mine[(h0 + h) * (width + 2) + d] = sum;
        }
        __syncthreads();
    }

    u32 first_split = oldest / a.split, end_split = position / a.split + 1;
    if (end_split - first_split > 1) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            u32* arrivals = a.arrivals + i * a.n_kv_heads + kv_head;
            is_last = atomicAdd(arrivals, 1u) == end_split - first_split - 1;
            if (is_last) *arrivals = 0;
            __threadfence();
        }
        __syncthreads();
        if (!is_last) return;
    }
    // What each split counts for, where the weights were: there are at most as many splits as positions of one.
    __syncthreads();
    u32 n_parts = end_split - first_split;
    for (u32 h = warp; h < group; h += n_warps) {
        const float* of = part + (u64)(first_split * group + h) * (width + 2) + width;
        u32 stride = group * (width + 2);
        float* factors = weights + h * a.split;
        float most = __int_as_float(0xff800000);
        for (u32 s = lane; s < n_parts; s += 32) most = fmaxf(most, __ldcg(of + (u64)s * stride));
        most = warp_max(most);
        float sum = 0.0f;
        for (u32 s = lane; s < n_parts; s += 32) {
            float factor = __expf(__ldcg(of + (u64)s * stride) - most);
            factors[s] = factor;
            sum = fmaf(factor, __ldcg(of + (u64)s * stride + 1), sum);
        }
        sum = 1.0f / warp_sum(sum);
        for (u32 s = lane; s < n_parts; s += 32) factors[s] *= sum;
    }
    __syncthreads();
    for (u32 at = threadIdx.x; at < ((group * width + 31) & ~31u); at += ATTENTION_THREADS) {
        bool is_there = at < group * width;
        float y = 0.0f;
        if (is_there) {
            u32 h = at / width;
            const float* of = part + (u64)first_split * group * (width + 2) + h * (width + 2) + at % width;
#pragma unroll 8
            for (u32 s = 0; s < n_parts; s++) y = fmaf(weights[h * a.split + s], __ldcg(of + (u64)s * group * (width + 2)), y);
        }
        u32 c = kv_head * group * width + at;
        write_fragment(a.out, a.out_sums, c, a.n, i, is_there, y);
        if (is_there && a.plain) a.plain[(u64)i * a.n_heads * width + c] = y;
    }
}

struct Pick {
    const float* logits;  // [n, vocabulary]
    float* best;          // [n, blocks]
    u32* best_idx;
    u32* arrivals;        // [n], zero between launches
    u32* tokens;          // [n]: what the step reads
    int* positions;       // [n]: where it stands
    int* next_positions;  // [n]
    u32* taken;           // [n]: how many tokens were chosen
    u32* ring;            // [n, ring_length]: the tokens
    u32 vocabulary, capacity, ring_length;
};

__device__ __forceinline__ void keep_larger(float& best, u32& idx, float other, u32 other_idx) {
    // Among equals the first.
    if (other > best || (other == best && other_idx < idx)) best = other, idx = other_idx;
}

// The most likely token of each sequence, which the step then reads at its next position.
extern "C" __global__ void __launch_bounds__(256) pick(const __grid_constant__ Pick a) {
    __shared__ float values[8];
    __shared__ u32 places[8];
    __shared__ bool is_last;
    u32 i = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    let_next_start();
    wait_for_previous();
    const float* logits = a.logits + (u64)i * a.vocabulary;
    float best = __int_as_float(0xff800000);
    u32 idx = 0xffffffffu;
    for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < a.vocabulary; at += gridDim.x * blockDim.x) {
        keep_larger(best, idx, logits[at], at);
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, best, offset);
        keep_larger(best, idx, other, __shfl_xor_sync(0xffffffffu, idx, offset));
    }
    if (lane == 0) values[warp] = best, places[warp] = idx;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 w = 1; w < blockDim.x / 32; w++) keep_larger(best, idx, values[w], places[w]);
        a.best[i * gridDim.x + blockIdx.x] = best, a.best_idx[i * gridDim.x + blockIdx.x] = idx;
        __threadfence();
        is_last = atomicAdd(a.arrivals + i, 1u) == gridDim.x - 1;
        if (is_last) {
            a.arrivals[i] = 0;
            __threadfence();
            for (u32 b = 0; b < gridDim.x; b++) {
                keep_larger(best, idx, __ldcg(a.best + i * gridDim.x + b), __ldcg(a.best_idx + i * gridDim.x + b));
            }
            // Logits that are no numbers choose nothing.
            if (idx >= a.vocabulary) idx = 0;
            int next = a.next_positions[i];
            a.tokens[i] = idx;
            a.positions[i] = next < (int)a.capacity ? next : -1;
            a.next_positions[i] = next + 1;
            a.ring[(u64)i * a.ring_length + a.taken[i] % a.ring_length] = idx;
            a.taken[i] += 1;
        }
    }
}
