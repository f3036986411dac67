// Rounding to grids, with and without error feedback. One warp works on one row (or one group of it).
//
// All arithmetic on which a code depends is that of the CPU's vector path, operation by operation and sum by sum: products
// and sums are written as intrinsics so that the compiler fuses exactly those that are fused there.

#define ALL 0xffffffffu
#define BLOCK 128
// Weights of a group that a warp holds in shared memory at a time: a tile, what was left of the one before, and padding.
#define TILE 128
#define STASH (TILE + 16)
// Partial sums of the clip search.
#define LANES 16

// How grids are fitted; `Rule` in rounding.rs.
struct Rule {
    const float* factors;     // [n_factors]: clippings to try
    const float* importance;  // [cols] or null
    float norm;
    float max_code;
    int n_factors;            // 0: the extremes are the range
    int middle;               // the zero point of symmetric grids, -1 for others
    int cut;                  // low bits that stored scales do not have: 0, or 127 with scales of 8 bits
};

// The layer; `Layer` in rounding.rs.
struct Layer {
    const float* weights;           // [rows, cols]
    float* current;                 // the same, with errors taken in
    float* errors;                  // [rows, BLOCK]
    const float* upper;             // [cols, cols]
    const float* inverse_diagonal;  // [cols]
    const u8* dead;                 // [cols]
    const u32* kept;                // [rows, ceil(cols / 32)] bits, or null
    const u64* starts;              // [rows + 1]
    const u32* columns;             // kept columns
    u16* corrections;               // one a kept column
    u8* codes;                      // [rows, cols]
    u16* scales;                    // [rows, n_groups]
    u8* zeros;                      // [rows, n_groups]
    double* sums;                   // [rows or rows * n_groups, 3]: energies of weights and errors, loss
    u32* trouble;                   // set where a weight or scale is out of range
    double added;                   // damping on the diagonal
    int rows, cols;
    int group_len;                  // a multiple of 32; whole rows are one long group
    int n_groups;
    int fitted;                     // round_block: scales and zeros are there
    int only_grids;                 // round_groups: no codes
};

struct Line {
    float scale, inverse, low, high;
};

__device__ __forceinline__ Line line_of(u16 scale, int zero, float max_code) {
    Line line;
    line.scale = half_to_float(scale);
    line.inverse = line.scale > 0.0f ? __fdiv_rn(1.0f, line.scale) : 0.0f;
    line.low = -(float)zero;
    line.high = __fsub_rn(max_code, (float)zero);
    return line;
}

