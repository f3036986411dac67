// What the kernels of decoding share.
//
// Activations of `n` tokens are held as fragments: f16 in the order in which a tensor core wants its right operand. The
// inputs come in chunks of 128, a chunk in 8 steps of 16. Two steps of one token are 32 numbers: of input
// `c = 128 chunk + 16 step + 8 high + 2 quarter + odd` of token `i` the place is
// `((4 chunk + step / 2) n + i) 32 + 8 quarter + 4 (step % 2) + 2 high + odd`.
// Past the last input there are zeros up to the end of the chunk. Beside them lie the sums of 16 inputs each, taken of the
// rounded numbers: `[steps, n]`.

__device__ __forceinline__ u64 fragment_place(u32 c, u32 n, u32 i) {
    u32 two_steps = c >> 5, in_step = c & 15;
    return ((u64)two_steps * n + i) * 32 + ((in_step & 7) >> 1) * 8 + ((c >> 4) & 1) * 4 + (in_step >> 3) * 2 + (in_step & 1);
}

// To half precision; what is too large becomes the largest number.
__device__ __forceinline__ u16 saturated_half(float x) { return float_to_half(fminf(fmaxf(x, -65504.0f), 65504.0f)); }

// The sum over the 16 lanes of a half warp, in a fixed order.
__device__ __forceinline__ float half_warp_sum(float x) {
    for (int offset = 8; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Every kernel of a step calls both: the kernel after it may start while this one runs, and waits for its end before it
// looks at anything that kernels write.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
