// Matrices of a few bits times 1 to 8 vectors, on the tensor cores.
//
// A matrix lies in tiles of 16 rows and units of 128 columns (64 of a dense one), and is stored in the order in which it is
// read: a block computes some tiles, its warps share their units, and what a warp reads is one stream of stages, each of some
// units: their codes, then their scales, then their zeros. A lane finds in 16 bytes what the tensor core wants of its left
// operand (`decode_codes.cuh`). With `acc` the sum of `code * x`, a group adds `scale * (acc - zero * sum of x)`.
//
// Stages are copied to shared memory without waiting (`decode_ring.cuh`). A block takes no more than half of a processor, and
// begins to copy while the kernel before it still runs: the memory does not rest between two products.
//
// Each warp has the units of at most a few tiles. Partial sums of the warps meet in shared memory in a fixed order, which
// depends on the shape alone: a token's numbers do not depend on those beside it.

struct Gemv {
    const u8* stream;        // [blocks, warps, stages]
    const u32* scales;       // one group a row: [tiles, 8], half-precision scales of rows r and r + 8; else in the stream
    const u32* zeros;        // one group a row: [tiles, words], rows r and r + 8 at the same bits of both halves of a word
    const u32* element_starts;  // [rows + 1], null when there are none
    const u32* elements;     // place of the column in fragments of one token, value in the upper half; wide: two words
    const u32* tile_starts;  // [rows + 1], null when there are none
    const u32* tile_heads;   // step, scale in the upper half
    const uint4* tile_codes; // word q: columns 2q, 2q + 1, 2q + 8, 2q + 9
    const float* stream_in;  // [columns]: the vector before the norm of this weight, null: the fragments are there
    const float* norm;
    const u16* x;            // fragments
    const float* sums;       // their sums
    const u16* plain;        // fragments that the corrections meet; null: the same
    const float* bias;       // [rows] or null
    float* y;                // [n, y_stride], null: none
    u16* out;                // fragments of `silu(gate) up`
    float* out_sums;
    u64 block_bytes;         // of the stream
    u32 warp_bytes;
    u32 levels[8];           // lower bytes of 16 levels, upper bytes
    u32 middle;              // zeros of a symmetric layout at all places of a word; 0: there are zeros
    u32 rows, n_tiles, n_units, n_groups;  // units of a tile; groups of a tile, those past the end included
    u32 tiles_a_block, units_a_warp, n_warps, n_sparse;
    u32 n, y_stride, mode, wide;
    u32 columns;
    float eps;
    u32 depth;               // stages of a warp
    u32 at_stages, at_x, at_eighths, at_sums, at_parts, at_sparse;  // bytes in shared memory
    u32 x_is_shared;         // whether the fragments are copied there
};

#define MODE_STORE 0
#define MODE_ADD 1
#define MODE_SWIGLU 2  // rows 0 to 7 of a tile are gates, the others what they gate

#define UNIT_CODES (WORDS * 128)  // bytes
#define STAGE_UNITS (UNIT_CODES < 1024 ? 1024 / UNIT_CODES : 1)

// A unit in a stage. Must agree with `Unit` in `stream.rs`. GROUP is in steps of 16 columns; 0: one group a row.
template <u32 GROUP>
struct Unit {
    static constexpr u32 GROUPS = FORMAT < 16 && GROUP ? 8 / (GROUP ? GROUP : 8) : 0;
    static constexpr u32 SCALES = GROUPS * 32;
#if FORMAT < 16 && !CODEBOOK
    static constexpr u32 ZEROS = GROUPS * ZERO_WORDS * 4;
#else
    static constexpr u32 ZEROS = 0;
#endif
};

// Four fragments of the lane's token, from either memory; lanes without one keep what they have, which nobody reads.
__device__ __forceinline__ void load_fragments(const u16* x, u32 has_token, u32* b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
        : "l"(x), "r"(has_token)
        : "memory");
}

// Where a lane finds what belongs to a unit.
struct Place {
    u32 codes, scales, zeros;  // in shared memory
    const u16* x;              // fragments of many tokens
    u32 one_x;                 // those of a single one, in shared memory
    u32 sums;                  // in shared memory
};

// Adds a unit to the totals: of one token, or of the lane's two.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void consume(const Gemv& a, const Place& at, u32 n, u32 has_token, u32 zero_shift, float* total) {
    u32 b[STEPS][2], words[WORDS];