// Clamps and rounds half to even: adding 1.5 * 2^23 leaves no bits below one.
__device__ __forceinline__ float round_within(float t, float low, float high) {
    const float magic = 12582912.0f;
    return __fsub_rn(__fadd_rn(fminf(fmaxf(t, low), high), magic), magic);
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

// x^exponent by the polynomials of the CPU's clip search.
__device__ __forceinline__ float power(float x, float exponent) {
    const float smallest = 1.0f / 33554432.0f;
    x = x > smallest ? x : smallest;
    u32 bits = __float_as_uint(x);
    int whole = (int)(bits - 0x3f3504f3u) >> 23;
    float f = __fsub_rn(__uint_as_float(bits - ((u32)whole << 23)), 1.0f);
    float p = 0.2526603f;
    p = __fmaf_rn(p, f, -0.39457537f);
    p = __fmaf_rn(p, f, 0.48668615f);
    p = __fmaf_rn(p, f, -0.7202418f);
    p = __fmaf_rn(p, f, 1.442578f);
    float y = __fmul_rn(__fmaf_rn(p, f, (float)whole), exponent);
    const float magic = 12582912.0f;
    float rounded = __fadd_rn(y, magic);
    float g = __fsub_rn(y, __fsub_rn(rounded, magic));
    float e = 0.05517167f;
    e = __fmaf_rn(e, g, 0.24261112f);
    e = __fmaf_rn(e, g, 0.693261f);
    e = __fmaf_rn(e, g, 0.99992806f);
    return __uint_as_float(__float_as_uint(e) + (__float_as_uint(rounded) << 23));
}

__device__ __forceinline__ float warp_min(float x) {
    for (int offset = 16; offset > 0; offset >>= 1) x = fminf(x, __shfl_xor_sync(ALL, x, offset));
    return x;
}

__device__ __forceinline__ double warp_sum_double(double x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}

// The grid of `factor` times the range; false when its scale is above the largest. With scales of 8 bits that of the whole range
// is the next, others have the nearest.
__device__ __forceinline__ bool grid_of(const Rule& rule, float low, float high, float factor, u16& scale, int& zero) {
    float exact = __fdiv_rn(__fmul_rn(factor, __fsub_rn(high, low)), rule.max_code);
    scale = float_to_half(exact);
    int added = factor == 1.0f ? rule.cut : (rule.cut + 1) >> 1;
    if (rule.cut) scale = (u16)((scale + added) & ~rule.cut);
    if (scale >= 0x7c00) return false;
    if (scale == 0) scale = (u16)(rule.cut + 1);
    zero = rule.middle >= 0 ? rule.middle
                            : (int)round_within(__fdiv_rn(__fmul_rn(-low, factor), half_to_float(scale)), 0.0f, rule.max_code);
    return true;
}

// A group's weights that are not kept, tile by tile, in shared memory of the warp.
struct Tiles {
    float* weights;     // [STASH]
    float* importance;  // [STASH]
    // The whole group lies there, padded with zeros to a multiple of LANES; -1: tiles come one after another from
    const float* row;         // the row's weights
    const float* of_columns;  // [cols] or null
    const u32* kept;          // the row's bits or null
    int filled;
    int first, end;
    int at, carried, used;
};

// Appends the lane's element, if it has one, behind `n` others; gives their new number.
__device__ __forceinline__ int append(Tiles& t, int n, bool in, float weight, float importance) {
    u32 mask = __ballot_sync(ALL, in);
    if (in) {
        int place = n + __popc(mask & ((1u << (threadIdx.x & 31)) - 1u));
        t.weights[place] = weight;
        t.importance[place] = importance;
    }
    return n + __popc(mask);
}

// Zeros up to a multiple of LANES; gives the number with them.
__device__ __forceinline__ int pad(Tiles& t, int n) {
    int padded = (n + LANES - 1) & ~(LANES - 1), place = n + (threadIdx.x & 31);
    if (place < padded) {
        t.weights[place] = 0.0f;
        t.importance[place] = 0.0f;
    }
    return padded;
}

__device__ __forceinline__ void rewind(Tiles& t) {
    t.at = t.first;
    t.carried = 0;
    t.used = 0;
}

// The number of elements in the next tile, a multiple of LANES; 0 behind the last.
__device__ __forceinline__ int next_tile(Tiles& t) {
    int lane = threadIdx.x & 31;
    if (t.filled >= 0) {
        int n = t.at < t.end ? t.filled : 0;
        t.at = t.end;
        return n;
    }
    while (t.at < t.end) {
        // All lanes have read the last tile.
        __syncwarp();
        float weight = 0.0f, importance = 0.0f;
        if (lane < t.carried) {
            weight = t.weights[t.used + lane];
            importance = t.importance[t.used + lane];
        }
        __syncwarp();
        int n = append(t, 0, lane < t.carried, weight, importance);
        int stop = min(t.at + TILE, t.end);
        for (; t.at < stop; t.at += 32) {
            int c = t.at + lane;
            bool in = c < t.end && !(t.kept && (t.kept[t.at >> 5] >> lane & 1u));
            n = append(t, n, in, in ? t.row[c] : 0.0f, in && t.of_columns ? t.of_columns[c] : 0.0f);
        }
        if (t.at >= t.end) {
            t.at = t.end;
            n = pad(t, n);
            t.carried = 0;
            // A group of one tile need not be read again.
            if (t.end - t.first <= TILE) t.filled = n;
            __syncwarp();
            return n;
        }
        t.used = n & ~(LANES - 1);
        t.carried = n - t.used;
        __syncwarp();
        if (t.used > 0) return t.used;
    }
    return 0;
}

// Halves added to halves, as the CPU adds its lanes.
template <int N>
__device__ __forceinline__ float sum_of(float* sums) {
    if constexpr (N == 1) {
        return sums[0];
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sums[i] = __fadd_rn(sums[i], sums[i + N / 2]);
        return sum_of<N / 2>(sums);
    }
}

// sum importance |w / scale - q|^norm over the group. With two PARTS, lanes 16 apart have the same grid, and each of them
// holds half of the partial sums.
template <bool WEIGHTED, bool SQUARED, int PARTS>
__device__ __forceinline__ float penalty(Tiles& t, Line line, float norm) {
    const int N = LANES / PARTS;
    int offset = PARTS == 2 ? (threadIdx.x >> 4 & 1) * N : 0;
    float sums[N];
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] = 0.0f;
    rewind(t);
    for (int n = next_tile(t); n > 0; n = next_tile(t)) {
#pragma unroll 1
        for (int c = offset; c < n; c += LANES) {
#pragma unroll
            for (int q = 0; q < N; q += 4) {
                float4 w4 = *(const float4*)(t.weights + c + q);
                float4 i4 = WEIGHTED ? *(const float4*)(t.importance + c + q) : w4;
                float w[4] = {w4.x, w4.y, w4.z, w4.w}, imp[4] = {i4.x, i4.y, i4.z, i4.w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float x = __fmul_rn(w[i], line.inverse);
                    float error = fabsf(__fsub_rn(x, round_within(x, line.low, line.high)));
                    float p = SQUARED ? __fmul_rn(error, error) : power(error, norm);
                    if (WEIGHTED) p = __fmul_rn(p, imp[i]);
                    sums[q + i] = __fadd_rn(sums[q + i], p);
                }
            }
        }
    }
    if (PARTS == 2) {
#pragma unroll
        for (int i = 0; i < N; i++) sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(ALL, sums[i], 16));
    }
    return sum_of<N>(sums);
}

