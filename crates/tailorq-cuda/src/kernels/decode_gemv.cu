// Matrices of a few bits times 1 to 8 vectors, on the tensor cores.
//
// A matrix lies in tiles of 16 rows and chunks of 128 columns, rearranged so that a warp reads a chunk of a tile in 16 bytes
// a lane, and each lane finds in its words what the tensor core wants of its left operand: two codes at the same bits of both
// halves of a word become two half-precision numbers by a mask alone, because small integers are the subnormal numbers
// `code * 2^(bit - 24)`. Codes at different bits go to accumulators of their own, whose powers of two are put right once a
// group. With `acc` the sum of `code * x`, a group adds `scale * (acc - zero * sum of x)`.
//
// A block computes some tiles; its warps share their chunks. Partial sums of the warps meet in shared memory in a fixed
// order, which depends on the shape alone: a token's numbers do not depend on those beside it.
//
// FORMAT is 2, 3, 4, 6 or 8 bits; with CODEBOOK its codes are places in a table of 2^FORMAT levels. 16 is half precision, 17
// bfloat16, both without scales.

#ifndef CODEBOOK
#define CODEBOOK 0
#endif

#if FORMAT >= 16
#define WORDS 16  // of a lane in a unit
#define STEPS 4   // of 16 columns in a unit
#define DEPTH 3   // units that a warp has under way
#elif FORMAT == 2
#define WORDS 4
#define STEPS 8
#define DEPTH 4
#elif FORMAT == 3
#define WORDS 6
#define STEPS 8
#define DEPTH 3
#elif FORMAT == 4
#define WORDS 8
#define STEPS 8
#define DEPTH 3
#elif FORMAT == 6
#define WORDS 12
#define STEPS 8
#define DEPTH 2
#else
#define WORDS 16
#define STEPS 8
#define DEPTH 2
#endif

#if CODEBOOK || FORMAT == 6 || FORMAT >= 8
#define CLASSES 2  // of accumulators: all the same, but two do not wait for each other
#define CLASS_SHIFT 0
#elif FORMAT == 2
#define CLASSES 4
#define CLASS_SHIFT 2
#elif FORMAT == 3
#define CLASSES 3
#define CLASS_SHIFT 3
#else
#define CLASSES 2
#define CLASS_SHIFT 4
#endif

struct Gemv {
    const u8* codes;         // [tiles, units, WORDS / 4, lanes, 16 bytes], 3 bits: 16 and then 8 bytes
    const u32* scales;       // [tiles, groups, 8]: half-precision scales of rows r and r + 8
    const u32* zeros;        // [tiles, groups, words]: rows r and r + 8 at the same bits of both halves of a word
    const u32* element_starts;  // [rows + 1], null when there are none
    const u32* elements;     // place of the column in fragments of one token, value in the upper half; wide: two words
    const u32* tile_starts;  // [rows + 1], null when there are none
    const u32* tile_heads;   // step, scale in the upper half
    const uint4* tile_codes; // word q: columns 2q, 2q + 1, 2q + 8, 2q + 9
    const u16* x;            // fragments
    const float* sums;       // their sums
    const u16* plain;        // fragments that the corrections meet
    const float* bias;       // [rows] or null
    float* y;                // [n, y_stride], null: none
    u16* out;                // fragments of `silu(gate) up`
    float* out_sums;
    u32 levels[8];           // lower bytes of 16 levels, upper bytes
    u32 zero_step;           // words of a unit (of a tile with one group a row); 0: four groups serve all units
    u32 rows, n_tiles, n_units, n_groups;  // units of a tile; groups of a tile, those past the end included
    u32 tiles_a_block, n_warps, n_sparse;
    u32 n, y_stride, mode, wide;
};

#define MODE_STORE 0
#define MODE_ADD 1
#define MODE_SWIGLU 2  // tiles alternate between gate and up

