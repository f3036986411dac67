// Matrices of a few bits times 1 to 8 vectors, on the tensor cores.
//
// A matrix lies in tiles of 16 rows and chunks of 128 columns, rearranged so that a warp reads a chunk of a tile in 16 bytes
// a lane, and each lane finds in its words what the tensor core wants of its left operand: two codes at the same bits of both
// halves of a word become two half-precision numbers by a mask alone, because small integers are the subnormal numbers
// `code * 2^(bit - 24)`. Codes at different bits go to accumulators of their own, whose powers of two are put right once a
// group. With `acc` the sum of `code * x`, a group adds `scale * (acc - zero * sum of x)`.
//
// Each lane copies what it will read of the coming units into shared memory of its own, without waiting (`cp.async`), so that
// the registers of a unit are free for the next and nothing waits but for the oldest copy.
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
#else
#define WORDS (2 * FORMAT)
#define STEPS 8
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
    u32 stages;              // where in shared memory the stages begin
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

// A unit in shared memory: WORDS / 4 times 16 bytes a lane (3 bits: 16 and 8), then, for each group, scales and zeros, 4 bytes
// a lane each. Must agree with `stage_bytes` in `matrix.rs`.
template <u32 GROUP>
struct Stage {
    static constexpr u32 GROUPS = FORMAT < 16 && GROUP ? 8 / (GROUP ? GROUP : 8) : 0;
    static constexpr u32 ZEROS = CODEBOOK ? 0 : GROUPS;
    static constexpr u32 BYTES = WORDS * 128 + (GROUPS + ZEROS) * 128;
    static constexpr u32 FIT = 4096 / BYTES;
    static constexpr u32 DEPTH = FIT < 2 ? 2 : FIT > 4 ? 4 : FIT;  // units that a warp has under way
};

// Where a lane finds its part of the unit that is copied next.
struct Streams {
    const u8* codes;
    const u32* scales;
    const u32* zeros;
};

__device__ __forceinline__ void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy8(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy4(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <u32 N>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ uint4 shared16(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}

__device__ __forceinline__ u32 shared4(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}

// Starts to copy the unit at `from` to the stage at `to`.
template <u32 GROUP>
__device__ __forceinline__ void fetch(const Streams& from, u32 to, u32 lane) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; i++) copy16(to + i * 512 + lane * 16, from.codes + i * 512);
#if WORDS % 4 == 2
    copy8(to + 512 + lane * 8, from.codes + 512 - lane * 8);
#endif
#pragma unroll
    for (u32 i = 0; i < Stage<GROUP>::GROUPS; i++) copy4(to + WORDS * 128 + i * 128 + lane * 4, from.scales + i * 8);
#if FORMAT < 16
#pragma unroll
    for (u32 i = 0; i < Stage<GROUP>::ZEROS; i++) {
        copy4(to + WORDS * 128 + (Stage<GROUP>::GROUPS + i) * 128 + lane * 4, from.zeros + i * ZERO_WORDS);
    }
#endif
}

// Four fragments of the lane's token; lanes without one keep what they have, which nobody reads.
__device__ __forceinline__ void load_fragments(const u16* x, u32 has_token, u32* b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
        : "l"(x), "r"(has_token)
        : "memory");
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

