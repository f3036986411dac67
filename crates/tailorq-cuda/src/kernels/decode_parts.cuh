// What the kernels of decoding share.
//
// Activations of `n` tokens are held as fragments: f16 in the order in which a tensor core wants its right operand. The
// inputs come in chunks of 128, a chunk in 8 steps of 16. Two steps of one token are 32 numbers: of input
// `c = 128 chunk + 16 step + 8 high + 2 quarter + odd` of token `i` the place is
// `((4 chunk + step / 2) n + i) 32 + 8 quarter + 4 (step % 2) + 2 high + odd`.
// Past the last input there are zeros up to the end of the chunk. Beside them lie the sums of 8 inputs each, taken of the
// rounded numbers: `[eighths, n]`.

__device__ __forceinline__ u64 fragment_place(u32 c, u32 n, u32 i) {
    u32 two_steps = c >> 5, in_step = c & 15;
    return ((u64)two_steps * n + i) * 32 + ((in_step & 7) >> 1) * 8 + ((c >> 4) & 1) * 4 + (in_step >> 3) * 2 + (in_step & 1);
}

// To half precision; what is too large becomes the largest number.
__device__ __forceinline__ u16 saturated_half(float x) { return float_to_half(fminf(fmaxf(x, -65504.0f), 65504.0f)); }

// The sum over 8 neighbouring lanes: pairs first, then pairs of pairs.
__device__ __forceinline__ float eighth_sum(float x) {
    for (int offset = 1; offset < 8; offset *= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Writes one number of one token as a fragment, and with its neighbours the sum of eight. All lanes of a warp call this with
// neighbouring columns.
__device__ __forceinline__ void write_fragment(u16* out, float* sums, u32 c, u32 n, u32 i, bool is_there, float x) {
    u16 rounded = saturated_half(is_there ? x : 0.0f);
    float sum = eighth_sum(half_to_float(rounded));
    if (!is_there) return;
    out[fragment_place(c, n, i)] = rounded;
    if ((c & 7) == 0) sums[(u64)(c >> 3) * n + i] = sum;
}

// Every kernel of a step begins with `begin_early`: the next one may start as soon as a processor has room for its blocks, and
// fetches weights while this one is at work. How they lie on the processors is up to `launch.rs`: of a step with one token each
// processor has one block of a kernel and one of the next, of other steps one block in all.
//
// Before `wait_for_previous` a kernel reads only what no kernel of the step writes: weights, the cache before the newest position, and
// what `pick` writes, which is why that one lets nobody begin early and is followed by a kernel that reads none of it before it waits.
// No kernel writes anything before it has waited, and no block ends before it has: so when a kernel has ended, all before it have,
// however many have begun.
__device__ __forceinline__ void begin_early() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until all work before this kernel is done and what it wrote can be read.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Threads of a block that work: the order of a norm's sum depends on it.
#define BLOCK_THREADS 384

// Registers that a kernel takes at least, and threads among which a processor's are shared out so that it takes 72 at most. Between
// these a block that shares its processor is made to hold more than half of the registers by a few idle warps (`launch.rs`).
#define LEAST_REGISTERS 62
#define SHARED_AMONG 896

// Takes that many, whatever the kernel needs: they are all in use at once in a branch that nobody takes. `n` is never 0.
__device__ __forceinline__ void claim_registers(u32 n) {
    if (n) return;
    u32 v[LEAST_REGISTERS];
#pragma unroll
    for (u32 i = 0; i < LEAST_REGISTERS; i++) asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(v[i]) : "r"(4 * i) : "memory");
#pragma unroll
    for (u32 i = 0; i < LEAST_REGISTERS; i++) asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(4 * i), "r"(v[LEAST_REGISTERS - 1 - i]) : "memory");
}

// A kernel that may share processors with another one: `RUN` with its argument.
#define STEP_KERNEL(NAME, ARGUMENT, RUN)                                                                             \
    extern "C" __global__ void __launch_bounds__(SHARED_AMONG, 1) NAME(const __grid_constant__ ARGUMENT a) { \
        if (threadIdx.x >= BLOCK_THREADS) return;                                                                    \
        claim_registers(a.n);                                                                                        \
        RUN(a);                                                                                                      \
    }

// The thread's number among those of all blocks that work.
__device__ __forceinline__ u64 working_idx() { return (u64)blockIdx.x * BLOCK_THREADS + threadIdx.x; }