template <int PARTS>
__device__ __forceinline__ float penalty_of(Tiles& t, const Rule& rule, Line line) {
    bool squared = rule.norm == 2.0f;
    if (rule.importance) {
        return squared ? penalty<true, true, PARTS>(t, line, rule.norm) : penalty<true, false, PARTS>(t, line, rule.norm);
    }
    return squared ? penalty<false, true, PARTS>(t, line, rule.norm) : penalty<false, false, PARTS>(t, line, rule.norm);
}

// The grid of a group whose weights run from `low` to `high` (and 0); false when its scale is above the largest f16.
//
// Lanes try one clipping each. On the CPU a candidate is taken if its sum is below the best penalty so far, divided by its own
// unit. Only candidates within some roundings of the least penalty can decide who is taken last, so only these are
// compared again, in their order.
__device__ __forceinline__ bool fit(Tiles& t, const Rule& rule, float low, float high, u16& scale, int& zero) {
    int lane = threadIdx.x & 31;
    if (rule.middle >= 0) {
        high = fmaxf(high, -low);
        low = -high;
    }
    if (low == high) {
        scale = 0;
        zero = rule.middle >= 0 ? rule.middle : 0;
        return true;
    }
    if (!grid_of(rule, low, high, 1.0f, scale, zero)) return false;
    float best = __int_as_float(0x7f800000);
    for (int first = 0; first < rule.n_factors; first += 32) {
        int left = rule.n_factors - first;
        bool halves = left <= 16;
        int c = first + (halves ? lane & 15 : lane);
        u16 my_scale = 0;
        int my_zero = 0;
        bool valid = c < rule.n_factors;
        if (valid) valid = grid_of(rule, low, high, rule.factors[c], my_scale, my_zero);
        Line line = line_of(my_scale, my_zero, rule.max_code);
        float sum = halves ? penalty_of<2>(t, rule, line) : penalty_of<1>(t, rule, line);
        float unit = power(line.scale, rule.norm);
        float mine = valid ? __fmul_rn(sum, unit) : __int_as_float(0x7f800000);
        float least = warp_min(mine);
        u32 close = __ballot_sync(ALL, valid && mine <= __fmaf_rn(least, 1.000001f, 1e-40f));
        if (halves) close &= 0xffffu;
        while (close) {
            int from = __ffs(close) - 1;
            close &= close - 1;
            float its_sum = __shfl_sync(ALL, sum, from), its_unit = __shfl_sync(ALL, unit, from);
            u32 its_scale = __shfl_sync(ALL, (u32)my_scale, from);
            int its_zero = __shfl_sync(ALL, my_zero, from);
            if (its_sum < __fdiv_rn(best, its_unit)) {
                best = __fmul_rn(its_sum, its_unit);
                scale = (u16)its_scale;
                zero = its_zero;
            }
        }
    }
    return true;
}