// Adds the unit in a stage to the totals. `x` are the unit's fragments, `sums` the sums of its groups: of one token, or of the
// lane's two.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void consume(const Gemv& a, u32 stage, u32 lane, const u16* x, u32 has_token, u32 sums, u32 zero_shift,
                                        float* total) {
    const u32 n = MANY ? a.n : 1;
    u32 b[STEPS][2], words[WORDS];
#pragma unroll
    for (int i = 0; i < STEPS / 2; i++) load_fragments(x + i * n * 32, has_token, b[2 * i]);
#pragma unroll
    for (int i = 0; i < WORDS / 4; i++) {
        uint4 v = shared16(stage + i * 512 + lane * 16);
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
#if WORDS % 4 == 2
    words[4] = shared4(stage + 512 + lane * 8), words[5] = shared4(stage + 512 + lane * 8 + 4);
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
    const u32 beside = stage + WORDS * 128 + lane * 4;
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
            u32 scales = shared4(beside + group * 128);
            scale[0] = half_to_float((u16)scales), scale[1] = half_to_float((u16)(scales >> 16));
#if !CODEBOOK
            // The zeros of both rows as subnormal numbers, as the codes are.
            u32 both = (shared4(beside + (Stage<GROUP>::GROUPS + group) * 128) >> zero_shift) & (ZERO_MASK * 0x10001u);
            float zero[2] = {half_to_float((u16)both), half_to_float((u16)(both >> 16))};
            float s0 = __uint_as_float(shared4(sums + (MANY ? 32 : 4) * group));
            float s1 = MANY ? __uint_as_float(shared4(sums + 32 * group + 4)) : 0.0f;
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
__device__ void corrections(const Gemv& a, u32 first_row, u32 n_rows, u32 warp, u32 lane, float* into) {
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
                        const u16* x = among(a.plain, column[j][i], n);
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
                    const u16* x = among(a.plain, (step >> 1) * 32 + (step & 1) * 4, n);
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
    constexpr u32 DEPTH = Stage<GROUP>::DEPTH, BYTES = Stage<GROUP>::BYTES;
    u32 stages = (u32)__cvta_generic_to_shared(shared) + a.stages + warp * (DEPTH * BYTES);
    let_next_start();
    Streams from;
    from.codes = a.codes + ((u64)first_tile * a.n_units + warp) * (WORDS * 128) + lane * 16;
    u32 zero_shift = 0, zero_step = 0;
#if FORMAT < 16
    constexpr u32 GROUPS = 8 / (GROUP ? GROUP : 8);
    from.scales = a.scales + ((u64)first_tile * a.n_units + warp) * (GROUPS * 8) + row;
#if !CODEBOOK
    zero_step = a.zero_step;
    from.zeros = a.zeros + ((u64)first_tile * a.n_units + warp) * zero_step + row / ZERO_ROWS;
    zero_shift = row % ZERO_ROWS * ZERO_BITS;
#endif
#endif
    const u32 my_units = all > warp ? (all - warp + a.n_warps - 1) / a.n_warps : 0;
    u32 unfetched = my_units;
    auto fetch_next = [&](u32 to) {
        if (unfetched) fetch<GROUP>(from, to, lane), unfetched--;
        close_copies();
        from.codes += a.n_warps * (WORDS * 128);
#if FORMAT < 16
        from.scales += a.n_warps * (GROUPS * 8);
#if !CODEBOOK
        from.zeros += a.n_warps * zero_step;
#endif
#endif
    };
    if (warp < a.n_warps) {
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) fetch_next(stages + d * BYTES);
    }
    for (u32 i = threadIdx.x; i < (a.n_warps + 1) * n_outputs; i += blockDim.x) shared[i] = 0.0f;
    wait_for_previous();
#if FORMAT < 16 && !CODEBOOK
    group_sums<GROUP, MANY>(a, sums);
#endif
    __syncthreads();
    if (warp < a.n_warps) {
        const u32 n = MANY ? a.n : 1, has_token = row < n;
        const u16* x = a.x + row * 32 + quarter * 8;
        u32 my_sums = (u32)__cvta_generic_to_shared(sums) + (MANY ? 8 * quarter : 0), left = my_units;
        // The compiler shall keep these, not compute them again for every unit.
        asm("" : "+l"(x), "+r"(my_sums), "+r"(zero_shift), "+r"(lane));
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
        u32 stage = stages;
#pragma unroll 1
        for (; left > 0; left--) {
            wait_copies<DEPTH - 1>();
            consume<GROUP, MANY>(a, stage, lane, x + (u64)unit * (STEPS / 2 * 32 * n), has_token,
                                 my_sums + (GROUP ? unit * (8 / (GROUP ? GROUP : 8) * WIDTH * 4) : 0), zero_shift, total);
            fetch_next(stage);
            stage = stage == stages + (DEPTH - 1) * BYTES ? stages : stage + BYTES;
            unit += a.n_warps;
            if (unit >= a.n_units) {
                deposit();
                total[0] = total[1] = total[2] = total[3] = 0.0f;
                do unit -= a.n_units, part += 16 * WIDTH;
                while (unit >= a.n_units);
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

// Fourteen warps a block at most, two such blocks a processor: 72 registers.
#define VARIANT(NAME, GROUP, MANY) \
    extern "C" __global__ void __launch_bounds__(448, 2) NAME(const __grid_constant__ Gemv a) { gemv<GROUP, MANY>(a); }

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
