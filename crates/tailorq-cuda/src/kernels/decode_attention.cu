// Attention of a step over the cache, with the rotary embedding of the step's own tokens.
//
// A block has a split of the positions for one token and one head of keys. What it reads of the cache does not depend on the
// kernel before it, but for the newest position: it asks for all its keys and values before that kernel has ended, and puts the
// newest ones in their places in shared memory itself. Those of its next split are asked for as soon as there is room. Positions
// are taken by teams of as many lanes as a row has pieces of 16 bytes.

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

// One warp: a head with its norm and its rotation by cosines and sines `[2, head_dim / 2]`; `into` and `newest` are in shared memory
// (`factor` times, and in half precision), `cache` is not. Each may be null.
__device__ void rotated_head(const Attend& a, const float* head, const float* weight, const float* turn, float factor, float* into, u16* newest, u16* cache) {
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
        float cos = turn[d], sin = turn[half + d];
        float first = (x * cos - y * sin) * factor, second = (y * cos + x * sin) * factor;
        if (into) into[d] = first, into[d + half] = second;
        if (newest) newest[d] = saturated_half(first), newest[d + half] = saturated_half(second);
        if (cache) cache[d] = saturated_half(first), cache[d + half] = saturated_half(second);
    }
}

// Where the cache holds a token of a sequence.
__device__ __forceinline__ u64 cached(const Attend& a, u32 sequence, u32 kv_head, u32 position) {
    return (((u64)sequence * a.n_kv_heads + kv_head) * a.capacity + position) * a.head_dim;
}

// One warp: the key of a token to place `at` of the cache, also to `newest` in shared memory unless that is null.
__device__ void store_key(const Attend& a, u32 row, u32 kv_head, const float* turn, u64 at, u16* newest) {
    const float* heads = a.heads + (u64)row * (a.n_heads + 2 * a.n_kv_heads) * a.head_dim;
    rotated_head(a, heads + (u64)(a.n_heads + kv_head) * a.head_dim, a.key_norm, turn, 1.0f, nullptr, newest, a.keys + at);
}

// One warp: the same of its value.
__device__ void store_value(const Attend& a, u32 row, u32 kv_head, u64 at, u16* newest) {
    const float* value = a.heads + ((u64)row * (a.n_heads + 2 * a.n_kv_heads) + a.n_heads + a.n_kv_heads + kv_head) * a.head_dim;
    for (u32 d = threadIdx.x & 31; d < a.head_dim; d += 32) {
        u16 rounded = saturated_half(__ldcg(value + d));
        a.values[at + d] = rounded;
        if (newest) newest[d] = rounded;
    }
}

// The cosines and sines of a position, by `n_threads` threads.
__device__ __forceinline__ void load_turn(const Attend& a, u32 position, u32 thread, u32 n_threads, float* turn) {
    u32 half = a.head_dim / 2;
    for (u32 d = thread; d < 2 * half; d += n_threads) turn[d] = d < half ? __ldg(a.cos + (u64)position * half + d) : __ldg(a.sin + (u64)position * half + d - half);
}

