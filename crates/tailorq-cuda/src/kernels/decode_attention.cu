// Attention of a step over the cache, with the rotary embedding of the step's own tokens.
//
// A block has a split of the positions for one token and one head of keys. What it reads of the cache does not depend on the
// kernel before it, but for the newest position: it begins to read before that kernel has ended, and keeps the newest key and
// value in shared memory. Positions are taken by teams of as many lanes as a row has pieces of 16 bytes.

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
    u32 n_heads, n_kv_heads, head_dim, capacity, window, split, n_splits, n;
    u32 stores;              // whether this kernel stores the tokens' keys and values; else an earlier one did
};

// One warp: a head with its norm and its rotation; `into` and `newest` are in shared memory (`factor` times, and in half
// precision), `cache` is not. Each may be null.
__device__ void rotated_head(const Attend& a, const float* head, const float* weight, u32 position, float factor, float* into, u16* newest, u16* cache) {
    u32 lane = threadIdx.x & 31, half = a.head_dim / 2;
    float scale = 1.0f;
    if (weight) {
        float sum = 0.0f;
        for (u32 d = lane; d < a.head_dim; d += 32) {
            float x = __ldcg(head + d);
            sum = fmaf(x, x, sum);
        }
        scale = rsqrtf(warp_sum(sum) / (float)a.head_dim + a.eps);
    }
#pragma unroll 2
    for (u32 d = lane; d < half; d += 32) {
        float x = __ldcg(head + d) * scale, y = __ldcg(head + d + half) * scale;
        if (weight) x *= weight[d], y *= weight[d + half];
        float cos = a.cos[(u64)position * half + d], sin = a.sin[(u64)position * half + d];
        float first = (x * cos - y * sin) * factor, second = (y * cos + x * sin) * factor;
        if (into) into[d] = first, into[d + half] = second;
        if (newest) newest[d] = saturated_half(first), newest[d + half] = saturated_half(second);
        if (cache) cache[d] = saturated_half(first), cache[d + half] = saturated_half(second);
    }
}

// Where the cache holds a token of row `row` of the step.
__device__ __forceinline__ u64 cached(const Attend& a, u32 row, u32 kv_head, u32 position) {
    return (((u64)__ldcg(a.sequences + row) * a.n_kv_heads + kv_head) * a.capacity + position) * a.head_dim;
}

// One warp: the key of a token, also to `newest` in shared memory unless that is null.
__device__ void store_key(const Attend& a, u32 row, u32 kv_head, u32 position, u16* newest) {
    const float* heads = a.heads + (u64)row * (a.n_heads + 2 * a.n_kv_heads) * a.head_dim;
    u16* cache = a.keys + cached(a, row, kv_head, position);
    rotated_head(a, heads + (u64)(a.n_heads + kv_head) * a.head_dim, a.key_norm, position, 1.0f, nullptr, newest, cache);
}

// One warp: the same of its value.
__device__ void store_value(const Attend& a, u32 row, u32 kv_head, u32 position, u16* newest) {
    const float* value = a.heads + ((u64)row * (a.n_heads + 2 * a.n_kv_heads) + a.n_heads + a.n_kv_heads + kv_head) * a.head_dim;
    u16* cache = a.values + cached(a, row, kv_head, position);
    for (u32 d = threadIdx.x & 31; d < a.head_dim; d += 32) {
        u16 rounded = saturated_half(__ldcg(value + d));
        cache[d] = rounded;
        if (newest) newest[d] = rounded;
    }
}

// Tokens of one sequence see each other: their keys are stored before any of them attends. Two warps a head.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS) store(const __grid_constant__ Attend a) {
    begin_early();
    wait_for_previous();
    for (u32 item = global_idx() / 32; item < 2 * a.n_kv_heads * a.n; item += gridDim.x * (BLOCK_THREADS / 32)) {
        u32 kv_head = item / 2 % a.n_kv_heads, i = item / 2 / a.n_kv_heads;
        int position = a.positions[i];
        if (position < 0) continue;
        if (item & 1) store_value(a, i, kv_head, position, nullptr);
        else store_key(a, i, kv_head, position, nullptr);
    }
}

__device__ __forceinline__ void eight_floats(uint4 v, float* x) {
    x[0] = half_to_float((u16)v.x), x[1] = half_to_float((u16)(v.x >> 16));
    x[2] = half_to_float((u16)v.y), x[3] = half_to_float((u16)(v.y >> 16));
    x[4] = half_to_float((u16)v.z), x[5] = half_to_float((u16)(v.z >> 16));
    x[6] = half_to_float((u16)v.w), x[7] = half_to_float((u16)(v.w >> 16));
}

