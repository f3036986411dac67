// Matrices of a few bits times 1 to 8 vectors, on the tensor cores.
//
// A matrix lies in tiles of 16 rows and units of 128 columns (64 of a dense one). Some units of a tile are a stage, which is
// read as one: their codes, then their scales, then their zeros. A lane finds in 16 bytes what the tensor core wants of its
// left operand (`decode_codes.cuh`). With `acc` the sum of `code * x`, a group adds `scale * (acc - zero * sum of x)`.
//
// A block computes some tiles; its warps have their stages in equal shares, one after the other, and copy them to shared memory
// without waiting (`decode_ring.cuh`): a block that starts before the kernel in front of it has ended fills its stages meanwhile.
//
// Partial sums of the warps meet in shared memory in a fixed order, which depends on the shape alone: a token's numbers do not
// depend on those beside it.

struct Gemv {
    const u8* stages;        // [tiles, stages]
    const u32* scales;       // one group a row: [tiles, 8], half-precision scales of rows r and r + 8; else in the stages
    const u32* zeros;        // one group a row: [tiles, words], rows r and r + 8 at the same bits of both halves of a word
    const u8* rounds;        // of corrections
    const uint4* shares;     // [blocks, warps]: which rounds a warp has
    const u32* places;       // [blocks, rows]: where the sums of a row are
    const float* stream_in;  // [columns]: the vector before the norm of this weight, null: the fragments are there
    const float* norm;
    const u16* x;            // fragments
    const float* sums;       // their sums
    const u16* plain;        // fragments that the corrections meet; null: the same
    const float* bias;       // [rows] or null
    float* y;                // [n, y_stride], null: none
    u16* out;                // fragments of `silu(gate) up`
    float* out_sums;
    u32 levels[8];           // lower bytes of 16 levels, upper bytes
    u32 middle;              // zeros of a symmetric layout at all places of a word; 0: there are zeros
    u32 rows, n_tiles, n_units, n_groups;  // units of a tile; groups of a tile, those past the end included
    u32 stages_a_tile, tiles_a_block, stages_a_warp, n_warps;
    u32 round_bytes[2], rounds_a_piece[2];  // of tiles, of elements; as many rounds as a stage has room for
    u32 n, y_stride, mode, wide;
    u32 columns;
    float eps;
    u32 depth;               // stages of a warp
    u32 at_stages, at_x, at_eighths, at_sums, at_parts, at_plain, at_corrections, at_places;  // bytes in shared memory
    u32 x_is_shared, plain_is_shared;  // whether the fragments are copied there
};

#define MODE_STORE 0
#define MODE_ADD 1
#define MODE_SWIGLU 2  // rows 0 to 7 of a tile are gates, the others what they gate

#define UNIT_CODES (WORDS * 128)  // bytes
#define STAGE_UNITS (UNIT_CODES < 2048 ? 2048 / UNIT_CODES : 1)

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

// Where a lane finds what belongs to a stage.
struct Place {
    u32 codes, scales, zeros;  // in shared memory
    const u16* x;              // fragments of many tokens
    u32 one_x;                 // those of a single one, in shared memory
    u32 sums;                  // in shared memory
};