#if FORMAT < 16
#if FORMAT == 2
#define ZERO_BITS 2
#elif FORMAT <= 4
#define ZERO_BITS 4
#else
#define ZERO_BITS 8
#endif
#define ZERO_MASK ((1u << ZERO_BITS) - 1)
#define ZERO_ROWS (16 / ZERO_BITS)  // rows of half a word
#define ZERO_WORDS (ZERO_BITS / 2)  // words of a group
#endif

// Codes that are subnormal numbers are too small by this.
#if CODEBOOK || FORMAT >= 16
#define POWER 1.0f
#else
#define POWER 16777216.0f
#endif

struct Unit {
    u32 words[WORDS];
    u32 scales[4], zeros[4];
};

__device__ __forceinline__ uint4 stream16(const u8* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ uint2 stream8(const u8* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

// Where a lane finds its part of a block's first unit.
struct Streams {
    const u8* codes;
    const u32* scales;
    const u32* zeros;
};

template <u32 GROUP>
__device__ __forceinline__ void load(const Streams& from, u32 unit, u32 lane, u32 zero_step, Unit& into) {
    constexpr u32 GROUPS = 8 / (GROUP ? GROUP : 8);
    const u8* codes = from.codes + (u64)unit * (WORDS * 128);
#pragma unroll
    for (int i = 0; i < WORDS / 4; i++) {
        uint4 v = stream16(codes + i * 512);
        into.words[4 * i] = v.x, into.words[4 * i + 1] = v.y, into.words[4 * i + 2] = v.z, into.words[4 * i + 3] = v.w;
    }
#if WORDS % 4 == 2
    uint2 v = stream8(codes + 512 - lane * 8);
    into.words[4] = v.x, into.words[5] = v.y;
#endif
#if FORMAT < 16
    if (GROUP == 0) return;
    const u32* scales = from.scales + (u64)unit * (GROUPS * 8);
#pragma unroll
    for (u32 i = 0; i < GROUPS; i++) into.scales[i] = __ldg(scales + i * 8);
#if !CODEBOOK
    const u32* zeros = from.zeros + (u64)unit * zero_step;
#pragma unroll
    for (u32 i = 0; i < GROUPS; i++) into.zeros[i] = __ldg(zeros + i * ZERO_WORDS);
#endif
#endif
}

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
    return y;
}

// Two numbers of one row at `step` in the lower or upper eight columns, from the row's words `w`.
__device__ __forceinline__ u32 pair(const Gemv& a, const u32* w, int step, int high) {
#if CODEBOOK
    // Selectors of four codes each, in nibbles.
#if FORMAT == 4
    u32 all = w[(step / 4) * 2 + high], turn = (step / 2) & 1;
    u32 which = (all & 0x77777777u) >> (16 * turn), upper = ((all >> 3) & 0x11111111u) >> (16 * turn);
    u32 mask = permute(0x0000ff00u, 0, upper);
    u32 low = permute(a.levels[0], a.levels[1], which), more = permute(a.levels[4], a.levels[5], which);
    low = (permute(a.levels[2], a.levels[3], which) & mask) | (low & ~mask);
    more = (permute(a.levels[6], a.levels[7], which) & mask) | (more & ~mask);
#else
    u32 turn = (step / 2) & 1, place = step / 4;
    u32 which = (w[high] >> (2 * place)) & 0x33333333u;
#if FORMAT == 3
    u32 of = high * 2 + place;
    u32 top = of == 0 ? w[2] << 2 : of == 1 ? w[2] << 1 : of == 2 ? w[2] : w[2] >> 1;
    which |= top & 0x44444444u;
#endif
    which >>= 16 * turn;
    u32 low = permute(a.levels[0], a.levels[1], which), more = permute(a.levels[4], a.levels[5], which);
#endif
    return permute(low, more, step & 1 ? 0x7362u : 0x5140u);
#elif FORMAT >= 16
    return 0;
#elif FORMAT == 2
    return (step < 4 ? w[high] : w[high] >> 8) & (0x00030003u << (2 * (step & 3)));
#elif FORMAT == 3
    const u32 m = 0x00070007u;
    if (step < 3) return w[high] & (m << (3 * step));
    if (step < 5) return (w[high] >> 9) & (m << (3 * (step - 3)));
    if (step < 7) return (high ? w[2] >> 9 : w[2]) & (m << (3 * (step - 5)));
    if (!high) return (w[2] >> 6) & m;
    return ((w[0] >> 15) & 0x00010001u) | ((w[1] >> 14) & 0x00020002u) | ((w[2] >> 13) & 0x00040004u);
#elif FORMAT == 4
    u32 word = w[(step / 4) * 2 + high];
    return ((step & 2) ? word >> 8 : word) & (0x000f000fu << (4 * (step & 1)));
#elif FORMAT == 6
    const u32 m = 0x003f003fu;
    const u32* three = w + 3 * high;
    if (step < 6) return ((step & 1) ? three[step / 2] >> 6 : three[step / 2]) & m;
    if (step == 6) return ((three[0] >> 12) & 0x000f000fu) | ((three[2] >> 8) & 0x00300030u);
    return ((three[1] >> 12) & 0x000f000fu) | ((three[2] >> 10) & 0x00300030u);
#else
    u32 word = w[(step / 2) * 2 + high];
    return ((step & 1) ? word >> 8 : word) & 0x00ff00ffu;
#endif
}

__device__ __forceinline__ int class_of(int step) {
#if CODEBOOK || FORMAT == 6 || FORMAT >= 8
    return step & 1;
#elif FORMAT == 2
    return step & 3;
#elif FORMAT == 3
    return step < 3 ? step : step == 4 || step == 6 ? 1 : 0;
#else
    return step & 1;
#endif
}

__device__ __forceinline__ void multiply(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if FORMAT == 17
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#if FORMAT == 17
// Two half-precision numbers as two pairs of bfloat16 whose sum they are.
__device__ __forceinline__ void split(u32 x, u32& upper, u32& lower) {
    float a = half_to_float((u16)x), b = half_to_float((u16)(x >> 16));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(upper) : "f"(b), "f"(a));
    a -= __uint_as_float(upper << 16), b -= __uint_as_float(upper & 0xffff0000u);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(lower) : "f"(b), "f"(a));
}
#endif

