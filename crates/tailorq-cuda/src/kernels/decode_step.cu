// What lies between the matrices of a step beside attention: embedding, norms, rotations of inputs, the choice of a token.

struct Embed {
    const u16* embedding;  // [vocabulary, width] in half precision
    const u32* tokens;     // [n]
    float* stream;         // [n, width]
    u32 width, n;
};

// The stream begins with the embeddings of the tokens.
__device__ __forceinline__ void run_embed(const Embed& a) {
    wait_for_previous();
    begin_early();
    for (u32 at = working_idx(); at < a.n * a.width; at += gridDim.x * BLOCK_THREADS) {
        a.stream[at] = half_to_float(a.embedding[(u64)a.tokens[at / a.width] * a.width + at % a.width]);
    }
}
STEP_KERNEL(embed, Embed, run_embed)

struct Norm {
    const float* stream;  // [n, width]
    const float* weight;  // [width]
    u16* out;
    float* out_sums;
    float* plain;         // [n, width] or null
    float eps;
    u32 width, n;
};

// A block a token: RMS norm of the stream.
__device__ __forceinline__ void run_rms_norm(const Norm& a) {
    __shared__ float partial[32];
    NormItems weights;
    weights.load(a.weight, a.width, 0);
    wait_for_previous();
    begin_early();
    for (u32 i = blockIdx.x; i < a.n; i += gridDim.x) {
        float* plain = a.plain ? a.plain + (u64)i * a.width : nullptr;
        norm_row(a.stream + (u64)i * a.width, a.weight, weights, a.width, a.eps, NormOut{a.out, a.out_sums, plain, a.n, i}, partial);
        __syncthreads();
    }
}
STEP_KERNEL(rms_norm, Norm, run_rms_norm)

struct Arrange {
    const float* x;  // [n, width]
    const float* up; // [n, width] or null; if there, x is a gate
    u16* out;
    float* out_sums;
    float* plain;    // [n, width] or null
    u32 width, n;
};

// Numbers become fragments, two streams of a feed-forward its hidden numbers.
__device__ __forceinline__ void run_arrange(const Arrange& a) {
    wait_for_previous();
    begin_early();
    // A warp has columns of one token.
    u32 padded = (a.width + 31) & ~31u;
    for (u32 item = working_idx(); item < a.n * padded; item += gridDim.x * BLOCK_THREADS) {
        u32 i = item / padded, c = item % padded;
        bool is_there = c < a.width;
        u64 at = (u64)i * a.width + c;
        float x = is_there ? __ldcg(a.x + at) : 0.0f;
        if (is_there && a.up) x = x / (1.0f + __expf(-x)) * __ldcg(a.up + at);
        write_fragment(a.out, a.out_sums, c, a.n, i, c < ((a.width + 15) & ~15u), x);
        if (is_there && a.plain) a.plain[at] = x;
    }
}
STEP_KERNEL(arrange, Arrange, run_arrange)

struct Rotate {
    const float* x;      // [n, width]
    const float* norm;   // [width]: the weight of an RMS norm that is taken first, or null
    const float* signs;  // of the whole blocks, then of the last one where they leave a rest
    u16* out;
    float* out_sums;
    u16* plain;          // what is rotated, as fragments too, or null
    float* plain_sums;
    float eps;
    u32 width, block, part, n, end;
};

// `log2(RADIX)` rounds of butterflies from distance `1 << h` on; a thread holds what it adds in registers meanwhile.
template <u32 RADIX, u32 LOG>
__device__ __forceinline__ void walsh_rounds(float* x, u32 length, u32 h) {
    for (u32 item = threadIdx.x; item < length / RADIX; item += BLOCK_THREADS) {
        float v[RADIX], *at = x + ((item >> h) << (h + LOG)) + (item & ((1u << h) - 1));
#pragma unroll
        for (u32 j = 0; j < RADIX; j++) v[j] = at[j << h];
#pragma unroll
        for (u32 half = 1; half < RADIX; half *= 2)
#pragma unroll
            for (u32 j = 0; j < RADIX; j++) {
                if (j & half) continue;
                float a = v[j], b = v[j + half];
                v[j] = a + b, v[j + half] = a - b;
            }
#pragma unroll
        for (u32 j = 0; j < RADIX; j++) at[j << h] = v[j];
    }
}