#define ATTENTION_THREADS BLOCK_THREADS
#define ATTENTION_WARPS (ATTENTION_THREADS / 32)
#define HEADS_AT_ONCE 2
#define AT_ONCE 4

// The positions of a block, and which of them a lane's team takes at a time: `AT_ONCE`, `stride` apart.
struct Span {
    u32 from, to;
    u32 newest;  // the position that lies in shared memory, `~0u`: none
    u32 width, lanes, piece, team, stride;
};

__device__ __forceinline__ Span make_span(const Attend& a, u32 from, u32 to, u32 newest) {
    Span s = {from, to, newest, a.head_dim, 2, 0, 0, 0};
    while (s.lanes * 8 < s.width) s.lanes *= 2;
    s.piece = threadIdx.x % s.lanes, s.team = threadIdx.x / s.lanes, s.stride = ATTENTION_THREADS / s.lanes;
    return s;
}

// The lane's pieces of rows of the cache from `base` on; the newest one is left out.
__device__ __forceinline__ void load_rows(const Span& s, const u16* rows, u32 base, uint4* packed) {
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
        u32 p = base + j * s.stride + s.team;
        packed[j] = make_uint4(0, 0, 0, 0);
        if (p < s.to && p != s.newest && s.piece * 8 < s.width) packed[j] = *(const uint4*)(rows + (u64)p * s.width + s.piece * 8);
    }
}

// Puts the newest row, if it is among them, in its place.
__device__ __forceinline__ void add_newest(const Span& s, const u16* newest, u32 base, uint4* packed) {
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
        if (base + j * s.stride + s.team == s.newest && s.piece * 8 < s.width) packed[j] = *(const uint4*)(newest + s.piece * 8);
    }
}

// Products of queries and keys: `weights` is [group, split].
__device__ __forceinline__ void score(const Attend& a, const Span& s, u32 group, u32 first, const u16* keys, const u16* newest,
                                      const float* queries, float* weights, uint4* packed) {
    for (u32 base = s.from; base < s.to; base += AT_ONCE * s.stride) {
        if (base != s.from) load_rows(s, keys, base, packed);
        add_newest(s, newest, base, packed);
        for (u32 h = 0; h < group; h++) {
            float q[8] = {};
            if (s.piece * 8 < s.width) {
#pragma unroll
                for (u32 d = 0; d < 8; d++) q[d] = queries[h * s.width + s.piece * 8 + d];
            }
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) {
                float key[8], dot = 0.0f;
                eight_floats(packed[j], key);
#pragma unroll
                for (u32 d = 0; d < 8; d++) dot = fmaf(q[d], key[d], dot);
                for (u32 offset = s.lanes / 2; offset > 0; offset >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
                u32 p = base + j * s.stride + s.team;
                if (s.piece == 0 && p < s.to) weights[h * a.split + p - first] = dot;
            }
        }
    }
}

// Weights become exponentials relative to the largest; `most` and `sum` of each head.
__device__ __forceinline__ void exponentials(const Attend& a, const Span& s, u32 group, u32 first, float* weights, float* most, float* sums) {
    u32 lane = threadIdx.x & 31;
    for (u32 h = threadIdx.x >> 5; h < group; h += ATTENTION_WARPS) {
        float* w = weights + h * a.split;
        float largest = __int_as_float(0xff800000), sum = 0.0f;
        for (u32 p = s.from + lane; p < s.to; p += 32) largest = fmaxf(largest, w[p - first]);
        largest = warp_max(largest);
        for (u32 p = s.from + lane; p < s.to; p += 32) {
            float e = __expf(w[p - first] - largest);
            w[p - first] = e;
            sum += e;
        }
        sum = warp_sum(sum);
        if (lane == 0) most[h] = largest, sums[h] = sum;
    }
}

// Sums of values by their weights, for a few heads from `h0` on: `reduced` is [warps, heads, head_dim].
__device__ __forceinline__ void mix(const Attend& a, const Span& s, u32 group, u32 h0, u32 first, const u16* values, const u16* newest,
                                    const float* weights, float* reduced, uint4* packed, bool is_loaded) {
    float acc[HEADS_AT_ONCE][8] = {};
    for (u32 base = s.from; base < s.to; base += AT_ONCE * s.stride) {
        if (base != s.from || !is_loaded) load_rows(s, values, base, packed);
        add_newest(s, newest, base, packed);
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            u32 p = base + j * s.stride + s.team;
            float value[8];
            eight_floats(packed[j], value);
#pragma unroll
            for (u32 h = 0; h < HEADS_AT_ONCE; h++) {
                if (h0 + h >= group) continue;
                float w = p < s.to ? weights[(h0 + h) * a.split + p - first] : 0.0f;
#pragma unroll
                for (u32 d = 0; d < 8; d++) acc[h][d] = fmaf(w, value[d], acc[h][d]);
            }
        }
    }