// Tokens of one sequence see each other: their keys are stored before any of them attends. Two warps a head.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS) store(const __grid_constant__ Attend a) {
    extern __shared__ __align__(16) float turns[];  // [warps, 2, head_dim / 2]
    begin_early();
    wait_for_previous();
    float* turn = turns + (threadIdx.x >> 5) * a.head_dim;
    for (u32 item = working_idx() / 32; item < 2 * a.n_kv_heads * a.n; item += gridDim.x * (BLOCK_THREADS / 32)) {
        u32 kv_head = item / 2 % a.n_kv_heads, i = item / 2 / a.n_kv_heads;
        int position = a.positions[i];
        if (position < 0) continue;
        u64 at = cached(a, __ldcg(a.sequences + i), kv_head, position);
        __syncwarp();
        load_turn(a, position, threadIdx.x & 31, 32, turn);
        __syncwarp();
        if (item & 1) store_value(a, i, kv_head, at, nullptr);
        else store_key(a, i, kv_head, turn, at, nullptr);
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

// A split of the positions for one token and one head of keys; the same for all threads of a block.
struct Work {
    u32 kv_head, i, split;
    u32 position, oldest, first;  // newest and oldest position of the token, first of the split
    u32 from, to, loaded;         // what there is of the split, and of it the end of what the cache has
    u64 origin;                   // of the head's rows in the cache
};

// The most tokens of a step.
#define MOST_TOKENS 8

// Where the tokens of the step stand.
struct Tokens {
    int positions[MOST_TOKENS];
    u32 sequences[MOST_TOKENS];
};

// Splits come last, so that those of short sequences, which have nothing to do, are not between others.
__device__ __forceinline__ Work make_work(const Attend& a, const Tokens& tokens, u32 item) {
    Work w;
    w.kv_head = item % a.n_kv_heads, item /= a.n_kv_heads;
    w.i = item % a.n, w.split = item / a.n;
    int place = tokens.positions[w.i];
    w.position = place < 0 ? 0 : place, w.oldest = a.window && w.position + 1 > a.window ? w.position + 1 - a.window : 0;
    w.first = w.split * a.split;
    w.to = place < 0 ? 0 : min(w.position + 1, w.first + a.split), w.from = max(w.first, w.oldest);
    w.loaded = a.stores && w.to == w.position + 1 ? w.to - 1 : w.to;
    w.origin = cached(a, tokens.sequences[w.i], w.kv_head, 0);
    return w;
}

// Which positions a lane's team takes at a time: `AT_ONCE`, `stride` apart.
struct Team {
    u32 width, lanes, piece, number, stride;
    bool has_piece;
};

__device__ __forceinline__ Team make_team(const Attend& a) {
    Team t = {a.head_dim, 2, 0, 0, 0, false};
    while (t.lanes * 8 < t.width) t.lanes *= 2;
    t.piece = threadIdx.x % t.lanes, t.number = threadIdx.x / t.lanes, t.stride = ATTENTION_THREADS / t.lanes;
    t.has_piece = t.piece * 8 < t.width;
    return t;
}

// What a block holds in shared memory: rows of the split's positions, and what becomes of them.
struct Rooms {
    u16* keys;       // [split, head_dim]
    u16* values;
    float* queries;  // [group, head_dim]
    float* reduced;  // [warps, HEADS_AT_ONCE, head_dim]
    float* weights;  // [group, split]: products of queries and keys
    float* most;     // [warps, group]: the largest weight, and the sum of what their exponentials count for
    float* sums;
    float* turn;     // [2, head_dim / 2]
    u32 barriers;    // of keys and of values
};

__device__ __forceinline__ Rooms make_rooms(const Attend& a, u8* shared, u64* barriers) {
    u32 group = a.n_heads / a.n_kv_heads, rows = a.split * a.head_dim;
    Rooms r;
    r.keys = (u16*)shared, r.values = r.keys + rows;
    r.queries = (float*)(r.values + rows), r.reduced = r.queries + group * a.head_dim;
    r.weights = r.reduced + ATTENTION_WARPS * HEADS_AT_ONCE * a.head_dim;
    r.most = r.weights + group * a.split, r.sums = r.most + ATTENTION_WARPS * group, r.turn = r.sums + ATTENTION_WARPS * group;
    r.barriers = (u32)__cvta_generic_to_shared(barriers);
    return r;
}

// The first warp: asks for the rows that the cache has of a split.
__device__ __forceinline__ void fetch_rows(const Attend& a, const Work& w, const u16* cache, u16* to, u32 barrier) {
    if (w.from >= w.loaded || threadIdx.x >= 32) return;
    u32 at = (w.from - w.first) * a.head_dim, bytes = (w.loaded - w.from) * a.head_dim * 2;
    fill_stage((u32)__cvta_generic_to_shared(to + at), (const u8*)(cache + w.origin + (u64)w.from * a.head_dim), bytes, barrier, threadIdx.x);
}

// The team's pieces of some rows of a split, from position `base` on.
__device__ __forceinline__ void load_rows(const Work& w, const Team& t, const u16* rows, u32 base, uint4* packed) {
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; j++) {
        u32 p = base + j * t.stride + t.number;
        packed[j] = make_uint4(0, 0, 0, 0);
        if (p < w.to && t.has_piece) packed[j] = *(const uint4*)(rows + (p - w.first) * t.width + t.piece * 8);
    }
}