#pragma unroll
    for (int i = 0; i < STEPS / 2; i++) {
        if (MANY) {
            load_fragments(at.x + i * n * 32, has_token, b[2 * i]);
        } else {
            // All columns of the operand are the one token.
            uint4 v = shared16(at.one_x + i * 64);
            b[2 * i][0] = v.x, b[2 * i][1] = v.y, b[2 * i + 1][0] = v.z, b[2 * i + 1][1] = v.w;
        }
    }
#pragma unroll
    for (int i = 0; i < WORDS / 4; i++) {
        uint4 v = shared16(at.codes + i * 512);
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
#if WORDS % 4 == 2
    // The rest lies in 8 bytes a lane.
    u32 rest = at.codes + WORDS / 4 * 512 - 8 * (threadIdx.x & 31);
    words[4] = shared4(rest), words[5] = shared4(rest + 4);
#endif
    float acc[CLASSES][4];
#if FORMAT >= 16
#pragma unroll
    for (int i = 0; i < 4; i++) acc[0][i] = acc[1][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const u32* w = words + 4 * step;
#if FORMAT == 16
        multiply(acc[step & 1], w[0], w[1], w[2], w[3], b[step][0], b[step][1]);
#else
        u32 upper0, lower0, upper1, lower1;
        split(b[step][0], upper0, lower0);
        split(b[step][1], upper1, lower1);
        multiply(acc[0], w[0], w[1], w[2], w[3], upper0, upper1);
        multiply(acc[1], w[0], w[1], w[2], w[3], lower0, lower1);
#endif
    }
#pragma unroll
    for (int i = 0; i < 4; i++) total[i] += acc[0][i] + acc[1][i];
#else
    const u32 *r0 = words, *r8 = words + WORDS / 2;
    constexpr int LENGTH = GROUP ? GROUP : 8;
#pragma unroll
    for (int group = 0; group < 8 / LENGTH; group++) {
#pragma unroll
        for (int c = 0; c < CLASSES; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[c][i] = 0.0f;
#pragma unroll
        for (int step = group * LENGTH; step < (group + 1) * LENGTH; step++) {
            multiply(acc[class_of(step)], pair(a.levels, r0, step, 0), pair(a.levels, r8, step, 0), pair(a.levels, r0, step, 1),
                     pair(a.levels, r8, step, 1), b[step][0], b[step][1]);
        }
        float scale[2] = {1.0f, 1.0f}, sum[4];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = acc[0][i];
        if (GROUP) {
            u32 scales = shared4(at.scales + group * 32);
            scale[0] = half_to_float((u16)scales), scale[1] = half_to_float((u16)(scales >> 16));
#if !CODEBOOK
            // The zeros of both rows as subnormal numbers, as the codes are.
            u32 both = a.middle ? a.middle : shared4(at.zeros + group * (ZERO_WORDS * 4)) >> zero_shift;
            both &= ZERO_MASK * 0x10001u;
            float zero[2] = {half_to_float((u16)both), half_to_float((u16)(both >> 16))};
            float s0 = __uint_as_float(shared4(at.sums + (MANY ? 32 : 4) * group));
            float s1 = MANY ? __uint_as_float(shared4(at.sums + 32 * group + 4)) : 0.0f;
            sum[0] = fmaf(zero[0], s0, sum[0]), sum[2] = fmaf(zero[1], s0, sum[2]);
            if (MANY) sum[1] = fmaf(zero[0], s1, sum[1]), sum[3] = fmaf(zero[1], s1, sum[3]);
#endif
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!MANY && (i & 1)) continue;
            // Codes at higher bits are too large.
#pragma unroll
            for (int c = 1; c < CLASSES; c++) sum[i] = fmaf(acc[c][i], 1.0f / (float)(1 << (c * CLASS_SHIFT)), sum[i]);
            total[i] = GROUP ? fmaf(scale[i >> 1], sum[i], total[i]) : total[i] + sum[i];
        }
    }
#endif
}

// Where number `k` of a token lies among fragments of `n`, from where it lies among those of one.
__device__ __forceinline__ const u16* among(const u16* x, u32 place, u32 n) {
    return x + (u64)(place >> 5) * (n * 32) + (place & 31);
}

