// What kernels for compute capability 9.0 add to device.cuh: barriers in shared memory, matrix stores, registers
// moved between warpgroups, warpgroup products.
//
// wgmma needs machine code for sm_90a. A wait that never ends costs a whole session on the GPU: with WATCHDOG defined, a
// barrier polled that often raises a trap, which the host sees as a launch failure.

// Stores the four 8 x 8 blocks that load_matrix would load from the same addresses: lane 8 i + r holds the address of row r
// of block i. Older architectures have no such instruction; there each lane fetches the address of the row that it holds two
// values of (lane / 4) and stores them.
DEVICE void store_matrix(u32 address, u32 a, u32 b, u32 c, u32 d) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
#else
    int lane = threadIdx.x & 31, row = lane >> 2;
    u32 column = (lane & 3) * 4, values[4] = {a, b, c, d};
#pragma unroll
    for (int i = 0; i < 4; ++i) store_shared4(__shfl_sync(0xffffffffu, address, 8 * i + row) + column, values[i]);
#endif
}

DEVICE uint2 load_shared8(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}
DEVICE void store_shared16(u32 address, u32 value) {  // the same word four times
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(value) : "memory");
}
DEVICE void store_shared4_if(bool condition, u32 address, u32 value) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.shared.b32 [%1], %2;}" ::"r"((int)condition), "r"(address), "r"(value) : "memory");
}

// Sixteen bytes from global to shared memory; the rest of the 128-byte line is fetched into the L2 beside them, for the
// warps that will ask for it.
DEVICE void copy16(u32 target, const void* source) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// Registers of a thread from here on; every warp of a warpgroup runs it, and the block's sum must not grow.
template <int N> DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
DEVICE void trap() { asm volatile("trap;"); }

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier) : "memory");
}
// Returns once the phase of that parity is complete; the first phase has parity 0.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
#ifdef WATCHDOG
    u32 polls = 0;
#endif
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
#ifdef WATCHDOG
        if (!done && ++polls > WATCHDOG) asm volatile("trap;");
#endif
    } while (!done);
}
// Position in a ring of slots that are filled and emptied in turn.
template <int LENGTH> struct Place {
    int slot;
    u32 parity;
    DEVICE void next() {
        if (++slot == LENGTH) slot = 0, parity ^= 1;
    }
};
// A barrier among `threads` threads, whole warps; number 0 is __syncthreads.
DEVICE void named_barrier(int number, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }

// Makes this thread's ordinary stores to shared memory visible to wgmma, once a barrier has ordered them before it.
DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Operand of wgmma: rows of 64 values (128 bytes, 128-byte swizzle), eight rows every 1024 bytes; rows start at a multiple
// of 1024. Sixteen values further along the row are 32 bytes, 2 in the descriptor's unit. (PTX ISA, "Matrix descriptor".)
DEVICE u64 matrix_descriptor(u32 address) { return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62; }
// Byte of (row, 16-byte chunk 0..7) in such an operand.
DEVICE u32 swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

DEVICE void product_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// d[64 x N] = a[64 x 16] b[N x 16]^T, added to d where `add`. Warp w of four holds rows 16 w..+15, as `mma` does: tile n of 8
// columns in d[4 n..+3]. d must be left alone from product_begin() to product_wait().
#define LIST4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LIST16(d, i) LIST4(d, i), LIST4(d, i + 4), LIST4(d, i + 8), LIST4(d, i + 12)
#ifdef FP16
#define PRODUCT_TYPES "f32.f16.f16"
#else
#define PRODUCT_TYPES "f32.bf16.bf16"
#endif
template <int N> DEVICE void product(float (&d)[N / 2], u64 a, u64 b, bool add) {
    static_assert(N == 32 || N == 64 || N == 96 || N == 128, "columns");
    if constexpr (N == 32)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16." PRODUCT_TYPES
                     " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;}"
                     : LIST16(d, 0)
                     : "l"(a), "l"(b), "r"((int)add)
                     : "memory");
    if constexpr (N == 64)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16." PRODUCT_TYPES
                     " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"
                     " %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;}"
                     : LIST16(d, 0), LIST16(d, 16)
                     : "l"(a), "l"(b), "r"((int)add)
                     : "memory");
    if constexpr (N == 96)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %50, 0; wgmma.mma_async.sync.aligned.m64n96k16." PRODUCT_TYPES
                     " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"
                     " %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45,"
                     " %46, %47}, %48, %49, p, 1, 1, 0, 0;}"
                     : LIST16(d, 0), LIST16(d, 16), LIST16(d, 32)
                     : "l"(a), "l"(b), "r"((int)add)
                     : "memory");
    if constexpr (N == 128)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16." PRODUCT_TYPES
                     " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"
                     " %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45,"
                     " %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;}"
                     : LIST16(d, 0), LIST16(d, 16), LIST16(d, 32), LIST16(d, 48)
                     : "l"(a), "l"(b), "r"((int)add)
                     : "memory");
}
// Waits for every product committed so far. d passes through, so that nothing that reads it is moved ahead of the wait.
template <int N> DEVICE void product_wait(float (&d)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