// Adds a unit to the totals. `x` are the unit's fragments, `sums` the sums of its groups: of one token, or of the lane's two.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void consume(const Gemv& a, const Unit& unit, const u16* x, const float* sums, u32 zero_shift, float* total) {
    const u32 n = MANY ? a.n : 1;
    u32 b[STEPS][2];
#pragma unroll
    for (int i = 0; i < STEPS / 2; i++) {
        uint4 v = *(const uint4*)(x + i * n * 32);
        b[2 * i][0] = v.x, b[2 * i][1] = v.y, b[2 * i + 1][0] = v.z, b[2 * i + 1][1] = v.w;
    }
    float acc[CLASSES][4];
#if FORMAT >= 16
#pragma unroll
    for (int i = 0; i < 4; i++) acc[0][i] = acc[1][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const u32* w = unit.words + 4 * step;
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
    const u32 *r0 = unit.words, *r8 = unit.words + WORDS / 2;
    constexpr int LENGTH = GROUP ? GROUP : 8;
#pragma unroll
    for (int group = 0; group < 8 / LENGTH; group++) {
#pragma unroll
        for (int c = 0; c < CLASSES; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[c][i] = 0.0f;
#pragma unroll
        for (int step = group * LENGTH; step < (group + 1) * LENGTH; step++) {
            multiply(acc[class_of(step)], pair(a, r0, step, 0), pair(a, r8, step, 0), pair(a, r0, step, 1),
                     pair(a, r8, step, 1), b[step][0], b[step][1]);
        }
        float scale[2] = {1.0f, 1.0f}, sum[4];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = acc[0][i];
        if (GROUP) {
            scale[0] = half_to_float((u16)unit.scales[group]), scale[1] = half_to_float((u16)(unit.scales[group] >> 16));
#if !CODEBOOK
            // The zeros of both rows as subnormal numbers, as the codes are.
            u32 both = (unit.zeros[group] >> zero_shift) & (ZERO_MASK * 0x10001u);
            float zero[2] = {half_to_float((u16)both), half_to_float((u16)(both >> 16))};
            float s0 = sums[MANY ? 8 * group : group], s1 = MANY ? sums[8 * group + 1] : 0.0f;
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

// Corrections of the rows of a block: a warp a row. `into` is [rows of the block, tokens].
template <bool MANY>
__device__ void corrections(const Gemv& a, u32 first_row, u32 n_rows, u32 warp, u32 lane, float* into) {
    for (u32 r = warp; r < n_rows; r += a.n_sparse) {
        u32 row = first_row + r;
        float y[MANY ? 8 : 1] = {};
        if (row < a.rows && a.element_starts) {
            u32 end = a.element_starts[row + 1];
            for (u32 at = a.element_starts[row] + lane; at < end; at += 128) {
                u32 column[4];
                float value[4];
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    u32 j = at + 32 * i;
                    column[i] = 0, value[i] = 0.0f;
                    if (j >= end) continue;
                    u32 word = __ldg(a.elements + (a.wide ? 2 * (u64)j + 1 : j));
                    value[i] = half_to_float((u16)(word >> 16));
                    column[i] = a.wide ? __ldg(a.elements + 2 * (u64)j) : word & 0xffff;
                }
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    if (MANY) {
#pragma unroll
                        for (u32 k = 0; k < (MANY ? 8 : 1); k++) {
                            if (k >= a.n) continue;
                            u64 place = ((u64)(column[i] >> 5) * a.n + k) * 32 + (column[i] & 31);
                            y[k] = fmaf(value[i], half_to_float(a.plain[place]), y[k]);
                        }
                    } else {
                        y[0] = fmaf(value[i], half_to_float(a.plain[column[i]]), y[0]);
                    }
                }
            }
        }
        if (row < a.rows && a.tile_starts) {
            u32 end = a.tile_starts[row + 1];
            for (u32 at = a.tile_starts[row] + lane; at < end; at += 32) {
                u32 head = __ldg(a.tile_heads + at), step = head & 0xffff;
                float scale = half_to_float((u16)(head >> 16));
                uint4 codes = __ldg(a.tile_codes + at);
                u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
                for (u32 k = 0; k < (MANY ? 8 : 1); k++) {
                    if (k >= a.n) continue;
                    const u16* x = a.plain + ((u64)(step >> 1) * a.n + k) * 32 + (step & 1) * 4;
                    float sum = 0.0f;
#pragma unroll
                    for (u32 q = 0; q < 4; q++) {
                        uint2 v = *(const uint2*)(x + 8 * q);
                        sum = fmaf((float)(i8)(words[q]), half_to_float((u16)v.x), sum);
                        sum = fmaf((float)(i8)(words[q] >> 8), half_to_float((u16)(v.x >> 16)), sum);
                        sum = fmaf((float)(i8)(words[q] >> 16), half_to_float((u16)v.y), sum);
                        sum = fmaf((float)(i8)(words[q] >> 24), half_to_float((u16)(v.y >> 16)), sum);
                    }
                    y[k] = fmaf(scale, sum, y[k]);
                }
            }
        }
#pragma unroll
        for (u32 k = 0; k < (MANY ? 8 : 1); k++) {
            if (k >= a.n) continue;
            float sum = warp_sum(y[k]);
            if (lane == 0) into[r * (MANY ? 8 : 1) + k] = sum;
        }
    }
}

// The negative sums of x over every group into shared memory, [groups, tokens]; for one group a row, that over all.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void group_sums(const Gemv& a, float* sums) {
    constexpr u32 WIDTH = MANY ? 8 : 1;
    if (GROUP) {
        for (u32 i = threadIdx.x; i < a.n_groups * WIDTH; i += blockDim.x) {
            u32 group = i / WIDTH, k = min(i % WIDTH, a.n - 1);
            float sum = 0.0f;
#pragma unroll
            for (u32 j = 0; j < GROUP; j++) sum += a.sums[(u64)(group * GROUP + j) * a.n + k];
            sums[i] = -sum;
        }
    } else {
        u32 lane = threadIdx.x & 31, k = threadIdx.x >> 5;
        for (; k < a.n; k += blockDim.x >> 5) {
            float sum = 0.0f;
            for (u32 j = lane; j < a.n_units * 8; j += 32) sum += a.sums[(u64)j * a.n + k];
            sum = warp_sum(sum);
            if (lane == 0) sums[k] = -sum;
        }
    }
}

template <u32 GROUP, bool MANY>
__device__ __forceinline__ void gemv(const Gemv& a) {
    constexpr u32 WIDTH = MANY ? 8 : 1;
    extern __shared__ float shared[];
    u32 lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), row = lane >> 2, quarter = lane & 3;
    u32 first_tile = blockIdx.x * a.tiles_a_block, n_tiles = min(a.tiles_a_block, a.n_tiles - first_tile);
    u32 all = n_tiles * a.n_units, n_outputs = a.tiles_a_block * 16 * WIDTH;
    float* sparse = shared;                              // [tiles of the block, 16, tokens]
    float* parts = sparse + n_outputs;                   // [warps, tiles of the block, 16, tokens]
    float* sums = parts + a.n_warps * n_outputs;
    let_next_start();
    Unit ring[DEPTH];
    Streams from;
    from.codes = a.codes + (u64)first_tile * a.n_units * (WORDS * 128) + lane * 16;
    u32 zero_shift = 0, zero_step = 0;
#if FORMAT < 16
    constexpr u32 GROUPS = 8 / (GROUP ? GROUP : 8);
    from.scales = a.scales + (u64)first_tile * a.n_units * (GROUPS * 8) + row;
#if !CODEBOOK
    zero_step = a.zero_step;
    from.zeros = a.zeros + (u64)first_tile * a.n_units * zero_step + row / ZERO_ROWS;
    zero_shift = row % ZERO_ROWS * ZERO_BITS;
#endif
#endif
    if (warp < a.n_warps) {
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) {
            u32 u = warp + d * a.n_warps;
            if (u < all) load<GROUP>(from, u, lane, zero_step, ring[d]);
        }
    }
    for (u32 i = threadIdx.x; i < (a.n_warps + 1) * n_outputs; i += blockDim.x) shared[i] = 0.0f;
    wait_for_previous();
