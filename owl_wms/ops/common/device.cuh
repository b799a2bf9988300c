// What every kernel of owl_wms.ops shares: element type, packed arithmetic, asynchronous copies, tensor-core products.
//
// No header is included, so NVRTC needs nothing but its own library. FP16 selects float16, its absence bfloat16; 16-bit
// values travel as raw bits (u16, or two of them in a u32, the lower one first).
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define SLOPE 0.01f

#ifdef FP16
#define TYPE2 "f16x2"
#define MMA_TYPES "f32.f16.f16.f32"
#define SLOPE2 0x211f211fu  // 0.01 twice, nearest float16
#define MINUS_ZERO2 0x80008000u
DEVICE float low_float(u32 pair) {
    float value;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(value) : "r"(pair));
    return value;
}
DEVICE float high_float(u32 pair) {
    float value;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(value) : "r"(pair));
    return value;
}
#else
#define TYPE2 "bf16x2"
#define MMA_TYPES "f32.bf16.bf16.f32"
#define SLOPE2 0x3c243c24u  // 0.01 twice, nearest bfloat16
#define MINUS_ZERO2 0x80008000u
DEVICE float low_float(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_float(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
#endif

DEVICE u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn." TYPE2 ".f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// LeakyReLU of two packed values: max(x, 0.01 x).
DEVICE u32 leaky2(u32 pair) {
    u32 scaled, result;
    asm("fma.rn." TYPE2 " %0, %1, %2, %3;" : "=r"(scaled) : "r"(pair), "r"(SLOPE2), "r"(MINUS_ZERO2));
    asm("max." TYPE2 " %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(scaled));
    return result;
}
DEVICE float leaky(float x) { return fmaxf(x, SLOPE * x); }

// x / (1 + exp(-x)) as h + h tanh(h), h = x / 2: one special-function call instead of two. The hardware's tanh has a relative
// error of at most 2^-11 (PTX ISA), so the result's is at most |x| 2^-12; measured, results are off by one rounding in
// bfloat16 and in float16 (docs/log.md).
DEVICE float silu(float x) {
    float h = 0.5f * x, t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(h));
    return fmaf(h, t, h);
}

// LeakyReLU of four values, then their 8-bit codes, first value in the lowest byte. INT8: rounded to the nearest
// integer in [-127, 127]; the sums of float16 pairs with 1536, whose last place is 1, hold the code in their low bytes.
// FP8: e4m3, saturating.
#ifdef INT8
DEVICE u32 integers(float low, float high) {
    u32 pair;
    asm("{.reg .b32 scaled;\n"
        "cvt.rn.f16x2.f32 %0, %1, %2;\n"
        "fma.rn.f16x2 scaled, %0, %3, %4;\n"
        "max.f16x2 %0, %0, scaled;\n"
        "min.f16x2 %0, %0, %5;\n"
        "max.f16x2 %0, %0, %6;\n"
        "add.rn.f16x2 %0, %0, %7;}"
        : "=&r"(pair)
        : "f"(high), "f"(low), "r"(0x211f211fu), "r"(0x80008000u), "r"(0x57f057f0u), "r"(0xd7f0d7f0u), "r"(0x66006600u));
    return pair;
}
DEVICE u32 leaky_codes(float a, float b, float c, float d) {
    return __byte_perm(integers(a, b), integers(c, d), 0x6420);
}
// The same without the LeakyReLU.
DEVICE u32 plain_integers(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n"
        "min.f16x2 %0, %0, %3;\n"
        "max.f16x2 %0, %0, %4;\n"
        "add.rn.f16x2 %0, %0, %5;"
        : "=&r"(pair)
        : "f"(high), "f"(low), "r"(0x57f057f0u), "r"(0xd7f0d7f0u), "r"(0x66006600u));
    return pair;
}
DEVICE u32 plain_codes(float a, float b, float c, float d) {
    return __byte_perm(plain_integers(a, b), plain_integers(c, d), 0x6420);
}
#endif
#ifdef FP8
DEVICE u32 plain_codes(float a, float b, float c, float d) {
    u32 codes;
    asm("{.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};}"
        : "=r"(codes)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return codes;
}
DEVICE u32 leaky_codes(float a, float b, float c, float d) { return plain_codes(leaky(a), leaky(b), leaky(c), leaky(d)); }
#endif

DEVICE u32 shared_address(const void* pointer) {
    u32 address;
    asm("{.reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a;}" : "=r"(address) : "l"(pointer));
    return address;
}

// Sixteen bytes from global to shared memory, past the registers; an ordinary store of zeros where there is nothing to
// copy, which costs fewer instructions than the zero-filling form.
DEVICE void copy16_or_zero(u32 target, const void* source, bool valid) {
    if (valid)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
    else
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(target), "r"(0) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEVICE uint4 load_shared16(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}
DEVICE void store_shared4(u32 address, u32 value) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory"); }
DEVICE void store_global16_if(bool condition, void* target, uint4 v) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5};}" ::"r"((int)condition), "l"(target),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

DEVICE void load_matrix(u32 (&a)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}

// The same with each 8 x 8 block transposed: B fragments out of row-major [k][n].
DEVICE void load_matrix_transposed(u32 (&b)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address)
                 : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8], fp32 accumulation.
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Read-only global loads; `volatile` keeps the compiler from holding weights in registers across phases.
DEVICE uint4 load_weights(const uint4* source) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(source));
    return v;
}
DEVICE void store_global8(void* target, u32 x, u32 y) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(target), "r"(x), "r"(y) : "memory");
}

// The same, predicated: no branch splits the instruction stream.
DEVICE void store_global8_if(bool condition, void* target, u32 x, u32 y) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v2.b32 [%1], {%2, %3};}"
                 :: "r"((int)condition), "l"(target), "r"(x), "r"(y) : "memory");
}

DEVICE void store_global4_if(bool condition, void* target, u32 x) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.b32 [%1], %2;}"
                 :: "r"((int)condition), "l"(target), "r"(x) : "memory");
}

DEVICE int clamp(int value, int low, int high) { return min(max(value, low), high); }

// Bicubic enlargement by two (a = -0.75). Output 2i+1 and 2i+2 lie 0.25 and 0.75 past input i and read inputs i-1..i+2.
DEVICE float quarter(float a, float b, float c, float d) {
    return fmaf(-27.f / 256, a, fmaf(225.f / 256, b, fmaf(67.f / 256, c, -9.f / 256 * d)));
}
DEVICE float three_quarters(float a, float b, float c, float d) { return quarter(d, c, b, a); }