// The words of a lane in unit `u`.
__device__ __forceinline__ void load_words(const Place& at, u32 u, u32* words) {
    u32 from = at.codes + u * UNIT_CODES;
#pragma unroll
    for (int i = 0; i < WORDS / 4; i++) {
        uint4 v = shared16(from + i * 512);
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
#if WORDS % 4 == 2
    // The rest lies in 8 bytes a lane.
    u32 rest = from + WORDS / 4 * 512 - 8 * (threadIdx.x & 31);
    words[4] = shared4(rest), words[5] = shared4(rest + 4);
#endif
}

// Products of the words with fragments `b` from step `first` on, `LENGTH` of them; codes at all bits count the same.
template <int LENGTH>
__device__ __forceinline__ void multiply_words(const Gemv& a, const u32* words, const u32 (*b)[2], int first, float* sum) {
    float acc[CLASSES][4] = {};
#pragma unroll
    for (int step = first; step < first + LENGTH; step++) {
#if FORMAT == 16
        const u32* w = words + 4 * step;
        multiply(acc[step & 1], w[0], w[1], w[2], w[3], b[step][0], b[step][1]);
#elif FORMAT == 17
        const u32* w = words + 4 * step;
        u32 upper0, lower0, upper1, lower1;
        split(b[step][0], upper0, lower0);
        split(b[step][1], upper1, lower1);
        multiply(acc[0], w[0], w[1], w[2], w[3], upper0, upper1);
        multiply(acc[1], w[0], w[1], w[2], w[3], lower0, lower1);
#else
        const u32 *r0 = words, *r8 = words + WORDS / 2;
        multiply(acc[class_of(step)], pair(a.levels, r0, step, 0), pair(a.levels, r8, step, 0), pair(a.levels, r0, step, 1),
                 pair(a.levels, r8, step, 1), b[step][0], b[step][1]);
#endif
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[i] = acc[0][i];
#pragma unroll
        for (int c = 1; c < CLASSES; c++) sum[i] = fmaf(acc[c][i], 1.0f / (float)(1 << (c * CLASS_SHIFT)), sum[i]);
    }
}

// The scales of both rows in group `group` of a stage, and their zeros as subnormal numbers, as the codes are.
struct Grid {
    float scale[2], zero[2];

    __device__ __forceinline__ void load(const Gemv& a, const Place& at, u32 zero_shift, u32 group) {
        u32 scales = shared4(at.scales + group * 32);
        scale[0] = half_to_float((u16)scales), scale[1] = half_to_float((u16)(scales >> 16));
#if FORMAT < 16 && !CODEBOOK
        u32 both = (a.middle ? a.middle : shared4(at.zeros + group * (ZERO_WORDS * 4)) >> zero_shift) & (ZERO_MASK * 0x10001u);
        zero[0] = half_to_float((u16)both), zero[1] = half_to_float((u16)(both >> 16));
#endif
    }

    // `sum` is of row `row`, `minus` is the negative sum of x.
    __device__ __forceinline__ void add(float& total, u32 row, float sum, float minus) const {
#if FORMAT < 16 && !CODEBOOK
        sum = fmaf(zero[row], minus, sum);
#endif
        total = fmaf(scale[row], sum, total);
    }
};

// The negative sum of x over a group, of the token at `offset`.
__device__ __forceinline__ float group_sum(const Place& at, u32 group, u32 width, u32 offset) {
#if FORMAT < 16 && !CODEBOOK
    return __uint_as_float(shared4(at.sums + group * width * 4 + offset * 4));
#else
    return 0.0f;
#endif
}

// Adds a stage of one token. The token fills one column of the operand: each unit of the stage has a column of its own, so that
// its fragments are read once a stage, and only the lanes that get this column of the products keep them. Those of unit `u` are
// lanes of quarter `u`, each with a total of its own.
template <u32 GROUP>
__device__ __forceinline__ void consume_one(const Gemv& a, const Place& at, u32 n_units, u32 zero_shift, float* total) {
    constexpr u32 GROUPS = Unit<GROUP>::GROUPS;
    constexpr int LENGTH = GROUP ? GROUP : STEPS;
    constexpr bool AHEAD = WORDS <= 6;  // of the words of the next unit, for which there are registers
    const u32 column = (threadIdx.x & 31) >> 2, quarter = threadIdx.x & 3;
    u32 b[STEPS][2], x = at.one_x + (STAGE_UNITS > 1 ? min(column / 2, n_units - 1) * (STEPS * 32) : 0);
#pragma unroll
    for (int i = 0; i < STEPS / 2; i++) {
        uint4 v = shared16(x + i * 64);
        b[2 * i][0] = v.x, b[2 * i][1] = v.y, b[2 * i + 1][0] = v.z, b[2 * i + 1][1] = v.w;
    }
    float kept[2] = {0.0f, 0.0f};
    // What comes last is asked for first.
    Grid grid;
    float minus;
    if (GROUPS == 1) grid.load(a, at, zero_shift, min(quarter, n_units - 1)), minus = group_sum(at, min(quarter, n_units - 1), 1, 0);
    u32 next[WORDS];
    if (AHEAD) load_words(at, 0, next);
#pragma unroll 1
    for (u32 u = 0; u < n_units; u++) {
        u32 words[WORDS];
        if (AHEAD) {
#pragma unroll
            for (int i = 0; i < WORDS; i++) words[i] = next[i];
            load_words(at, min(u + 1, n_units - 1), next);
        } else {
            load_words(at, u, words);
        }
#pragma unroll
        for (int group = 0; group < STEPS / LENGTH; group++) {
            float sum[4];
            multiply_words<LENGTH>(a, words, b, group * LENGTH, sum);
            if (GROUPS > 1) {
                grid.load(a, at, zero_shift, u * GROUPS + group);
                minus = group_sum(at, u * GROUPS + group, 1, 0);
                if (quarter == u) grid.add(total[0], 0, sum[0], minus), grid.add(total[1], 1, sum[2], minus);
            } else if (quarter == u) {
                kept[0] = sum[0], kept[1] = sum[2];
            }
        }
    }
    if (GROUPS > 1 || quarter >= n_units) return;
    if (GROUPS == 1) {
        grid.add(total[0], 0, kept[0], minus), grid.add(total[1], 1, kept[1], minus);
    } else {
        total[0] += kept[0], total[1] += kept[1];
    }
}

// Adds a stage of several tokens, of which a lane has two: `total` is [STAGE_UNITS, 4], so that sums are taken as for one token.
template <u32 GROUP>
__device__ __forceinline__ void consume_many(const Gemv& a, const Place& at, u32 n_units, u32 has_token, u32 zero_shift, float* total) {
    constexpr u32 GROUPS = Unit<GROUP>::GROUPS;
    constexpr int LENGTH = GROUP ? GROUP : STEPS;
    u32 next[WORDS];
    load_words(at, 0, next);
#pragma unroll 1
    for (u32 u = 0; u < n_units; u++) {
        u32 b[STEPS][2], words[WORDS];
#pragma unroll
        for (int i = 0; i < STEPS / 2; i++) load_fragments(at.x + (u * (STEPS / 2) + i) * a.n * 32, has_token, b[2 * i]);
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = next[i];
        load_words(at, min(u + 1, n_units - 1), next);
#pragma unroll
        for (int group = 0; group < STEPS / LENGTH; group++) {
            float sum[4];
            multiply_words<LENGTH>(a, words, b, group * LENGTH, sum);
            if (GROUPS) {
                Grid grid;
                grid.load(a, at, zero_shift, u * GROUPS + group);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float minus = group_sum(at, u * GROUPS + group, 8, i & 1);
#pragma unroll
                    for (u32 k = 0; k < STAGE_UNITS; k++) {
                        if (u == k) grid.add(total[4 * k + i], i >> 1, sum[i], minus);
                    }
                }
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (u32 k = 0; k < STAGE_UNITS; k++) {
                        if (u == k) total[4 * k + i] += sum[i];
                    }
            }
        }
    }
}

