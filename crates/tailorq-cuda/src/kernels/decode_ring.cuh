// A warp's stages in shared memory, filled by copies that nobody waits for until their numbers are needed.
//
// Each stage has a barrier that opens when its bytes are there. On sm_90 one lane starts one bulk copy a stage; before that
// each lane copies 16 bytes at a time and arrives once its copies have.

#if __CUDA_ARCH__ >= 900
#define ARRIVALS 1
#else
#define ARRIVALS 32
#endif

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

// What the thread has written to shared memory comes before copies that are started after this.
__device__ __forceinline__ void before_copies() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// One lane, for all barriers of its warp.
__device__ __forceinline__ void make_barriers(u32 barriers, u32 n) {
#pragma unroll 1
    for (u32 i = 0; i < n; i++) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barriers + 8 * i), "r"(ARRIVALS) : "memory");
    // The copies see barriers that are made.
    before_copies();
}

// The warp: starts to copy `bytes`, a multiple of 16.
__device__ __forceinline__ void fill_stage(u32 to, const u8* from, u32 bytes, u32 barrier, u32 lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        u64 policy;
        // Weights are read once a step and shall not push anything else out of the L2 cache.
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
            "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
            : "memory");
    }
#else
    for (u32 at = 16 * lane; at < bytes; at += 512) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(from + at) : "memory");
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// Until the stage's bytes of this round, which `parity` tells from the last one's, are there.
__device__ __forceinline__ void wait_for_stage(u32 barrier, u32 parity) {
    u32 is_there;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(is_there)
            : "r"(barrier), "r"(parity)
            : "memory");
#else
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(is_there)
            : "r"(barrier), "r"(parity)
            : "memory");
#endif
    } while (!is_there);
}
