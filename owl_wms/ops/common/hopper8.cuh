// What kernels with roles and 8-bit operands add to hopper.cuh: copies that report to a barrier, matrix stores of columns,
// products of codes whose first operand stays in registers.

DEVICE u32 load_shared4(u32 address) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
DEVICE float4 load_shared_floats(u32 address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    return v;
}
DEVICE void store_shared_floats(u32 address, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// store_matrix with each 8 x 8 block transposed: lane 8 m + r gives the address of column r of block m.
DEVICE void store_matrix_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// One word of weights, kept: `volatile` so that it is not loaded again where it is used.
DEVICE u32 load_weight(const void* source) {
    u32 v;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(source));
    return v;
}

// Sixteen bytes from global to shared memory where `condition`; elsewhere the target keeps what it held.
DEVICE void copy16_if(bool condition, u32 target, const void* source) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p cp.async.cg.shared.global.L2::128B [%1], [%2], 16;}" ::"r"((int)condition),
                 "r"(target), "l"(source)
                 : "memory");
}
// Arrives at the barrier, as one of the arrivals it was told of, when all copies that this thread has begun are there. They
// count as ordinary stores: wgmma needs an async_fence() between the wait for the barrier and the product.
DEVICE void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

#ifdef INT8
typedef int Sum;
#define SUM_LIST4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define CODE_PRODUCT "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"
#define CODE_PRODUCT_SIGNS ""
#else
typedef float Sum;
#define SUM_LIST4(d, i) LIST4(d, i)
#define CODE_PRODUCT "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"
#define CODE_PRODUCT_SIGNS ", 1, 1"
#endif
#define SUM_LIST16(d, i) SUM_LIST4(d, i), SUM_LIST4(d, i + 4), SUM_LIST4(d, i + 8), SUM_LIST4(d, i + 12)

// d[64 x 64] = a[64 x 32] b[64 x 32]^T on codes, added to d where `add`. Warp w of four holds rows 16 w..+15 of a and d. Lane
// 4 g + t has in a[2 h + r] the codes 16 h + 4 t..+3 of row g + 8 r, and in d[4 n + 2 r + c] column 8 n + 2 t + c of row
// g + 8 r. a and d must be left alone until a products_wait() says so.
DEVICE void product_of_codes(Sum (&d)[32], const u32 (&a)[4], u64 b, bool add) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %37, 0; " CODE_PRODUCT
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"
                 " %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p" CODE_PRODUCT_SIGNS ";}"
                 : SUM_LIST16(d, 0), SUM_LIST16(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add)
                 : "memory");
}
// Waits until at most LEFT of the groups committed are still at work. d, of a group that is then done, passes through.
template <int LEFT> DEVICE void products_wait(Sum (&d)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#pragma unroll
    for (int i = 0; i < 32; ++i)
#ifdef INT8
        asm volatile("" : "+r"(d[i])::"memory");
#else
        asm volatile("" : "+f"(d[i])::"memory");
#endif
}