// Corrections of the rows of a block: a warp takes some rows at once, so that it waits for all of them together. `into` is
// [rows of the block, tokens].
template <bool MANY>
__device__ void corrections(const Gemv& a, const u16* plain, u32 first_row, u32 n_rows, u32 warp, u32 lane, float* into) {
    constexpr u32 WIDTH = MANY ? 8 : 1, ROWS = MANY ? 2 : 4;
    const u32 n = MANY ? a.n : 1;
    for (u32 r0 = warp * ROWS; r0 < n_rows; r0 += a.n_sparse * ROWS) {
        float y[ROWS][WIDTH] = {};
        u32 at[ROWS], end[ROWS];
        if (a.element_starts) {
            u32 longest = 0;
#pragma unroll
            for (u32 j = 0; j < ROWS; j++) {
                u32 row = min(first_row + r0 + j, a.rows - 1);
                bool is_there = r0 + j < n_rows && first_row + r0 + j < a.rows;
                at[j] = __ldg(a.element_starts + row), end[j] = is_there ? __ldg(a.element_starts + row + 1) : 0;
                if (end[j] > at[j]) longest = max(longest, end[j] - at[j]);
            }
            for (u32 done = lane; done - lane < longest; done += 64) {
                u32 column[ROWS][2];
                float value[ROWS][2];
#pragma unroll
                for (u32 j = 0; j < ROWS; j++)
#pragma unroll
                    for (u32 i = 0; i < 2; i++) {
                        u32 e = at[j] + done + 32 * i, word = 0;
                        column[j][i] = 0;
                        if (e < end[j]) {
                            word = __ldg(a.elements + (a.wide ? 2 * (u64)e + 1 : e));
                            column[j][i] = a.wide ? __ldg(a.elements + 2 * (u64)e) : word & 0xffff;
                        }
                        value[j][i] = half_to_float((u16)(word >> 16));
                    }
#pragma unroll
                for (u32 j = 0; j < ROWS; j++)
#pragma unroll
                    for (u32 i = 0; i < 2; i++) {
                        const u16* x = among(plain, column[j][i], n);
#pragma unroll
                        for (u32 k = 0; k < WIDTH; k++) {
                            if (k < n) y[j][k] = fmaf(value[j][i], half_to_float(x[32 * k]), y[j][k]);
                        }
                    }
            }
        }
        if (a.tile_starts) {
            u32 longest = 0;
#pragma unroll
            for (u32 j = 0; j < ROWS; j++) {
                u32 row = min(first_row + r0 + j, a.rows - 1);
                bool is_there = r0 + j < n_rows && first_row + r0 + j < a.rows;
                at[j] = __ldg(a.tile_starts + row), end[j] = is_there ? __ldg(a.tile_starts + row + 1) : 0;
                if (end[j] > at[j]) longest = max(longest, end[j] - at[j]);
            }
            for (u32 done = lane; done - lane < longest; done += 32) {
                u32 head[ROWS];
                uint4 codes[ROWS];
#pragma unroll
                for (u32 j = 0; j < ROWS; j++) {
                    u32 t = at[j] + done;
                    head[j] = 0, codes[j] = make_uint4(0, 0, 0, 0);
                    if (t < end[j]) head[j] = __ldg(a.tile_heads + t), codes[j] = __ldg(a.tile_codes + t);
                }
#pragma unroll
                for (u32 j = 0; j < ROWS; j++) {
                    u32 step = head[j] & 0xffff, words[4] = {codes[j].x, codes[j].y, codes[j].z, codes[j].w};
                    float scale = half_to_float((u16)(head[j] >> 16));
                    const u16* x = among(plain, (step >> 1) * 32 + (step & 1) * 4, n);
#pragma unroll
                    for (u32 k = 0; k < WIDTH; k++) {
                        if (k >= n) continue;
                        float sum = 0.0f;
#pragma unroll
                        for (u32 q = 0; q < 4; q++) {
                            uint2 v = *(const uint2*)(x + 32 * k + 8 * q);
                            sum = fmaf((float)(i8)(words[q]), half_to_float((u16)v.x), sum);
                            sum = fmaf((float)(i8)(words[q] >> 8), half_to_float((u16)(v.x >> 16)), sum);
                            sum = fmaf((float)(i8)(words[q] >> 16), half_to_float((u16)v.y), sum);
                            sum = fmaf((float)(i8)(words[q] >> 24), half_to_float((u16)(v.y >> 16)), sum);
                        }
                        y[j][k] = fmaf(scale, sum, y[j][k]);
                    }
                }
            }
        }
#pragma unroll
        for (u32 j = 0; j < ROWS; j++)
#pragma unroll
            for (u32 k = 0; k < WIDTH; k++) {
                float sum = warp_sum(y[j][k]);
                if (lane == 0 && r0 + j < n_rows) into[(r0 + j) * WIDTH + k] = sum;
            }
    }
}

