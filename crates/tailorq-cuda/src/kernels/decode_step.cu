// What lies between the matrices of a step beside attention: embedding, norms, rotations of inputs, the choice of a token.

struct Embed {
    const u16* embedding;  // [vocabulary, width] in half precision
    const u32* tokens;     // [n]
    float* stream;         // [n, width]
    u32 width;
};

// The stream begins with the embeddings of the tokens.
extern "C" __global__ void __launch_bounds__(256) embed(const __grid_constant__ Embed a) {
    wait_for_previous();
    let_next_start();
    u32 i = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < a.width) a.stream[(u64)i * a.width + c] = half_to_float(a.embedding[(u64)a.tokens[i] * a.width + c]);
}

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
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS) rms_norm(const __grid_constant__ Norm a) {
    __shared__ float partial[32];
    wait_for_previous();
    let_next_start();
    u32 i = blockIdx.x;
    float* plain = a.plain ? a.plain + (u64)i * a.width : nullptr;
    norm_row(a.stream + (u64)i * a.width, a.weight, a.width, a.eps, NormOut{a.out, a.out_sums, plain, a.n, i}, partial);
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
    wait_for_previous();
    let_next_start();
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
    wait_for_previous();
    let_next_start();
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
    wait_for_previous();
    let_next_start();
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