// The sum over the working threads of a block, given to all of them; `partial` holds 32 floats. The order is fixed.
__device__ __forceinline__ float working_sum(float x, float* partial) {
    u32 lane = threadIdx.x & 31;
    x = warp_sum(x);
    if (lane == 0) partial[threadIdx.x >> 5] = x;
    __syncthreads();
    return warp_sum(lane < BLOCK_THREADS / 32 ? partial[lane] : 0.0f);
}

// A thread computes eight columns of a norm at a time, those that lie side by side among fragments: column `j` of item `i`.
__device__ __forceinline__ u32 item_column(u32 item, u32 j) {
    return (item >> 2) * 32 + (j >> 2) * 16 + ((j >> 1) & 1) * 8 + (item & 3) * 2 + (j & 1);
}

// Items that a thread keeps in registers; of wider rows each item is read twice.
#define NORM_ITEMS 2

// Where the norm of a row goes: fragments of token `i` among `n`, and as numbers unless that is null.
struct NormOut {
    u16* x;
    float* sums;
    float* plain;
    u32 n, i;
};

// The items of a row that the thread has from `first` on, zeros past its end.
struct NormItems {
    float v[NORM_ITEMS][8];

    __device__ __forceinline__ void load(const float* row, u32 width, u32 first) {
        bool has_pairs = !(width & 1);
#pragma unroll
        for (u32 k = 0; k < NORM_ITEMS; k++)
#pragma unroll
            for (u32 j = 0; j < 8; j += 2) {
                u32 c = item_column(first + threadIdx.x + k * BLOCK_THREADS, j);
                float2 pair = make_float2(0.0f, 0.0f);
                if (has_pairs && c < width) pair = __ldcg((const float2*)(row + c));
                if (!has_pairs && c < width) pair.x = __ldcg(row + c);
                if (!has_pairs && c + 1 < width) pair.y = __ldcg(row + c + 1);
                v[k][j] = pair.x, v[k][j + 1] = pair.y;
            }
    }
};

// The block: what the numbers of a row are multiplied by in its RMS norm. `items` are those that the thread read last.
__device__ __forceinline__ float norm_scale(const float* row, u32 width, float eps, NormItems& items, float* partial) {
    const u32 n_items = ((width + 127) & ~127u) / 8;
    float sum = 0.0f;
    for (u32 first = 0; first < n_items; first += NORM_ITEMS * BLOCK_THREADS) {
        items.load(row, width, first);
#pragma unroll
        for (u32 k = 0; k < NORM_ITEMS; k++)
#pragma unroll
            for (u32 j = 0; j < 8; j++) sum = fmaf(items.v[k][j], items.v[k][j], sum);
    }
    return rsqrtf(working_sum(sum, partial) / (float)width + eps);
}

// The block: RMS norm of a row up to the end of its chunk. `weights` are the first ones of `weight`, which were asked for before
// the row was there. `partial` is 32 floats in shared memory.
__device__ __forceinline__ void norm_row(const float* row, const float* weight, NormItems& weights, u32 width, float eps, const NormOut& out, float* partial) {
    const u32 n_items = ((width + 127) & ~127u) / 8, at_once = NORM_ITEMS * BLOCK_THREADS;
    NormItems items;
    float scale = norm_scale(row, width, eps, items, partial);
    for (u32 first = 0; first < n_items; first += at_once) {
        if (n_items > at_once) items.load(row, width, first), weights.load(weight, width, first);
#pragma unroll
        for (u32 k = 0; k < NORM_ITEMS; k++) {
            u32 item = first + threadIdx.x + k * BLOCK_THREADS, words[4];
            // Whole warps go on together: they add each other's numbers.
            if ((item & ~31u) >= n_items) continue;
#pragma unroll
            for (u32 two = 0; two < 4; two++) {
                u32 c = item_column(item, 2 * two);
                float a = items.v[k][2 * two] * scale * weights.v[k][2 * two];
                float b = items.v[k][2 * two + 1] * scale * weights.v[k][2 * two + 1];
                if (out.plain && c < width) out.plain[c] = a;
                if (out.plain && c + 1 < width) out.plain[c + 1] = b;
                u16 low = saturated_half(a), high = saturated_half(b);
                words[two] = low | (u32)high << 16;
                float pairs = half_to_float(low) + half_to_float(high);
                pairs += __shfl_xor_sync(0xffffffffu, pairs, 1);
                pairs += __shfl_xor_sync(0xffffffffu, pairs, 2);
                if (item < n_items && (item & 3) == 0) out.sums[(u64)((item >> 2) * 4 + two) * out.n + out.i] = pairs;
            }
            if (item < n_items) {
                u64 place = ((u64)(item >> 2) * out.n + out.i) * 32 + (item & 3) * 8;
                *(uint4*)(out.x + place) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
}