// The negative sums of x over every group into shared memory, [groups, tokens]; for one group a row, that over all.
// `eighths` are sums of 8 inputs.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void group_sums(const Gemv& a, const float* eighths, float* sums) {
    constexpr u32 WIDTH = MANY ? 8 : 1;
    const u32 n = MANY ? a.n : 1;
    if (GROUP) {
        for (u32 i = threadIdx.x; i < a.n_groups * WIDTH; i += BLOCK_THREADS) {
            u32 group = i / WIDTH, k = min(i % WIDTH, n - 1);
            float sum = 0.0f;
#pragma unroll
            for (u32 j = 0; j < 2 * GROUP; j++) sum += eighths[(u64)(group * 2 * GROUP + j) * n + k];
            sums[i] = -sum;
        }
    } else {
        u32 lane = threadIdx.x & 31, k = threadIdx.x >> 5;
        for (; k < n; k += BLOCK_THREADS / 32) {
            float sum = 0.0f;
            for (u32 j = lane; j < a.n_units * 16; j += 32) sum += eighths[(u64)j * n + k];
            sum = warp_sum(sum);
            if (lane == 0) sums[k] = -sum;
        }
    }
}

// The stream of a warp: where its next stage comes from and where it goes.
template <u32 GROUP>
struct Stream {
    static constexpr u32 UNIT_BYTES = UNIT_CODES + Unit<GROUP>::SCALES + Unit<GROUP>::ZEROS;
    const u8* from;
    u32 unit_bytes, barriers, stages, unfetched;

    __device__ __forceinline__ Stream(const Gemv& a, u32 shared, u32 warp, u32 n_units) {
        unit_bytes = a.middle ? UNIT_BYTES - Unit<GROUP>::ZEROS : UNIT_BYTES;
        from = a.stream + blockIdx.x * a.block_bytes + warp * a.warp_bytes;
        barriers = shared + warp * a.depth * 8;
        stages = shared + a.at_stages + warp * a.depth * stage_bytes(STAGE_UNITS);
        unfetched = n_units;
    }

    __device__ __forceinline__ u32 stage_bytes(u32 n) const { return (n * unit_bytes + 15) & ~15u; }

    __device__ __forceinline__ void fetch(u32 slot, u32 lane) {
        if (!unfetched) return;
        u32 n = min(unfetched, STAGE_UNITS), bytes = stage_bytes(n);
        fill_stage(stages + slot * stage_bytes(STAGE_UNITS), from, bytes, barriers + 8 * slot, lane);
        from += bytes, unfetched -= n;
    }
};

// What a block holds in shared memory.
struct Block {
    u16* x;          // fragments, where there is room for them
    float* eighths;  // their sums, of a norm
    float* sums;     // of groups
    float* parts;    // [slots, 16, tokens]: slot `warp + tile` is what a warp adds to a tile
    float* sparse;   // [tiles, 16, tokens]
    u32 first_tile, n_tiles;
};

// A row of the block, corrections and bias included.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ float output(const Gemv& a, const Block& block, u32 tile, u32 r, u32 k) {
    constexpr u32 WIDTH = MANY ? 8 : 1;
    u32 first = tile * a.n_units / a.units_a_warp, last = ((tile + 1) * a.n_units - 1) / a.units_a_warp;
    float sum = 0.0f;
    for (u32 w = first; w <= last; w++) sum += block.parts[((w + tile) * 16 + r) * WIDTH + k];
    sum *= POWER;
    u32 of_all = block.first_tile + tile;
#if FORMAT < 16
    if (GROUP == 0) {
#if !CODEBOOK
        u32 word = a.middle ? a.middle : a.zeros[of_all * ZERO_WORDS + (r & 7) / ZERO_ROWS] >> ((r & 7) % ZERO_ROWS * ZERO_BITS + (r & 8) * 2);
        sum = fmaf((float)(word & ZERO_MASK), block.sums[MANY ? min(k, a.n - 1) : 0], sum);
#endif
        sum *= half_to_float((u16)(a.scales[of_all * 8 + (r & 7)] >> ((r & 8) * 2)));
    }