// The negative sums of x over every group into shared memory, [groups, tokens]; for one group a row, that over all.
// `eighths` are sums of 8 inputs, `first` is where the thread begins.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void group_sums(const Gemv& a, const float* eighths, float* sums, u32 first) {
    constexpr u32 WIDTH = MANY ? 8 : 1;
    const u32 n = MANY ? a.n : 1;
    if (GROUP) {
        for (u32 i = first; i < a.n_groups * WIDTH; i += BLOCK_THREADS) {
            u32 group = i / WIDTH, k = min(i % WIDTH, n - 1);
            float sum = 0.0f, v[2 * (GROUP ? GROUP : 1)];
            if (MANY) {
#pragma unroll
                for (u32 j = 0; j < 2 * GROUP; j++) v[j] = eighths[(u64)(group * 2 * GROUP + j) * n + k];
            } else {
#pragma unroll
                for (u32 j = 0; j < GROUP / 2; j++) *(float4*)(v + 4 * j) = *(const float4*)(eighths + group * 2 * GROUP + 4 * j);
            }
#pragma unroll
            for (u32 j = 0; j < 2 * GROUP; j++) sum += v[j];
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

// What a warp has yet to fetch, and where it goes.
template <u32 GROUP>
struct Stages {
    static constexpr u32 UNIT_BYTES = UNIT_CODES + Unit<GROUP>::SCALES + Unit<GROUP>::ZEROS;
    const u8* from;
    u32 barriers, slots, unfetched, before_last, bytes, last_bytes;

    // From stage `first` of the block on.
    __device__ __forceinline__ Stages(const Gemv& a, u32 shared, u32 warp, u32 first, u32 n) {
        u32 unit = a.middle ? UNIT_BYTES - Unit<GROUP>::ZEROS : UNIT_BYTES;
        u32 last_units = a.n_units - (a.stages_a_tile - 1) * STAGE_UNITS;
        bytes = (STAGE_UNITS * unit + 15) & ~15u, last_bytes = (last_units * unit + 15) & ~15u;
        from = a.stages + ((u64)blockIdx.x * a.tiles_a_block * a.stages_a_tile + first) * bytes;
        barriers = shared + warp * a.depth * 8;
        slots = shared + a.at_stages + warp * a.depth * bytes;
        unfetched = n, before_last = a.stages_a_tile - 1 - first % a.stages_a_tile;
    }

#if CORRECTED
    // Some rounds of one kind; they follow the stages.
    __device__ __forceinline__ void fetch_rounds(const Gemv& a, Rounds* rounds, u32 slot, u32 lane) {
        // Lane 0 may have written there just now.
        __syncwarp();
        u32 kind = rounds->unfetched[0] ? 0 : 1, n = min(rounds->unfetched[kind], a.rounds_a_piece[kind]), at = rounds->at;
        if (!n) return;
        u32 piece = n * a.round_bytes[kind];
        fill_stage(slots + slot * bytes, a.rounds + (u64)at * 16, piece, barriers + 8 * slot, lane);
        __syncwarp();
        if (lane == 0) rounds->unfetched[kind] -= n, rounds->at = at + piece / 16;
    }
#endif

    __device__ __forceinline__ void fetch(const Gemv& a, u32 slot, u32 lane) {
        if (!unfetched) return;
        fill_stage(slots + slot * bytes, from, before_last ? bytes : last_bytes, barriers + 8 * slot, lane);
        from += bytes, unfetched--;
        before_last = before_last ? before_last - 1 : a.stages_a_tile - 1;
    }
};

// What a block holds in shared memory.
struct Block {
    u16* x;          // fragments, where there is room for them
    u16* plain;      // those that corrections meet, likewise
    float* eighths;  // their sums, of a norm
    float* sums;     // of groups
    float* parts;    // [slots, 16, tokens]: slot `warp + tile` is what a warp adds to a tile
    float* corrections;  // [places, tokens]
    const u32* places;   // [tiles, 16]
    Rounds* rounds;      // [warps]
    u32 first_tile, n_tiles;
};

// A row of the block, corrections and bias included.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ float output(const Gemv& a, const Block& block, u32 tile, u32 r, u32 k) {
    constexpr u32 WIDTH = MANY ? 8 : 1;
    u32 first = tile * a.stages_a_tile / a.stages_a_warp, last = ((tile + 1) * a.stages_a_tile - 1) / a.stages_a_warp;
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
#if CORRECTED
    sum = __fadd_rn(sum, corrections_of(block.places[tile * 16 + r], block.corrections + k, WIDTH));
#endif
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

// A vector to shared memory; the first sums of groups are asked for before it, so that nothing waits twice.
template <u32 GROUP>
__device__ __forceinline__ void copy_vector(const Gemv& a, const Block& block) {
    constexpr u32 PIECES = 8;
    float4 eighths[GROUP / 2 + 1];
#if FORMAT < 16 && !CODEBOOK
    bool has_sum = GROUP && threadIdx.x < a.n_groups;
#pragma unroll
    for (u32 j = 0; j < GROUP / 2; j++) {
        if (has_sum) eighths[j] = __ldcg((const float4*)(a.sums + threadIdx.x * 2 * GROUP) + j);
    }
#endif
    u32 n_pieces = ((a.columns + 127) & ~127u) / 8;
    for (u32 first = threadIdx.x; first < n_pieces; first += PIECES * BLOCK_THREADS) {
        uint4 v[PIECES];
#pragma unroll
        for (u32 i = 0; i < PIECES; i++) {
            if (first + i * BLOCK_THREADS < n_pieces) v[i] = __ldcg((const uint4*)a.x + first + i * BLOCK_THREADS);
        }
#pragma unroll
        for (u32 i = 0; i < PIECES; i++) {
            if (first + i * BLOCK_THREADS < n_pieces) ((uint4*)block.x)[first + i * BLOCK_THREADS] = v[i];
        }
    }
#if FORMAT < 16 && !CODEBOOK
    if (has_sum) {
        float sum = 0.0f;
#pragma unroll
        for (u32 j = 0; j < GROUP / 2; j++) sum += eighths[j].x, sum += eighths[j].y, sum += eighths[j].z, sum += eighths[j].w;
        block.sums[threadIdx.x] = -sum;
    }
#endif
}

// The vectors to shared memory, where they have room, a single one with its norm if that is asked for; sums of groups.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void prepare(const Gemv& a, const Block& block, NormItems& weights, float* partial) {
    const float* eighths = a.sums;
    u32 first_sum = threadIdx.x;
    if (!MANY && a.norm) {
        norm_row(a.stream_in, a.norm, weights, a.columns, a.eps, NormOut{block.x, block.eighths, nullptr, 1, 0}, partial);
        eighths = block.eighths;
        __syncthreads();
    } else if (!MANY) {
        copy_vector<GROUP>(a, block);
        first_sum += GROUP ? BLOCK_THREADS : 0;
    } else if (a.x_is_shared) {
        u32 n_pieces = ((a.columns + 127) & ~127u) / 8 * a.n;
#pragma unroll 8
        for (u32 i = threadIdx.x; i < n_pieces; i += BLOCK_THREADS) ((uint4*)block.x)[i] = __ldcg((const uint4*)a.x + i);
    }
#if CORRECTED
    if (a.plain_is_shared) {
        u32 n_pieces = ((a.columns + 127) & ~127u) / 8 * (MANY ? a.n : 1);
#pragma unroll 4
        for (u32 i = threadIdx.x; i < n_pieces; i += BLOCK_THREADS) ((uint4*)block.plain)[i] = __ldcg((const uint4*)a.plain + i);
    }
#endif
#if FORMAT < 16 && !CODEBOOK
    group_sums<GROUP, MANY>(a, eighths, block.sums, first_sum);
#endif
    __syncthreads();
}

// The sum over the units of a stage: pairs first.
__device__ __forceinline__ float over_units(const float* total, int i) {
    if (STAGE_UNITS == 1) return total[i];
    if (STAGE_UNITS == 2) return total[i] + total[4 + i];
    return (total[i] + total[4 + i]) + (total[8 + i] + total[12 + i]);
}

// The same of one token, whose units are those of a lane's quarters.
__device__ __forceinline__ float over_quarters(float total) {
    if (STAGE_UNITS > 1) total += __shfl_xor_sync(0xffffffffu, total, 1);
    if (STAGE_UNITS > 2) total += __shfl_xor_sync(0xffffffffu, total, 2);
    return total;
}

#if CORRECTED
// The rounds of a warp, whose first piece is in slot `slot`.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void multiply_rounds(const Gemv& a, const Block& block, Stages<GROUP>& stages, u32 warp, u32 slot, u32 parity) {
    const u32 lane = threadIdx.x & 31;
    const u16* x = a.plain_is_shared ? block.plain : a.plain ? a.plain : a.x_is_shared ? block.x : a.x;
    if (warp >= a.n_warps) return;
    Rounds* rounds = block.rounds + warp;
    u32 n_tiles = rounds->n[0], n_elements = rounds->n[1];
#pragma unroll 1
    while (n_tiles + n_elements) {
        u32 kind = n_tiles ? 0 : 1, n = min(kind ? n_elements : n_tiles, a.rounds_a_piece[kind]);
        u32 round = stages.slots + slot * stages.bytes;
        wait_for_stage(stages.barriers + 8 * slot, parity);
#pragma unroll 1
        for (u32 i = 0; i < n; i++, round += a.round_bytes[kind]) {
            multiply_round<MANY>(round, kind == 0, a.wide, x, a.n, lane, block.corrections);
        }
        if (kind) n_elements -= n;
        else n_tiles -= n;
        // All lanes have read the piece.
        __syncwarp();
        stages.fetch_rounds(a, rounds, slot, lane);
        if (++slot == a.depth) slot = 0, parity ^= 1;
    }
}
#endif

