// Corrected tiles and elements times vectors, 32 entries at a time, a lane each. Must agree with `corrections.rs`, which says what
// a round of entries is.
//
// A lane multiplies its entry, then the lanes of a row add up. All is done in an order that the matrix fixes, and in the same way
// for each token; where the compiler might round otherwise for one token than for several, it is told how.

// The rounds of a warp, in shared memory: those of tiles, then those of elements.
struct Rounds {
    u32 at;             // in 16 bytes, what is to be fetched next
    u32 unfetched[2];   // of tiles, of elements
    u32 n[2];           // all of them
};

#if CORRECTED

// Where number `place` of the first token lies among fragments of `n`, from where it lies among those of one.
__device__ __forceinline__ const u16* among(const u16* x, u32 place, u32 n) { return x + (place >> 5) * (n * 32) + (place & 31); }

// A tile. Lanes begin at different quarters of it: what they read lies in different banks.
struct TileEntry {
    u32 words[4], turn, place;
    float scale;

    __device__ __forceinline__ TileEntry(u32 round, u32 lane) {
        turn = lane & 3;
#pragma unroll
        for (u32 q = 0; q < 4; q++) words[q] = shared4(round + 16 + lane * 16 + ((q + turn) & 3) * 4);
        u32 beside = shared4(round + 16 + 512 + lane * 4), step = beside & 0xffff;
        place = (step >> 1) * 32 + (step & 1) * 4, scale = half_to_float((u16)(beside >> 16));
    }

    // With a token; `x` is where its fragments begin.
    __device__ __forceinline__ float times(const u16* x, u32 n) const {
        const u16* from = among(x, place, n);
        float sum[4];
#pragma unroll
        for (u32 q = 0; q < 4; q++) {
            uint2 v = *(const uint2*)(from + 8 * ((q + turn) & 3));
            sum[q] = __fmul_rn((float)(i8)(words[q]), half_to_float((u16)v.x));
            sum[q] = fmaf((float)(i8)(words[q] >> 8), half_to_float((u16)(v.x >> 16)), sum[q]);
            sum[q] = fmaf((float)(i8)(words[q] >> 16), half_to_float((u16)v.y), sum[q]);
            sum[q] = fmaf((float)(i8)(words[q] >> 24), half_to_float((u16)(v.y >> 16)), sum[q]);
        }
        return __fmul_rn(scale, __fadd_rn(__fadd_rn(sum[0], sum[1]), __fadd_rn(sum[2], sum[3])));
    }
};

// Four elements of a row.
struct Elements {
    u32 places[4];
    float values[4];

    __device__ __forceinline__ Elements(u32 round, u32 lane, u32 wide) {
        uint4 body = shared16(round + 16 + lane * 16);
        u32 words[4] = {body.x, body.y, body.z, body.w}, beside = wide ? shared4(round + 16 + 512 + lane * 4) : 0;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            places[i] = (words[i] & 0xffff) | (beside >> (5 * i) & 31) << 16;
            values[i] = half_to_float((u16)(words[i] >> 16));
        }
    }

    __device__ __forceinline__ float times(const u16* x, u32 n) const {
        float v[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) v[i] = half_to_float(*among(x, places[i], n));
        float sum = __fmul_rn(values[0], v[0]);
#pragma unroll
        for (u32 i = 1; i < 4; i++) sum = fmaf(values[i], v[i], sum);
        return sum;
    }
};

// The lanes of a row and where their sum goes.
struct Rows {
    u32 reach, longest;  // lanes to the end of the row; the most of a row
    bool leads, adds;    // whether the lane is the row's first; whether the warp had the row before
    float* to;

    __device__ __forceinline__ Rows(u32 round, u32 lane, u32 width, float* sums) {
        uint4 head = shared16(round);
        u32 upto = (2u << lane) - 1, begun = head.x & upto, after = head.x & ~upto;
        reach = (after ? __ffs(after) - 1 : 32) - lane, longest = head.z;
        leads = lane == 0 || (head.x >> lane & 1), adds = !(begun & 1) && lane == 0;
        to = sums + (head.y + __popc(begun & ~1u)) * width;
    }

    // Of `N` tokens at once.
    template <u32 N>
    __device__ __forceinline__ void add(float* y) const {
#pragma unroll 1
        for (u32 d = 1; d < longest; d *= 2) {
#pragma unroll
            for (u32 k = 0; k < N; k++) {
                float other = __shfl_down_sync(0xffffffffu, y[k], d);
                if (d < reach) y[k] = __fadd_rn(y[k], other);
            }
        }
    }
};

// Multiplies `entry` of the lane with all tokens. Two are taken at once, and half of the lanes begin with the second one: the
// fragments of a token lie in half of the banks.
template <bool MANY, typename Entry>
__device__ __forceinline__ void multiply_entry(const Entry& entry, const Rows& rows, const u16* x, u32 n, u32 lane) {
    if (!MANY) {
        float y[1] = {entry.times(x, 1)};
        rows.add<1>(y);
        if (rows.leads) *rows.to = rows.adds ? __fadd_rn(*rows.to, y[0]) : y[0];
        return;
    }
    u32 flip = lane >> 2 & 1;
#pragma unroll 1
    for (u32 k = 0; k < n; k += 2) {
        float first = entry.times(x + min(k + flip, n - 1) * 32, n), second = entry.times(x + min(k + 1 - flip, n - 1) * 32, n);
        float y[2] = {flip ? second : first, flip ? first : second};
        rows.add<2>(y);
        if (rows.leads) {
            float2* to = (float2*)(rows.to + k);
            float2 before = rows.adds ? *to : make_float2(0.0f, 0.0f);
            *to = make_float2(rows.adds ? __fadd_rn(before.x, y[0]) : y[0], rows.adds ? __fadd_rn(before.y, y[1]) : y[1]);
        }
    }
}

// A round in shared memory, with `n` tokens whose fragments are `x`. `sums` is [places, tokens].
template <bool MANY>
__device__ __forceinline__ void multiply_round(u32 round, bool of_tiles, u32 wide, const u16* x, u32 n, u32 lane, float* sums) {
    Rows rows(round, lane, MANY ? 8 : 1, sums);
    if (of_tiles) multiply_entry<MANY>(TileEntry(round, lane), rows, x, n, lane);
    else multiply_entry<MANY>(Elements(round, lane, wide), rows, x, n, lane);
    // The next round may go on with a row whose sum another lane has written.
    __syncwarp();
}

// The sum of a row over the warps; `places` is the row's word.
__device__ __forceinline__ float corrections_of(u32 places, const float* sums, u32 width) {
    float sum = 0.0f;
#pragma unroll 1
    for (u32 kind = 0; kind < 2; kind++, places >>= 16) {
        u32 end = places & 0xfff, n = end ? (places >> 12 & 15) + 1 : 0;
#pragma unroll 1
        for (u32 i = end - n; i < end; i++) sum = __fadd_rn(sum, sums[i * width]);
    }
    return sum;
}

#endif