#endif
    if (a.n_sparse) sum += block.sparse[(tile * 16 + r) * WIDTH + k];
    if (a.bias) sum += a.bias[of_all * 16 + r];
    return sum;
}

template <u32 GROUP, bool MANY>
__device__ __forceinline__ void write_rows(const Gemv& a, const Block& block) {
    const u32 n = MANY ? a.n : 1;
    for (u32 i = threadIdx.x; i < block.n_tiles * 16 * n; i += BLOCK_THREADS) {
        u32 r = i & 15, k = MANY ? (i >> 4) % n : 0, tile = MANY ? (i >> 4) / n : i >> 4, row = (block.first_tile + tile) * 16 + r;
        if (row >= a.rows) continue;
        float* y = a.y + (u64)k * a.y_stride + row;
        float before = a.mode == MODE_ADD ? __ldcg(y) : 0.0f;
        *y = before + output<GROUP, MANY>(a, block, tile, r, k);
    }
}

// Eight lanes have the eight hidden numbers of a tile for one token.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void write_hidden(const Gemv& a, const Block& block) {
    const u32 n = MANY ? a.n : 1, n_hidden = block.n_tiles * 8 * n, padded = (n_hidden + 31) & ~31u;
    for (u32 i = threadIdx.x; i < padded; i += BLOCK_THREADS) {
        u32 r = i & 7, k = MANY ? (i >> 3) % n : 0, tile = MANY ? (i >> 3) / n : i >> 3, column = (block.first_tile + tile) * 8 + r;
        bool is_there = i < n_hidden;
        float hidden = 0.0f;
        if (is_there) {
            float gate = output<GROUP, MANY>(a, block, tile, r, k), up = output<GROUP, MANY>(a, block, tile, r + 8, k);
            hidden = gate / (1.0f + __expf(-gate)) * up;
            if (a.y && column < a.y_stride) a.y[(u64)k * a.y_stride + column] = hidden;
        }
        u16 rounded = saturated_half(hidden);
        float sum = eighth_sum(half_to_float(rounded));
        if (is_there) {
            a.out[fragment_place(column, n, k)] = rounded;
            if (r == 0) a.out_sums[(u64)(column >> 3) * n + k] = sum;
        }
    }
}

// The vectors to shared memory, where they have room, a single one with its norm if that is asked for; sums of groups.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void prepare(const Gemv& a, const Block& block, float* partial) {
    const float* eighths = a.sums;
    if (!MANY && a.norm) {
        norm_row(a.stream_in, a.norm, a.columns, a.eps, NormOut{block.x, block.eighths, nullptr, 1, 0}, partial);
        eighths = block.eighths;
        __syncthreads();
    } else if (a.x_is_shared) {
        u32 n_pieces = ((a.columns + 127) & ~127u) / 8 * (MANY ? a.n : 1);
#pragma unroll 8
        for (u32 i = threadIdx.x; i < n_pieces; i += BLOCK_THREADS) ((uint4*)block.x)[i] = __ldcg((const uint4*)a.x + i);
    }
#if FORMAT < 16 && !CODEBOOK
    group_sums<GROUP, MANY>(a, eighths, block.sums);
#endif
    __syncthreads();
}

