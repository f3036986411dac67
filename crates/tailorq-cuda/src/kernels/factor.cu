// Around the Cholesky factorization of the library.

// out = in with rows and columns in reverse order; all of it, or the upper triangle with zeros below.
KERNEL reversed(const float* in, float* out, u64 n, int upper_only) {
    u64 i = global_idx();
    if (i >= n * n) return;
    out[i] = upper_only && i % n < i / n ? 0.0f : in[n * n - 1 - i];
}

// Ones on the diagonal of a matrix of zeros.
KERNEL ones(float* matrix, u64 n) {
    u64 i = global_idx();
    if (i < n) matrix[i * n + i] = 1.0f;
}

// One block: the order of the first minor whose pivot is no positive finite number, unless an earlier one is known; 0: none. The
// library takes infinity for a pivot like any other.
KERNEL first_bad_pivot(const float* lower, u64 n, int* order) {
    __shared__ u32 first;
    if (threadIdx.x == 0) first = *order > 0 ? (u32)*order : 0xffffffffu;
    __syncthreads();
    for (u64 i = threadIdx.x; i < n; i += blockDim.x) {
        float pivot = lower[i * n + i];
        if (!(pivot > 0.0f && pivot <= 3.402823466e38f)) atomicMin(&first, (u32)i + 1);
    }
    __syncthreads();
    if (threadIdx.x == 0 && *order >= 0) *order = first == 0xffffffffu ? 0 : (int)first;
}
