// Codes as operands of the tensor cores.
//
// FORMAT is 2, 3, 4, 6 or 8 bits; with CODEBOOK its codes are places in a table of 2^FORMAT levels. 16 is half precision, 17
// bfloat16, both without scales. Two codes at the same bits of both halves of a word become two half-precision numbers by a
// mask alone, because small integers are the subnormal numbers `code * 2^(bit - 24)`. Codes at different bits go to
// accumulators of their own, whose powers of two are put right once a group.

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

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
    return y;
}

// Two numbers of one row at `step` in the lower or upper eight columns, from the row's words `w`.
__device__ __forceinline__ u32 pair(const u32* levels, const u32* w, int step, int high) {
#if CODEBOOK
    // Selectors of four codes each, in nibbles.
#if FORMAT == 4
    u32 all = w[(step / 4) * 2 + high], turn = (step / 2) & 1;
    u32 which = (all & 0x77777777u) >> (16 * turn), upper = ((all >> 3) & 0x11111111u) >> (16 * turn);
    u32 mask = permute(0x0000ff00u, 0, upper);
    u32 low = permute(levels[0], levels[1], which), more = permute(levels[4], levels[5], which);
    low = (permute(levels[2], levels[3], which) & mask) | (low & ~mask);
    more = (permute(levels[6], levels[7], which) & mask) | (more & ~mask);
#else
    u32 turn = (step / 2) & 1, place = step / 4;
    u32 which = (w[high] >> (2 * place)) & 0x33333333u;
#if FORMAT == 3
    u32 of = high * 2 + place;
    u32 top = of == 0 ? w[2] << 2 : of == 1 ? w[2] << 1 : of == 2 ? w[2] : w[2] >> 1;
    which |= top & 0x44444444u;
#endif
    which >>= 16 * turn;
    u32 low = permute(levels[0], levels[1], which), more = permute(levels[4], levels[5], which);
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