template <u32 GROUP, bool MANY>
__device__ __forceinline__ void gemv(const Gemv& a) {
    constexpr u32 WIDTH = MANY ? 8 : 1;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ float partial[32];
    u32 lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), row = lane >> 2, quarter = lane & 3;
    Block block = {(u16*)(shared + a.at_x), (float*)(shared + a.at_eighths), (float*)(shared + a.at_sums),
                   (float*)(shared + a.at_parts), (float*)(shared + a.at_sparse), blockIdx.x * a.tiles_a_block, 0};
    block.n_tiles = min(a.tiles_a_block, a.n_tiles - block.first_tile);
    u32 all = block.n_tiles * a.n_units, first = min(warp < a.n_warps ? warp * a.units_a_warp : all, all);
    u32 left = min(a.units_a_warp, all - first);
    Stream<GROUP> stream(a, (u32)__cvta_generic_to_shared(shared), warp, left);
    if (left) {
        if (lane == 0) make_barriers(stream.barriers, a.depth);
        __syncwarp();
        for (u32 slot = 0; slot < a.depth; slot++) stream.fetch(slot, lane);
    }
    wait_for_previous();
    let_next_start();
    prepare<GROUP, MANY>(a, block, partial);
    if (left) {
        const u32 n = MANY ? a.n : 1, has_token = row < n;
        u32 tile = first / a.n_units, unit = first - tile * a.n_units, zero_shift = 0, my_scales = row * 4, my_zeros = 0;
#if FORMAT < 16 && !CODEBOOK
        zero_shift = row % ZERO_ROWS * ZERO_BITS, my_zeros = row / ZERO_ROWS * 4;
#endif
        const u16* x = (a.x_is_shared ? block.x : a.x) + row * 32 + quarter * 8;
        u32 one_x = (u32)__cvta_generic_to_shared(block.x) + quarter * 16;
        u32 sums = (u32)__cvta_generic_to_shared(block.sums) + (MANY ? 8 * quarter : 0);
        // The compiler shall keep these, not compute them again for every unit.
        asm("" : "+l"(x), "+r"(one_x), "+r"(sums), "+r"(zero_shift), "+r"(my_scales), "+r"(my_zeros));
        float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        auto deposit = [&]() {
            float* part = block.parts + (warp + tile) * 16 * WIDTH;
            if (MANY) {
                *(float2*)(part + row * 8 + 2 * quarter) = make_float2(total[0], total[1]);
                *(float2*)(part + (row + 8) * 8 + 2 * quarter) = make_float2(total[2], total[3]);
            } else if (quarter == 0) {
                part[row] = total[0], part[row + 8] = total[2];
            }
            total[0] = total[1] = total[2] = total[3] = 0.0f;
        };
        u32 slot = 0, parity = 0;
#pragma unroll 1
        while (left) {
            wait_for_stage(stream.barriers + 8 * slot, parity);
            u32 in_stage = min(left, STAGE_UNITS);
            Place at;
            at.codes = stream.stages + slot * stream.stage_bytes(STAGE_UNITS);
            at.scales = at.codes + in_stage * UNIT_CODES + my_scales;
            at.zeros = at.scales - my_scales + in_stage * Unit<GROUP>::SCALES + my_zeros;
            at.codes += lane * 16;
            left -= in_stage;
#pragma unroll 1
            for (; in_stage; in_stage--) {
                at.x = x + (u64)unit * (STEPS / 2 * 32 * n), at.one_x = one_x + unit * (STEPS * 32);
                at.sums = sums + unit * (Unit<GROUP>::GROUPS * WIDTH * 4);
                consume<GROUP, MANY>(a, at, n, has_token, zero_shift, total);
                at.codes += UNIT_CODES, at.scales += Unit<GROUP>::SCALES, at.zeros += Unit<GROUP>::ZEROS;
                if (++unit == a.n_units) deposit(), unit = 0, tile++;
            }
            // All lanes have read the stage.
            __syncwarp();
            stream.fetch(slot, lane);
            if (++slot == a.depth) slot = 0, parity ^= 1;
        }
        // What is left of the last tile.
        if (unit) deposit();
#if FORMAT < 16
    } else if (warp >= a.n_warps) {
        const u16* plain = MANY || a.plain ? a.plain : block.x;
        corrections<MANY>(a, plain, block.first_tile * 16, block.n_tiles * 16, warp - a.n_warps, lane, block.sparse);
#endif
    }
    __syncthreads();
    if (a.mode == MODE_SWIGLU) write_hidden<GROUP, MANY>(a, block);
    else write_rows<GROUP, MANY>(a, block);
}

// Two blocks a processor, this kernel's and the next one's: 80 registers.
#define VARIANT(NAME, GROUP, MANY) \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 2) NAME(const __grid_constant__ Gemv a) { gemv<GROUP, MANY>(a); }

#if FORMAT >= 16
VARIANT(gemv_row_one, 0, false)
VARIANT(gemv_row_many, 0, true)
#else
VARIANT(gemv_32_one, 2, false)
VARIANT(gemv_32_many, 2, true)
VARIANT(gemv_64_one, 4, false)
VARIANT(gemv_64_many, 4, true)
VARIANT(gemv_128_one, 8, false)
VARIANT(gemv_128_many, 8, true)
VARIANT(gemv_row_one, 0, false)
VARIANT(gemv_row_many, 0, true)
#endif