// The first place among the row's kept columns whose column is not below `col`.
__device__ __forceinline__ u64 first_kept(const Layer& layer, u64 row, u32 col) {
    u64 from = layer.starts[row], to = layer.starts[row + 1];
    while (from < to) {
        u64 middle = (from + to) >> 1;
        if (layer.columns[middle] < col) from = middle + 1;
        else to = middle;
    }
    return from;
}

// A weight on its line: the value, and for a kept one the correction in f16 that was added to it.
__device__ __forceinline__ float corrected(float weight, float value, u16& correction) {
    correction = float_to_half(__fsub_rn(weight, value));
    return __fadd_rn(value, half_to_float(correction));
}

// Rounds columns 32 K .. 32 K + 32 of the block one after another; each error goes to all later columns. The factor is
// zero up to a column itself, so its weight stays what it was when it was rounded. Columns behind the matrix are zeros.
template <int K, bool KEPT>
__device__ __forceinline__ void columns(float* w, u32 kept, Line line, const float* u, const float* inverse_diagonal) {
    int lane = threadIdx.x & 31;
#pragma unroll 8
    for (int j = 0; j < 32; j++) {
        float q = round_within(__fmul_rn(w[K], line.inverse), line.low, line.high);
        float value = __fmul_rn(q, line.scale);
        if (KEPT && (kept >> j & 1u)) {
            u16 correction;
            value = corrected(w[K], value, correction);
        }
        float error = __fmul_rn(__fsub_rn(w[K], value), inverse_diagonal[32 * K + j]);
        error = -__shfl_sync(ALL, error, j);
#pragma unroll
        for (int k = K; k < 4; k++) w[k] = __fmaf_rn(error, u[(32 * K + j) * BLOCK + 32 * k + lane], w[k]);
    }
}

template <int K>
__device__ __forceinline__ void columns_in(int from, int to, float* w, const u32* kept, Line line, const float* u, const float* inverse) {
    if (K < from || K >= to) return;
    if (kept[K]) columns<K, true>(w, kept[K], line, u, inverse);
    else columns<K, false>(w, 0, line, u, inverse);
}

struct Sums {
    double weights, errors, loss;
};

// Adds one weight and its value.
__device__ __forceinline__ void settle(Sums& sums, float weight, float value) {
    double difference = (double)weight - (double)value;
    sums.weights += (double)weight * (double)weight;
    sums.errors += difference * difference;
}