#if FORMAT < 16 && !CODEBOOK
    group_sums<GROUP, MANY>(a, sums);
#endif
    __syncthreads();
    if (warp < a.n_warps) {
        // Lanes of tokens that are not there repeat the last one; nobody reads their results.
        const u32 n = MANY ? a.n : 1;
        const u16* x = a.x + (MANY ? min(row, n - 1) * 32 : 0) + quarter * 8;
        const float* my_sums = sums + (MANY ? 2 * quarter : 0);
        float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        u32 unit = warp;
        float* part = parts + warp * n_outputs;
        while (unit >= a.n_units) unit -= a.n_units, part += 16 * WIDTH;
        auto deposit = [&]() {
            if (MANY) {
                *(float2*)(part + row * 8 + 2 * quarter) = make_float2(total[0], total[1]);
                *(float2*)(part + (row + 8) * 8 + 2 * quarter) = make_float2(total[2], total[3]);
            } else if (quarter == 0) {
                part[row] = total[0], part[row + 8] = total[2];
            }
        };
        for (u32 u = warp; u < all;) {
#pragma unroll
            for (u32 d = 0; d < DEPTH; d++) {
                consume<GROUP, MANY>(a, ring[d], x + (u64)unit * (STEPS / 2 * 32 * n),
                                     my_sums + (GROUP ? unit * (8 / (GROUP ? GROUP : 8) * WIDTH) : 0), zero_shift, total);
                u32 next = u + DEPTH * a.n_warps;
                if (next < all) load<GROUP>(from, next, lane, zero_step, ring[d]);
                u += a.n_warps, unit += a.n_warps;
                if (unit >= a.n_units) {
                    deposit();
                    total[0] = total[1] = total[2] = total[3] = 0.0f;
                    do unit -= a.n_units, part += 16 * WIDTH;
                    while (unit >= a.n_units);
                }
                if (u >= all) break;
            }
        }
        // The last tile of this warp, if it is one of this block.
        if (part < parts + warp * n_outputs + n_tiles * 16 * WIDTH) deposit();
#if FORMAT < 16
    } else if (a.n_sparse) {
        corrections<MANY>(a, first_tile * 16, n_tiles * 16, warp - a.n_warps, lane, sparse);
#endif
    }
    __syncthreads();
    u32 n_values = n_tiles * 16 * WIDTH;
    for (u32 i = threadIdx.x; i < n_values; i += blockDim.x) {
        u32 k = i % WIDTH, row = first_tile * 16 + i / WIDTH;
        float sum = 0.0f;
        for (u32 w = 0; w < a.n_warps; w++) sum += parts[(u64)w * n_outputs + i];
        sum *= POWER;
#if FORMAT < 16
        if (GROUP == 0) {
            u32 r = row & 15, tile = row >> 4;
#if !CODEBOOK
            u32 word = a.zeros[tile * a.zero_step + (r & 7) / ZERO_ROWS];
            u32 zero = (word >> ((r & 7) % ZERO_ROWS * ZERO_BITS + (r & 8) * 2)) & ZERO_MASK;
            sum = fmaf((float)zero, sums[min(k, a.n - 1)], sum);
#endif
            sum *= half_to_float((u16)(a.scales[tile * 8 + (r & 7)] >> ((r & 8) * 2)));
        }
#endif
        sum += sparse[i];
        if (row < a.rows && a.bias) sum += a.bias[row];
        if (a.mode == MODE_SWIGLU) {
            // Where this thread alone has read.
            sparse[i] = sum;
        } else if (row < a.rows && k < a.n) {
            float* y = a.y + (u64)k * a.y_stride + row;
            *y = a.mode == MODE_ADD ? *y + sum : sum;
        }
    }
    if (a.mode != MODE_SWIGLU) return;
    __syncthreads();
    // Sixteen lanes have the sixteen outputs of a tile for one token.
    u32 n_hidden = n_tiles / 2 * 16 * a.n, padded = (n_hidden + 31) & ~31u;
    for (u32 i = threadIdx.x; i < padded; i += blockDim.x) {
        u32 r = i & 15, k = (i >> 4) % a.n, two = (i >> 4) / a.n;
        bool is_there = i < n_hidden;
        u32 column = (first_tile / 2 + two) * 16 + r;
        float hidden = 0.0f;
        if (is_there) {
            float gate = sparse[(two * 32 + r) * WIDTH + k], up = sparse[(two * 32 + 16 + r) * WIDTH + k];
            hidden = gate / (1.0f + __expf(-gate)) * up;
            if (a.y && column < a.y_stride) a.y[(u64)k * a.y_stride + column] = hidden;
        }
        u16 rounded = saturated_half(hidden);
        float sum = half_warp_sum(half_to_float(rounded));
        if (is_there) {
            a.out[fragment_place(column, a.n, k)] = rounded;
            if (r == 0) a.out_sums[(u64)(column >> 4) * a.n + k] = sum;
        }
    }
}

// Twelve warps a block at most, two such blocks a processor: 80 registers.
#define VARIANT(NAME, GROUP, MANY) \
    extern "C" __global__ void __launch_bounds__(384, 2) NAME(const __grid_constant__ Gemv a) { gemv<GROUP, MANY>(a); }

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