__device__ __forceinline__ void walsh(float* x, u32 length, u32 block) {
    const u32 n_rounds = 31 - __clz(block);
    u32 h = 0;
    for (; h + 3 <= n_rounds; h += 3) {
        __syncthreads();
        walsh_rounds<8, 3>(x, length, h);
    }
    __syncthreads();
    if (n_rounds - h == 2) walsh_rounds<4, 2>(x, length, h);
    if (n_rounds - h == 1) walsh_rounds<2, 1>(x, length, h);
    __syncthreads();
}

// Inputs that a thread of a rotation has asked for at a time.
#define ROTATED_AT_ONCE 12

// Which inputs a block rotates: `length` from `first` on, of which `whole` are blocks.
struct RotatedPart {
    u32 i, first, length, whole;

    __device__ __forceinline__ RotatedPart(const Rotate& a, u32 item) {
        u32 n_parts = (a.width + a.part - 1) / a.part;
        i = item / n_parts, first = item % n_parts * a.part, length = min(a.part, a.width - first), whole = length - length % a.block;
    }
};

// What some of a part's inputs are multiplied by: the norm's weight and the sign. No kernel writes them.
struct Factors {
    float norm[ROTATED_AT_ONCE], sign[ROTATED_AT_ONCE];

    __device__ __forceinline__ void load(const Rotate& a, const RotatedPart& part, u32 base) {
#pragma unroll
        for (u32 k = 0; k < ROTATED_AT_ONCE; k++) {
            u32 c = base + k * BLOCK_THREADS + threadIdx.x;
            norm[k] = a.norm && c < part.length ? __ldg(a.norm + part.first + c) : 1.0f;
            sign[k] = c < part.whole ? __ldg(a.signs + part.first + c) : 1.0f;
        }
    }
};

// The inputs of a part with their signs into `row`; of their norm, if there is one. `factors` are the first ones.
__device__ __forceinline__ void load_part(const Rotate& a, const RotatedPart& part, Factors& factors, float* row, float* partial) {
    const float* x = a.x + (u64)part.i * a.width;
    const u32 padded = (part.length + 31) & ~31u, at_once = ROTATED_AT_ONCE * BLOCK_THREADS;
    float scale = 1.0f;
    for (u32 base = 0; base < padded; base += at_once) {
        float y[ROTATED_AT_ONCE];
#pragma unroll
        for (u32 k = 0; k < ROTATED_AT_ONCE; k++) {
            u32 c = base + k * BLOCK_THREADS + threadIdx.x;
            y[k] = c < part.length ? __ldcg(x + part.first + c) : 0.0f;
        }
        if (base) factors.load(a, part, base);
        NormItems items;
        if (a.norm && !base) scale = norm_scale(x, a.width, a.eps, items, partial);
#pragma unroll
        for (u32 k = 0; k < ROTATED_AT_ONCE; k++) {
            u32 c = base + k * BLOCK_THREADS + threadIdx.x;
            if ((c & ~31u) >= padded) continue;
            if (a.norm) y[k] = y[k] * scale * factors.norm[k];
            if (a.plain) write_fragment(a.plain, a.plain_sums, part.first + c, a.n, part.i, c < ((part.length + 15) & ~15u), y[k]);
            if (c < part.length) row[c] = y[k] * factors.sign[k];
        }
    }
}

// The part that `load_part` has left in `row`, rotated.
__device__ __forceinline__ void rotate_part(const Rotate& a, const RotatedPart& part, float* row) {
    walsh(row, part.whole, a.block);
    if (part.whole < part.length) {
        float* last = row + part.length - a.block;
        for (u32 c = threadIdx.x; c < a.block; c += BLOCK_THREADS) last[c] *= a.signs[part.whole + c];
        walsh(last, a.block, a.block);
    }
#pragma unroll 4
    for (u32 c = threadIdx.x; c < ((part.length + 31) & ~31u); c += BLOCK_THREADS) {
        float y = c < part.length ? row[c] : 0.0f;
        write_fragment(a.out, a.out_sums, part.first + c, a.n, part.i, c < ((part.length + 15) & ~15u), y);
    }
}