// Columns start .. start + BLOCK of all rows, with error feedback among them; their errors are left for the columns behind.
// Dynamic shared memory: U's diagonal block, the inverse diagonal, and a stash for each warp.
extern "C" __global__ void __launch_bounds__(256, 3) round_block(Layer layer, Rule rule, int start) {
    extern __shared__ float4 shared4[];
    float* u = (float*)shared4;
    float* inverse_diagonal = u + BLOCK * BLOCK;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
    float* stash = inverse_diagonal + BLOCK + warp * (2 * STASH);
    int cols = layer.cols, len = min(BLOCK, cols - start);

    for (int i = threadIdx.x; i < BLOCK * BLOCK; i += blockDim.x) {
        int j = i / BLOCK, k = i % BLOCK;
        if (k > j && k < len) {
            u32 to = (u32)__cvta_generic_to_shared(u + i);
            const float* from = layer.upper + (u64)(start + j) * cols + start + k;
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
        } else {
            u[i] = 0.0f;
        }
    }
    for (int j = threadIdx.x; j < BLOCK; j += blockDim.x) {
        inverse_diagonal[j] = j < len ? layer.inverse_diagonal[start + j] : 0.0f;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

    int words = (cols + 31) / 32;
    for (u64 row = (u64)blockIdx.x * n_warps + warp; row < layer.rows; row += (u64)gridDim.x * n_warps) {
        u64 at = row * cols + start;
        float w[4];
        u32 kept[4];
        bool sound = true;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int c = 32 * k + lane;
            w[k] = c < len ? layer.current[at + c] : 0.0f;
            kept[k] = layer.kept && 32 * k < len ? layer.kept[row * words + start / 32 + k] : 0;
            sound = sound && is_finite(w[k]);
        }
        bool any_kept = (kept[0] | kept[1] | kept[2] | kept[3]) != 0;
        u64 place = any_kept ? first_kept(layer, row, start) : 0;
        Sums sums = {0.0, 0.0, 0.0};

        for (int from = 0; 32 * from < len;) {
            int to = layer.group_len >= BLOCK ? 4 : from + layer.group_len / 32;
            u64 group = row * layer.n_groups + (start + 32 * from) / layer.group_len;
            u16 scale;
            int zero;
            if (layer.fitted) {
                scale = layer.scales[group];
                zero = layer.zeros[group];
            } else {
                Tiles t;
                t.weights = stash;
                t.importance = stash + STASH;
                t.row = 0;
                t.of_columns = 0;
                t.kept = 0;
                t.first = 0;
                t.end = 1;
                int n = 0;
                float low = 0.0f, high = 0.0f;
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    if (k < from || k >= to) continue;
                    int c = 32 * k + lane;
                    bool in = c < len && !(kept[k] >> lane & 1u);
                    n = append(t, n, in, w[k], in && rule.importance ? rule.importance[start + c] : 0.0f);
                    low = in ? fminf(low, w[k]) : low;
                    high = in ? fmaxf(high, w[k]) : high;
                }
                t.filled = pad(t, n);
                __syncwarp();
                if (!fit(t, rule, warp_min(low), warp_max(high), scale, zero)) {
                    scale = 0;
                    zero = 0;
                    sound = false;
                }
                // All lanes are done with the stash before the next group comes.
                __syncwarp();
                if (lane == 0) {
                    layer.scales[group] = scale;
                    layer.zeros[group] = (u8)zero;
                }
            }
            Line line = line_of(scale, zero, rule.max_code);
            columns_in<0>(from, to, w, kept, line, u, inverse_diagonal);
            columns_in<1>(from, to, w, kept, line, u, inverse_diagonal);
            columns_in<2>(from, to, w, kept, line, u, inverse_diagonal);
            columns_in<3>(from, to, w, kept, line, u, inverse_diagonal);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (k < from || k >= to) continue;
                int c = 32 * k + lane;
                float q = round_within(__fmul_rn(w[k], line.inverse), line.low, line.high);
                float value = __fmul_rn(q, line.scale);
                if (kept[k] >> lane & 1u) {
                    u16 correction;
                    value = corrected(w[k], value, correction);
                    layer.corrections[place + __popc(kept[k] & ((1u << lane) - 1u))] = correction;
                }
                place += __popc(kept[k]);
                float error = __fmul_rn(__fsub_rn(w[k], value), inverse_diagonal[c]);
                layer.errors[row * BLOCK + c] = error;
                if (c < len) {
                    layer.codes[at + c] = (u8)(int)__fsub_rn(q, line.low);
                    sound = sound && is_finite(error);
                    float weight = layer.weights[at + c];
                    settle(sums, weight, value);
                    if (!layer.dead[start + c]) {
                        double difference = (double)weight - (double)value;
                        sums.loss += (double)error * (double)error - layer.added * difference * difference;
                    }
                }
            }
            from = to;
        }
        if (!sound) *layer.trouble = 1;
        sums.weights = warp_sum_double(sums.weights);
        sums.errors = warp_sum_double(sums.errors);
        sums.loss = warp_sum_double(sums.loss);
        if (lane == 0) {
            layer.sums[3 * row] += sums.weights;
            layer.sums[3 * row + 1] += sums.errors;
            layer.sums[3 * row + 2] += sums.loss;
        }
    }
}