// All stages of a warp, from stage `first` of the block on.
template <u32 GROUP, bool MANY>
__device__ __forceinline__ void multiply_stages(const Gemv& a, const Block& block, Stages<GROUP>& stages, u32 warp, u32 first, u32 left) {
    constexpr u32 WIDTH = MANY ? 8 : 1;
    const u32 lane = threadIdx.x & 31, row = lane >> 2, quarter = lane & 3, n = MANY ? a.n : 1, has_token = row < n;
    u32 tile = first / a.stages_a_tile, stage = first - tile * a.stages_a_tile, zero_shift = 0, my_scales = row * 4, my_zeros = 0;
    const u32 last_units = a.n_units - (a.stages_a_tile - 1) * STAGE_UNITS;
#if FORMAT < 16 && !CODEBOOK
    zero_shift = row % ZERO_ROWS * ZERO_BITS, my_zeros = row / ZERO_ROWS * 4;
#endif
    const u16* x = (a.x_is_shared ? block.x : a.x) + row * 32 + quarter * 8;
    u32 one_x = (u32)__cvta_generic_to_shared(block.x) + quarter * 16;
    u32 sums = (u32)__cvta_generic_to_shared(block.sums) + (MANY ? 8 * quarter : 0);
    // The compiler shall keep these, not compute them again for every stage.
    asm("" : "+l"(x), "+r"(one_x), "+r"(sums), "+r"(zero_shift), "+r"(my_scales), "+r"(my_zeros));
    float total[MANY ? 4 * STAGE_UNITS : 2] = {};
    auto deposit = [&]() {
        float* part = block.parts + (warp + tile) * 16 * WIDTH;
        if (MANY) {
            float sum[4];
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] = over_units(total, i);
            *(float2*)(part + row * 8 + 2 * quarter) = make_float2(sum[0], sum[1]);
            *(float2*)(part + (row + 8) * 8 + 2 * quarter) = make_float2(sum[2], sum[3]);
        } else {
            float upper = over_quarters(total[0]), lower = over_quarters(total[1]);
            if (quarter == 0) part[row] = upper, part[row + 8] = lower;
        }
#pragma unroll
        for (float& t : total) t = 0.0f;
    };
    u32 slot = 0, parity = 0;