#pragma unroll
    for (u32 h = 0; h < HEADS_AT_ONCE; h++) {
        if (h0 + h >= group) continue;
#pragma unroll
        for (u32 d = 0; d < 8; d++) {
            for (u32 offset = s.lanes; offset < 32; offset *= 2) acc[h][d] += __shfl_xor_sync(0xffffffffu, acc[h][d], offset);
        }
        if ((threadIdx.x & 31) < s.lanes && s.piece * 8 < s.width) {
            float4* to = (float4*)(reduced + ((threadIdx.x >> 5) * HEADS_AT_ONCE + h) * s.width + s.piece * 8);
            to[0] = make_float4(acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
            to[1] = make_float4(acc[h][4], acc[h][5], acc[h][6], acc[h][7]);
        }
    }
}

// One number of what `mix` left.
__device__ __forceinline__ float reduced_number(const Attend& a, const float* reduced, u32 h, u32 d) {
    float sum = 0.0f;
#pragma unroll
    for (u32 w = 0; w < ATTENTION_WARPS; w++) sum += reduced[(w * HEADS_AT_ONCE + h) * a.head_dim + d];
    return sum;
}

// What each split counts for: `factors` is [group, split], and there are at most as many splits as positions of one.
__device__ __forceinline__ void weigh_parts(const Attend& a, const float* part, u32 group, u32 n_parts, float* factors) {
    u32 lane = threadIdx.x & 31, stride = group * (a.head_dim + 2);
    for (u32 h = threadIdx.x >> 5; h < group; h += ATTENTION_WARPS) {
        const float* of = part + (u64)h * (a.head_dim + 2) + a.head_dim;
        float most = __int_as_float(0xff800000), sum = 0.0f;
        for (u32 s = lane; s < n_parts; s += 32) most = fmaxf(most, __ldcg(of + (u64)s * stride));
        most = warp_max(most);
        for (u32 s = lane; s < n_parts; s += 32) {
            float factor = __expf(__ldcg(of + (u64)s * stride) - most);
            factors[h * a.split + s] = factor;
            sum = fmaf(factor, __ldcg(of + (u64)s * stride + 1), sum);
        }
        sum = 1.0f / warp_sum(sum);
        for (u32 s = lane; s < n_parts; s += 32) factors[h * a.split + s] *= sum;
    }
}

// Whether this block is the last one of its token and head that is done.
__device__ __forceinline__ bool is_last_of(u32* arrivals, u32 n) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(arrivals, 1u) == n - 1;
        if (is_last) *arrivals = 0;
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

// A split of the positions for one token and one head of keys; the same for all threads of a block.
struct Work {
    u32 kv_head, i, split;
    u32 position, oldest, first;  // newest and oldest position of the token, first of the split
    u32 from, to;                 // what there is of the split
    bool has_newest;
    u64 origin;                   // of the head's rows in the cache
};

// Splits come last, so that those of short sequences, which have nothing to do, are not between others.
__device__ __forceinline__ Work make_work(const Attend& a, u32 item) {
    Work w;
    w.kv_head = item % a.n_kv_heads, item /= a.n_kv_heads;
    w.i = item % a.n, w.split = item / a.n;
    int place = __ldcg(a.positions + w.i);
    w.position = place < 0 ? 0 : place, w.oldest = a.window && w.position + 1 > a.window ? w.position + 1 - a.window : 0;
    w.first = w.split * a.split;
    u32 to = place < 0 ? 0 : min(w.position + 1, w.first + a.split);
    w.has_newest = a.stores && to == w.position + 1;
    w.from = max(w.first, w.oldest), w.to = to;
    w.origin = cached(a, w.i, w.kv_head, 0);
    return w;
}