// Grids for all groups by the weights themselves and, unless only they are asked for, the nearest codes. One warp a row and
// group. Dynamic shared memory: a stash for each warp.
extern "C" __global__ void __launch_bounds__(256, 3) round_groups(Layer layer, Rule rule) {
    extern __shared__ float4 shared4[];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
    float* stash = (float*)shared4 + warp * (2 * STASH);
    int cols = layer.cols, words = (cols + 31) / 32;
    u64 n = (u64)layer.rows * layer.n_groups;
    for (u64 group = (u64)blockIdx.x * n_warps + warp; group < n; group += (u64)gridDim.x * n_warps) {
        u64 row = group / layer.n_groups;
        int first = (int)(group % layer.n_groups) * layer.group_len;
        int end = min(cols, first + layer.group_len);
        Tiles t;
        t.weights = stash;
        t.importance = stash + STASH;
        t.row = layer.weights + row * cols;
        t.of_columns = rule.importance;
        t.kept = layer.kept ? layer.kept + row * words : 0;
        t.filled = -1;
        t.first = first;
        t.end = end;
        float low = 0.0f, high = 0.0f;
        bool sound = true;
        for (int c = first + lane; c < end; c += 32) {
            float w = t.row[c];
            sound = sound && is_finite(w);
            if (t.kept && (t.kept[c >> 5] >> lane & 1u)) continue;
            low = fminf(low, w);
            high = fmaxf(high, w);
        }
        u16 scale;
        int zero;
        if (!fit(t, rule, warp_min(low), warp_max(high), scale, zero)) {
            scale = 0;
            zero = 0;
            sound = false;
        }
        // All lanes are done with the stash before the next group comes.
        __syncwarp();
        if (!sound) *layer.trouble = 1;
        if (lane == 0) {
            layer.scales[group] = scale;
            layer.zeros[group] = (u8)zero;
        }
        if (layer.only_grids) continue;
        Line line = line_of(scale, zero, rule.max_code);
        u64 place = t.kept ? first_kept(layer, row, first) : 0;
        Sums sums = {0.0, 0.0, 0.0};
        for (int at = first; at < end; at += 32) {
            int c = at + lane;
            u32 kept = t.kept ? t.kept[at >> 5] : 0;
            if (c < end) {
                float w = t.row[c];
                float q = round_within(__fmul_rn(w, line.inverse), line.low, line.high);
                float value = __fmul_rn(q, line.scale);
                if (kept >> lane & 1u) {
                    u16 correction;
                    value = corrected(w, value, correction);
                    layer.corrections[place + __popc(kept & ((1u << lane) - 1u))] = correction;
                }
                layer.codes[row * cols + c] = (u8)(int)__fsub_rn(q, line.low);
                settle(sums, w, value);
            }
            place += __popc(kept);
        }
        sums.weights = warp_sum_double(sums.weights);
        sums.errors = warp_sum_double(sums.errors);
        if (lane == 0) {
            layer.sums[3 * group] = sums.weights;
            layer.sums[3 * group + 1] = sums.errors;
            layer.sums[3 * group + 2] = 0.0;
        }
    }
}

