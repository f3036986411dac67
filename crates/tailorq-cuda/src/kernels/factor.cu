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