// The block's attention over a split, whose first keys are in `packed`. A split that is not alone leaves its part of the sum; the
// last one to be done adds them up in the order of positions.
__device__ __forceinline__ void attend_to(const Attend& a, const Work& w, const Span& span, uint4* packed, float* shared) {
    const u32 kv_head = w.kv_head, i = w.i, position = w.position, first = w.first, width = a.head_dim, group = a.n_heads / a.n_kv_heads;
    const u32 warp = threadIdx.x >> 5;
    float* queries = shared;                     // [group, width]
    float* reduced = queries + group * width;    // [warps, HEADS_AT_ONCE, width]
    float* weights = reduced + ATTENTION_WARPS * HEADS_AT_ONCE * width;  // [group, split]
    float* most = weights + group * a.split;     // [group]
    float* sums = most + group;
    u16* newest_key = (u16*)(reduced + (ATTENTION_WARPS * HEADS_AT_ONCE - 1) * width);  // until `mix` writes there
    u16* newest_value = (u16*)(sums + group + (group & 1) * 2);
    const float* heads = a.heads + (u64)i * (a.n_heads + 2 * a.n_kv_heads) * width;
    for (u32 h = warp; h < group; h += ATTENTION_WARPS) {
        rotated_head(a, heads + (u64)(kv_head * group + h) * width, a.query_norm, position, a.scale, queries + h * width, nullptr, nullptr);
    }
    if (w.has_newest && warp == ATTENTION_WARPS - 1) store_key(a, i, kv_head, position, newest_key);
    if (w.has_newest && warp == ATTENTION_WARPS - 2) store_value(a, i, kv_head, position, newest_value);
    __syncthreads();
    score(a, span, group, first, a.keys + w.origin, newest_key, queries, weights, packed);
    load_rows(span, a.values + w.origin, span.from, packed);
    __syncthreads();
    exponentials(a, span, group, first, weights, most, sums);
    __syncthreads();

    u32 first_split = w.oldest / a.split, n_parts = position / a.split + 1 - first_split;
    float* part = a.parts + ((u64)(i * a.n_kv_heads + kv_head) * a.n_splits) * group * (width + 2);
    float* mine = part + (u64)w.split * group * (width + 2);
    part += (u64)first_split * group * (width + 2);
    for (u32 h0 = 0; h0 < group; h0 += HEADS_AT_ONCE) {
        mix(a, span, group, h0, first, a.values + w.origin, newest_value, weights, reduced, packed, h0 == 0);
        __syncthreads();
        u32 n_numbers = min(group - h0, (u32)HEADS_AT_ONCE) * width;
        for (u32 at = threadIdx.x; at < ((n_numbers + 31) & ~31u); at += ATTENTION_THREADS) {
            bool is_there = at < n_numbers;
            u32 h = is_there ? at / width : 0, d = is_there ? at % width : 0;
            float y = reduced_number(a, reduced, h, d);
            if (n_parts > 1) {
                if (is_there) mine[(h0 + h) * (width + 2) + d] = y;
                continue;
            }
            u32 c = (kv_head * group + h0) * width + at;
            y *= 1.0f / sums[h0 + h];
            write_fragment(a.out, a.out_sums, c, a.n, i, is_there, y);
            if (is_there && a.plain) a.plain[(u64)i * a.n_heads * width + c] = y;
        }
        __syncthreads();
    }
    if (n_parts == 1) return;
    for (u32 h = threadIdx.x; h < group; h += ATTENTION_THREADS) mine[h * (width + 2) + width] = most[h], mine[h * (width + 2) + width + 1] = sums[h];
    if (!is_last_of(a.arrivals + i * a.n_kv_heads + kv_head, n_parts)) return;
    weigh_parts(a, part, group, n_parts, weights);
    __syncthreads();
    for (u32 at = threadIdx.x; at < ((group * width + 31) & ~31u); at += ATTENTION_THREADS) {
        bool is_there = at < group * width;
        float y = 0.0f;
        if (is_there) {
            u32 h = at / width;
            const float* of = part + h * (width + 2) + at % width;
#pragma unroll 8
            for (u32 s = 0; s < n_parts; s++) y = fmaf(weights[h * a.split + s], __ldcg(of + (u64)s * group * (width + 2)), y);
        }
        u32 c = kv_head * group * width + at;
        write_fragment(a.out, a.out_sums, c, a.n, i, is_there, y);
        if (is_there && a.plain) a.plain[(u64)i * a.n_heads * width + c] = y;
    }
}

// Splits of the positions, tokens and heads of keys are dealt out to the blocks.
__device__ __forceinline__ void run_attend(const Attend& a) {
    extern __shared__ __align__(16) float shared[];
    __shared__ Work shared_work;
    const u32 n_items = a.n_kv_heads * a.n * a.n_splits;
    begin_early();
#pragma unroll 1
    for (u32 item = blockIdx.x; item < n_items; item += gridDim.x) {
        // All have read what the one before left.
        __syncthreads();
        if (threadIdx.x == 0) shared_work = make_work(a, item);
        __syncthreads();
        const Work& w = shared_work;
        Span span = make_span(a, w.from, w.to, w.has_newest ? w.position : ~0u);
        uint4 packed[AT_ONCE];
        // What others store is there once they have ended.
        bool is_first = item == blockIdx.x;
        if (is_first && !a.stores) wait_for_previous();
        load_rows(span, a.keys + w.origin, span.from, packed);
        if (is_first && a.stores) wait_for_previous();
        if (span.from < span.to) attend_to(a, w, span, packed, shared);
    }
    // Also a block without work does not end before the kernels in front of this one have.
    wait_for_previous();
}
STEP_KERNEL(attend, Attend, run_attend)