// One bit a kept element; `bits` is zero. One warp a row.
KERNEL mark_kept(const u64* starts, const u32* columns, u32* bits, int rows, int words) {
    u64 row = global_idx() >> 5;
    if (row >= rows) return;
    for (u64 i = starts[row] + (threadIdx.x & 31); i < starts[row + 1]; i += 32) {
        atomicOr(bits + row * words + columns[i] / 32, 1u << (columns[i] & 31));
    }
}

// Codes of a byte each into the planes of a packed matrix, one thread a tile of 16; places behind a row are 0.
KERNEL pack_codes(const u8* codes, u32* words, void* high, u64 n_tiles, int cols, int bits) {
    u64 i = global_idx();
    if (i >= n_tiles) return;
    int per_row = (cols + 15) / 16, first = (int)(i % per_row) * 16, n = min(16, cols - first);
    const u8* from = codes + i / per_row * cols + first;
    u32 word[4] = {0, 0, 0, 0}, above = 0;
#pragma unroll
    for (int c = 0; c < 16; c++) {
        u32 code = c < n ? from[c] : 0;
        if (bits == 2) {
            word[0] |= code << (2 * c);
        } else if (bits == 3) {
            word[0] |= (code & 3) << (2 * c);
            above |= code >> 2 << c;
        } else if (bits == 4) {
            word[c / 8] |= code << (4 * (c % 8));
        } else if (bits == 6) {
            word[c / 8] |= (code & 15) << (4 * (c % 8));
            above |= code >> 4 << (2 * c);
        } else {
            word[c / 4] |= code << (8 * (c % 4));
        }
    }
    int n_words = bits <= 3 ? 1 : bits <= 6 ? 2 : 4;
    for (int k = 0; k < 4; k++) {
        if (k < n_words) words[i * n_words + k] = word[k];
    }
    if (bits == 3) ((u16*)high)[i] = (u16)above;
    if (bits == 6) ((u32*)high)[i] = above;
}

// The sums of three columns of [n, 3], by one block of 1024, in an order that depends on n alone.
KERNEL total(const double* sums, u64 n, double* totals) {
    __shared__ double parts[3][32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    double mine[3] = {0.0, 0.0, 0.0};
    for (u64 i = threadIdx.x; i < n; i += blockDim.x) {
        for (int c = 0; c < 3; c++) mine[c] += sums[3 * i + c];
    }
    for (int c = 0; c < 3; c++) {
        mine[c] = warp_sum_double(mine[c]);
        if (lane == 0) parts[c][warp] = mine[c];
    }
    __syncthreads();
    if (warp > 0) return;
    for (int c = 0; c < 3; c++) {
        double sum = warp_sum_double(parts[c][lane]);
        if (lane == 0) totals[c] = sum;
    }
}

// One part a block of sum a[i] b[i].
KERNEL products(const float* a, const float* b, u64 n, double* parts) {
    __shared__ double of_warps[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
    double sum = 0.0;
    for (u64 i = global_idx(); i < n; i += (u64)gridDim.x * blockDim.x) sum += (double)a[i] * (double)b[i];
    sum = warp_sum_double(sum);
    if (lane == 0) of_warps[warp] = sum;
    __syncthreads();
    if (warp > 0) return;
    sum = warp_sum_double(lane < n_warps ? of_warps[lane] : 0.0);
    if (lane == 0) parts[blockIdx.x] = sum;
}