#pragma unroll 1
    for (; left; left--) {
        wait_for_stage(stages.barriers + 8 * slot, parity);
        bool is_last = stage == a.stages_a_tile - 1;
        u32 n_units = is_last ? last_units : STAGE_UNITS;
        Place at;
        at.codes = stages.slots + slot * stages.bytes + lane * 16;
        at.scales = at.codes - lane * 16 + n_units * UNIT_CODES + my_scales;
        at.zeros = at.scales - my_scales + n_units * Unit<GROUP>::SCALES + my_zeros;
        at.x = x + (u64)stage * (STAGE_UNITS * STEPS / 2 * 32 * n), at.one_x = one_x + stage * (STAGE_UNITS * STEPS * 32);
        at.sums = sums + stage * (STAGE_UNITS * Unit<GROUP>::GROUPS * WIDTH * 4);
        if (MANY) consume_many<GROUP>(a, at, n_units, has_token, zero_shift, total);
        else consume_one<GROUP>(a, at, n_units, zero_shift, total);
        // All lanes have read the stage.
        __syncwarp();
#if CORRECTED
        if (!stages.unfetched) stages.fetch_rounds(a, block.rounds + warp, slot, lane);
        else
#endif
            stages.fetch(a, slot, lane);
        if (++slot == a.depth) slot = 0, parity ^= 1;
        stage++;
        if (is_last) deposit(), stage = 0, tile++;
    }
    // What is left of the last tile.
    if (stage) deposit();