// The input transform: signs and butterflies over blocks of a power of two, a second time over the last block's worth of
// inputs when the width is no multiple. A block computes `part` inputs: whole blocks, or all when there is a second pass.
__device__ __forceinline__ void run_rotate(const Rotate& a) {
    extern __shared__ float row[];
    __shared__ float partial[32];
    const u32 n_items = (a.width + a.part - 1) / a.part * a.n;
    Factors factors;
    begin_early();
    if (blockIdx.x < n_items) factors.load(a, RotatedPart(a, blockIdx.x), 0);
    wait_for_previous();
    for (u32 item = blockIdx.x; item < n_items; item += gridDim.x) {
        RotatedPart part(a, item);
        if (item != blockIdx.x) factors.load(a, part, 0);
        load_part(a, part, factors, row, partial);
        rotate_part(a, part, row);
        __syncthreads();
    }
}
STEP_KERNEL(rotate, Rotate, run_rotate)

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
    u32 vocabulary, capacity, ring_length, n;
};

__device__ __forceinline__ void keep_larger(float& best, u32& idx, float other, u32 other_idx) {
    // Among equals the first.
    if (other > best || (other == best && other_idx < idx)) best = other, idx = other_idx;
}

// Blocks of threads that look for the largest logit of a token.
#define PICK_BLOCKS 32

// The part `block` of the logits of token `i`; the last one to be done chooses.
__device__ __forceinline__ void pick_of(const Pick& a, u32 i, u32 block, float* values, u32* places) {
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float* logits = a.logits + (u64)i * a.vocabulary;
    float best = __int_as_float(0xff800000);
    u32 idx = 0xffffffffu;
    for (u32 at = block * BLOCK_THREADS + threadIdx.x; at < a.vocabulary; at += PICK_BLOCKS * BLOCK_THREADS) {
        keep_larger(best, idx, logits[at], at);
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, best, offset);
        keep_larger(best, idx, other, __shfl_xor_sync(0xffffffffu, idx, offset));
    }
    if (lane == 0) values[warp] = best, places[warp] = idx;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 w = 1; w < BLOCK_THREADS / 32; w++) keep_larger(best, idx, values[w], places[w]);
    float* of_all = a.best + i * PICK_BLOCKS;
    u32* idx_of_all = a.best_idx + i * PICK_BLOCKS;
    of_all[block] = best, idx_of_all[block] = idx;
    __threadfence();
    if (atomicAdd(a.arrivals + i, 1u) != PICK_BLOCKS - 1) return;
    a.arrivals[i] = 0;
    __threadfence();
    for (u32 b = 0; b < PICK_BLOCKS; b++) keep_larger(best, idx, __ldcg(of_all + b), __ldcg(idx_of_all + b));
    // Logits that are no numbers choose nothing.
    if (idx >= a.vocabulary) idx = 0;
    int next = a.next_positions[i];
    a.tokens[i] = idx;
    a.positions[i] = next < (int)a.capacity ? next : -1;
    a.next_positions[i] = next + 1;
    a.ring[(u64)i * a.ring_length + a.taken[i] % a.ring_length] = idx;
    a.taken[i] += 1;
}

// The most likely token of each sequence, which the step then reads at its next position. What follows begins when this has
// ended: attention looks at positions before it waits.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS) pick(const __grid_constant__ Pick a) {
    __shared__ float values[BLOCK_THREADS / 32];
    __shared__ u32 places[BLOCK_THREADS / 32];
    wait_for_previous();
    for (u32 item = blockIdx.x; item < PICK_BLOCKS * a.n; item += gridDim.x) {
        pick_of(a, item / PICK_BLOCKS, item % PICK_BLOCKS, values, places);
        __syncthreads();
    }
}