// Products of queries and keys, and the largest of each warp.
__device__ __forceinline__ void score(const Attend& a, const Work& w, const Team& t, const Rooms& rooms, u32 group) {
#pragma unroll 1
    for (u32 base = w.from; base < w.to; base += AT_ONCE * t.stride) {
        uint4 packed[AT_ONCE];
        load_rows(w, t, rooms.keys, base, packed);
#pragma unroll 1
        for (u32 h = 0; h < group; h++) {
            float4 low = make_float4(0.0f, 0.0f, 0.0f, 0.0f), high = low;
            const float4* q = (const float4*)(rooms.queries + h * t.width + t.piece * 8);
            if (t.has_piece) low = q[0], high = q[1];
            float dots[AT_ONCE];
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) {
                float key[8];
                eight_floats(packed[j], key);
                float dot = low.x * key[0];
                dot = fmaf(low.y, key[1], dot), dot = fmaf(low.z, key[2], dot), dot = fmaf(low.w, key[3], dot);
                dot = fmaf(high.x, key[4], dot), dot = fmaf(high.y, key[5], dot), dot = fmaf(high.z, key[6], dot);
                dots[j] = fmaf(high.w, key[7], dot);
            }
#pragma unroll 1
            for (u32 offset = t.lanes / 2; offset > 0; offset >>= 1) {
#pragma unroll
                for (u32 j = 0; j < AT_ONCE; j++) dots[j] += __shfl_xor_sync(0xffffffffu, dots[j], offset);
            }
            float largest = __int_as_float(0xff800000);
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) {
                u32 p = base + j * t.stride + t.number;
                if (p >= w.to) continue;
                largest = fmaxf(largest, dots[j]);
                if (t.piece == 0) rooms.weights[h * a.split + p - w.first] = dots[j];
            }
            for (u32 offset = t.lanes; offset < 32; offset *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
            float* most = rooms.most + (threadIdx.x >> 5) * group + h;
            if ((threadIdx.x & 31) == 0) *most = base == w.from ? largest : fmaxf(*most, largest);
        }
    }
}

// The largest weight of a head.
__device__ __forceinline__ float most_of(const Rooms& rooms, u32 group, u32 h) {
    float most = rooms.most[h];
#pragma unroll
    for (u32 w = 1; w < ATTENTION_WARPS; w++) most = fmaxf(most, rooms.most[w * group + h]);
    return most;
}

// The sum of a head's exponentials.
__device__ __forceinline__ float sum_of(const Rooms& rooms, u32 group, u32 h) {
    float sum = 0.0f;
#pragma unroll
    for (u32 w = 0; w < ATTENTION_WARPS; w++) sum += rooms.sums[w * group + h];
    return sum;
}

// Sums of values by the exponentials of their weights relative to the largest, for a few heads from `h0` on.
__device__ __forceinline__ void mix(const Attend& a, const Work& w, const Team& t, const Rooms& rooms, u32 group, u32 h0) {
    float acc[HEADS_AT_ONCE][8] = {}, most[HEADS_AT_ONCE], sums[HEADS_AT_ONCE] = {};
#pragma unroll
    for (u32 h = 0; h < HEADS_AT_ONCE; h++) most[h] = h0 + h < group ? most_of(rooms, group, h0 + h) : 0.0f;
#pragma unroll 1
    for (u32 base = w.from; base < w.to; base += AT_ONCE * t.stride) {
        uint4 packed[AT_ONCE];
        load_rows(w, t, rooms.values, base, packed);
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            u32 p = base + j * t.stride + t.number;
            float value[8];
            eight_floats(packed[j], value);
#pragma unroll
            for (u32 h = 0; h < HEADS_AT_ONCE; h++) {
                if (h0 + h >= group) continue;
                float weight = p < w.to ? __expf(rooms.weights[(h0 + h) * a.split + p - w.first] - most[h]) : 0.0f;
                sums[h] += weight;
#pragma unroll
                for (u32 d = 0; d < 8; d++) acc[h][d] = fmaf(weight, value[d], acc[h][d]);
            }
        }
    }