#if CORRECTED
    multiply_rounds<GROUP, MANY>(a, block, stages, warp, slot, parity);
#endif
}

template <u32 GROUP, bool MANY>
__device__ __forceinline__ void gemv(const Gemv& a) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ float partial[32];
    u32 lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
    Block block = {(u16*)(shared + a.at_x), (u16*)(shared + a.at_plain), (float*)(shared + a.at_eighths), (float*)(shared + a.at_sums),
                   (float*)(shared + a.at_parts), (float*)(shared + a.at_corrections), (const u32*)(shared + a.at_places),
                   (Rounds*)(shared + a.at_places + a.tiles_a_block * 64), blockIdx.x * a.tiles_a_block, 0};
    block.n_tiles = block.first_tile < a.n_tiles ? min(a.tiles_a_block, a.n_tiles - block.first_tile) : 0;
    u32 all = block.n_tiles * a.stages_a_tile, first = min(warp < a.n_warps ? warp * a.stages_a_warp : all, all);
    u32 left = min(a.stages_a_warp, all - first);
    Stages<GROUP> stages(a, (u32)__cvta_generic_to_shared(shared), warp, first, left);
#if CORRECTED
    // Also a warp without stages may have rounds. Nobody waits for its share before all stages are asked for.
    if (warp < a.n_warps && block.n_tiles) {
        uint4 share = __ldg(a.shares + blockIdx.x * a.n_warps + warp);
        if (lane == 0) make_barriers(stages.barriers, a.depth);
        __syncwarp();
        u32 slot = 0;
#pragma unroll 1
        for (; slot < a.depth && stages.unfetched; slot++) stages.fetch(a, slot, lane);
        if (lane == 0) block.rounds[warp] = Rounds{share.x, {share.y, share.z}, {share.y, share.z}};
#pragma unroll 1
        for (; slot < a.depth; slot++) stages.fetch_rounds(a, block.rounds + warp, slot, lane);
    }
#else
    if (left) {
        if (lane == 0) make_barriers(stages.barriers, a.depth);
        __syncwarp();
#pragma unroll 1
        for (u32 slot = 0; slot < a.depth; slot++) stages.fetch(a, slot, lane);
    }
#endif
#if CORRECTED
    const u32 places_barrier = (u32)__cvta_generic_to_shared(shared) + a.n_warps * a.depth * 8;
    if (warp == 0 && block.n_tiles) {
        if (lane == 0) make_barriers(places_barrier, 1);
        __syncwarp();
        u32 bytes = a.tiles_a_block * 64;
        fill_stage((u32)__cvta_generic_to_shared(block.places), (const u8*)a.places + (u64)blockIdx.x * bytes, bytes, places_barrier, lane);
    }
#endif
    // No kernel writes the weights of a norm.
    NormItems weights;
    if (!MANY && a.norm) weights.load(a.norm, a.columns, 0);
    // The next kernel's weights shall not come before what this one has yet to fetch, nor before its vector.
    bool has_all = a.stages_a_warp <= a.depth && !CORRECTED;
    if (has_all) begin_early();
    wait_for_previous();
    if (!has_all) begin_early();
    // There are as many blocks as processors at least, and not all have work.
    if (!block.n_tiles) return;
    prepare<GROUP, MANY>(a, block, weights, partial);
#if CORRECTED
    multiply_stages<GROUP, MANY>(a, block, stages, warp, first, left);
    wait_for_stage(places_barrier, 0);
#else
    if (left) multiply_stages<GROUP, MANY>(a, block, stages, warp, first, left);
#endif
    __syncthreads();
    if (a.mode == MODE_SWIGLU) write_hidden<GROUP, MANY>(a, block);
    else write_rows<GROUP, MANY>(a, block);
}

#define VARIANT(NAME, GROUP)                   \
    STEP_KERNEL(NAME##_one, Gemv, (gemv<GROUP, false>)) \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) NAME##_many(const __grid_constant__ Gemv a) { gemv<GROUP, true>(a); }

#if FORMAT < 16
VARIANT(gemv_32, 2)
VARIANT(gemv_64, 4)
VARIANT(gemv_128, 8)
#endif
VARIANT(gemv_row, 0)