#pragma unroll
    for (u32 h = 0; h < HEADS_AT_ONCE; h++) {
        if (h0 + h >= group) continue;
#pragma unroll 1
        for (u32 offset = t.lanes; offset < 32; offset *= 2) {
            sums[h] += __shfl_xor_sync(0xffffffffu, sums[h], offset);
#pragma unroll
            for (u32 d = 0; d < 8; d++) acc[h][d] += __shfl_xor_sync(0xffffffffu, acc[h][d], offset);
        }
        if ((threadIdx.x & 31) == 0) rooms.sums[(threadIdx.x >> 5) * group + h0 + h] = sums[h];
        if ((threadIdx.x & 31) < t.lanes && t.has_piece) {
            float4* to = (float4*)(rooms.reduced + ((threadIdx.x >> 5) * HEADS_AT_ONCE + h) * t.width + t.piece * 8);
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

// A part of the sum over positions, which a split leaves: for each head its numbers, the largest weight, the sum of weights.
__device__ __forceinline__ float* part_of(const Attend& a, const Work& w, u32 split) {
    u32 group = a.n_heads / a.n_kv_heads;
    return a.parts + ((u64)(w.i * a.n_kv_heads + w.kv_head) * a.n_splits + split) * group * (a.head_dim + 2);
}

// What each part counts for takes the place of its largest weight.
__device__ __forceinline__ void weigh_parts(const Attend& a, float* part, u32 group, u32 n_parts) {
    u32 lane = threadIdx.x & 31, stride = group * (a.head_dim + 2);
    for (u32 h = threadIdx.x >> 5; h < group; h += ATTENTION_WARPS) {
        float* of = part + (u64)h * (a.head_dim + 2) + a.head_dim;
        float most = __int_as_float(0xff800000), sum = 0.0f;
        for (u32 s = lane; s < n_parts; s += 32) most = fmaxf(most, __ldcg(of + (u64)s * stride));
        most = warp_max(most);
        for (u32 s = lane; s < n_parts; s += 32) {
            float factor = __expf(__ldcg(of + (u64)s * stride) - most);
            of[(u64)s * stride] = factor;
            sum = fmaf(factor, __ldcg(of + (u64)s * stride + 1), sum);
        }
        sum = 1.0f / warp_sum(sum);
        for (u32 s = lane; s < n_parts; s += 32) of[(u64)s * stride] *= sum;
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

// The last block of a token and head: adds the parts up in the order of positions.
__device__ __forceinline__ void add_parts(const Attend& a, const Work& w, u32 group, u32 first_split, u32 n_parts) {
    float* part = part_of(a, w, first_split);
    weigh_parts(a, part, group, n_parts);
    __syncthreads();
    const u32 width = a.head_dim;
    for (u32 at = threadIdx.x; at < ((group * width + 31) & ~31u); at += ATTENTION_THREADS) {
        bool is_there = at < group * width;
        float y = 0.0f;
        if (is_there) {
            const float* of = part + at / width * (width + 2);
#pragma unroll 4
            for (u32 s = 0; s < n_parts; s++) {
                const float* one = of + (u64)s * group * (width + 2);
                y = fmaf(one[width], __ldcg(one + at % width), y);
            }
        }
        u32 c = w.kv_head * group * width + at;
        write_fragment(a.out, a.out_sums, c, a.n, w.i, is_there, y);
        if (is_there && a.plain) a.plain[(u64)w.i * a.n_heads * width + c] = y;
    }
}

// Queries of the token, and its key and value where they are of this split.
__device__ __forceinline__ void rotate_token(const Attend& a, const Work& w, const Rooms& rooms, u32 group) {
    const u32 width = a.head_dim, warp = threadIdx.x >> 5;
    const float* heads = a.heads + ((u64)w.i * (a.n_heads + 2 * a.n_kv_heads) + w.kv_head * group) * width;
    for (u32 h = warp; h < group; h += ATTENTION_WARPS) {
        rotated_head(a, heads + (u64)h * width, a.query_norm, rooms.turn, a.scale, rooms.queries + h * width, nullptr, nullptr);
    }
    if (w.loaded == w.to) return;
    u32 row = (w.position - w.first) * width;
    u64 at = w.origin + (u64)w.position * width;
    if (warp == ATTENTION_WARPS - 1) store_key(a, w.i, w.kv_head, rooms.turn, at, rooms.keys + row);
    if (warp == ATTENTION_WARPS - 2) store_value(a, w.i, w.kv_head, at, rooms.values + row);
    // Later copies to these places come after.
    before_copies();
}

// The heads from `h0` on as they come out of `mix`: to their place, or as a part.
__device__ __forceinline__ void write_heads(const Attend& a, const Work& w, const Rooms& rooms, u32 group, u32 h0, bool is_part) {
    const u32 width = a.head_dim, n_numbers = min(group - h0, (u32)HEADS_AT_ONCE) * width;
    float* mine = part_of(a, w, w.split);
    for (u32 at = threadIdx.x; at < ((n_numbers + 31) & ~31u); at += ATTENTION_THREADS) {
        bool is_there = at < n_numbers;
        u32 h = is_there ? at / width : 0, d = is_there ? at % width : 0;
        float y = reduced_number(a, rooms.reduced, h, d);
        if (is_part) {
            if (is_there) mine[(h0 + h) * (width + 2) + d] = y;
            continue;
        }
        u32 c = (w.kv_head * group + h0) * width + at;
        y *= 1.0f / sum_of(rooms, group, h0 + h);
        write_fragment(a.out, a.out_sums, c, a.n, w.i, is_there, y);
        if (is_there && a.plain) a.plain[(u64)w.i * a.n_heads * width + c] = y;
    }
}

// The block's attention over a split, whose keys and values were asked for; then those of `next` are. A split that is not alone
// leaves its part of the sum; the last one to be done adds them up. `parity` is that of the barriers.
__device__ __forceinline__ void attend_to(const Attend& a, const Work& w, const Work& next, const Team& team, const Rooms& rooms, u32 parity) {
    const u32 width = a.head_dim, group = a.n_heads / a.n_kv_heads;
    const bool waits = w.from < w.loaded;
    rotate_token(a, w, rooms, group);
    __syncthreads();
    if (waits) wait_for_stage(rooms.barriers, parity);
    score(a, w, team, rooms, group);
    __syncthreads();
    fetch_rows(a, next, a.keys, rooms.keys, rooms.barriers);
    if (waits) wait_for_stage(rooms.barriers + 8, parity);
    const u32 first_split = w.oldest / a.split, n_parts = w.position / a.split + 1 - first_split;
    for (u32 h0 = 0; h0 < group; h0 += HEADS_AT_ONCE) {
        mix(a, w, team, rooms, group, h0);
        __syncthreads();
        if (h0 + HEADS_AT_ONCE >= group) fetch_rows(a, next, a.values, rooms.values, rooms.barriers + 8);
        write_heads(a, w, rooms, group, h0, n_parts > 1);
        __syncthreads();
    }
    if (n_parts == 1) return;
    float* mine = part_of(a, w, w.split);
    for (u32 h = threadIdx.x; h < group; h += ATTENTION_THREADS) {
        mine[h * (width + 2) + width] = most_of(rooms, group, h), mine[h * (width + 2) + width + 1] = sum_of(rooms, group, h);
    }
    if (is_last_of(a.arrivals + w.i * a.n_kv_heads + w.kv_head, n_parts)) add_parts(a, w, group, first_split, n_parts);
}

// Splits of the positions, tokens and heads of keys are dealt out to the blocks.
__device__ __forceinline__ void run_attend(const Attend& a) {
    extern __shared__ __align__(128) u8 shared_rows[];
    __shared__ u64 barriers[2];
    __shared__ Tokens tokens;
    const u32 n_items = a.n_kv_heads * a.n * a.n_splits;
    const Team team = make_team(a);
    const Rooms rooms = make_rooms(a, shared_rows, barriers);
    begin_early();
    if (threadIdx.x == 0) make_barriers(rooms.barriers, 2);
    if (threadIdx.x < a.n) tokens.positions[threadIdx.x] = __ldcg(a.positions + threadIdx.x), tokens.sequences[threadIdx.x] = __ldcg(a.sequences + threadIdx.x);
    __syncthreads();
    // What others store is there once they have ended.
    if (!a.stores) wait_for_previous();
    Work none = {}, w = none;
    if (blockIdx.x < n_items) w = make_work(a, tokens, blockIdx.x);
    fetch_rows(a, w, a.keys, rooms.keys, rooms.barriers);
    fetch_rows(a, w, a.values, rooms.values, rooms.barriers + 8);
    u32 parity = 0;
    bool has_waited = !a.stores;
#pragma unroll 1
    for (u32 item = blockIdx.x; item < n_items; item += gridDim.x) {
        Work next = item + gridDim.x < n_items ? make_work(a, tokens, item + gridDim.x) : none;
        load_turn(a, w.position, threadIdx.x, ATTENTION_THREADS, rooms.turn);
        __syncthreads();
        if (!has_waited) wait_for_previous();
        has_waited = true;
        if (w.from < w.to) {
            attend_to(a, w, next, team, rooms, parity);
        } else {
            fetch_rows(a, next, a.keys, rooms.keys, rooms.barriers);
            fetch_rows(a, next, a.values, rooms.values, rooms.barriers + 8);
        }
        if (w.from < w.loaded) parity ^= 1;
        w = next;
        __syncthreads();
    }
    // Also a block without work does not end before the kernels in front of this one have.
    wait_for_previous();
}
STEP_KERNEL(attend, Attend, run_attend)
