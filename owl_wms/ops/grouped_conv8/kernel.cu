// Grouped 3x3 convolution on 8-bit codes, 16 channels a group, NHWC: codes of LeakyReLU'd values in, the same out.
//
// One block walks down a strip 32 pixels wide and 128 channels (8 groups) deep; warp w owns group w and all 32 columns, as
// two sets of rows that share the taps. A pixel's group is 16 bytes, one row of an 8 x 16-byte matrix, so `ldmatrix`
// delivers fragments as they are. Rolling accumulators as in grouped_conv. A thread ends with four neighbouring channels.
//
// INT8: m16n8k32 takes horizontal taps 0 and 1 as one product, m16n8k16 tap 2. Sums start at the bits of 1.5 * 2^23, so
// that an integer sum read as a float is that number plus the sum, without a conversion; |sum| <= 144 * 127^2 < 2^22.
// FP8: sm_90 has no such product, so codes become float16 (exact) and the taps are float16. A register of a fragment
// holds four neighbouring channels; which of the sixteen is called k = 0 is free, so the packed taps follow that order.
//
// A warp's 16 bytes a pixel are half of a sector of memory, and writing halves cost more than all the arithmetic. Results
// therefore wait in shared memory for one phase and leave in whole lines.
#ifdef INT8
typedef int Sum;
#define TAP_REGISTERS 18
#define ZERO 0x4b400000
#else
typedef float Sum;
#define TAP_REGISTERS 36
#define ZERO 0.f
#endif
#define OUT_ROW_BYTES (STRIP * 128)
#define OUT_BYTES (ROWS * OUT_ROW_BYTES)

struct Warp {
    u32 taps[TAP_REGISTERS];
    Sum sums[2][3][2][4];  // [half of the strip][age][tile of columns][fragment]
    float scale[4], bias[4];
};

DEVICE float value(float sum) { return sum; }
DEVICE float value(int sum) { return __int_as_float(sum) - 12582912.f; }

DEVICE void load_taps(Warp& w, const u32* packed, int group, int lane) {
#pragma unroll
    for (int r = 0; r < TAP_REGISTERS; ++r)
        asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(w.taps[r]) : "l"(packed + ((i64)group * TAP_REGISTERS + r) * 32 + lane));
}

#ifdef INT8
DEVICE void mma_k32(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_k16(int (&d)[4], u32 a0, u32 a1, u32 b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
// Adds one input row; sums[.][age] is the output row for which this input row is tap 2 - age. taps: [dy][tile][dx].
DEVICE void add_row(Warp& w, u32 row, int group, int lane) {
    u32 last[4];
    load_matrix(last, row + place((lane & 15) + (lane >> 4) * 16 + 2, group));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 first[4];
        load_matrix(first, row + place(half * 16 + (lane & 15) + (lane >> 4), group));
#pragma unroll
        for (int age = 0; age < 3; ++age)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const u32* b = w.taps + ((2 - age) * 2 + n) * 3;
                mma_k32(w.sums[half][age][n], first, b[0], b[1]);
                mma_k16(w.sums[half][age][n], last[half * 2], last[half * 2 + 1], b[2]);
            }
    }
}
#else
DEVICE void floats(u32& low, u32& high, u32 codes) {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
        : "=r"(low), "=r"(high)
        : "r"(codes));
}
DEVICE void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// taps: [dy][dx][tile][register].
DEVICE void add_row(Warp& w, u32 row, int group, int lane) {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
        u32 codes[4];
        load_matrix(codes, row + place((lane & 15) + (lane >> 4) * 16 + s, group));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 a[4];
            floats(a[0], a[2], codes[half * 2]);
            floats(a[1], a[3], codes[half * 2 + 1]);
#pragma unroll
            for (int age = 0; age < 3; ++age)
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const u32* b = w.taps + (((2 - age) * 3 + s) * 2 + n) * 2;
                    mma_f16(w.sums[half][age][n], a, b[0], b[1]);
                }
        }
    }
}
#endif

// Puts the row that is complete at this lane's place in shared memory, and moves on.
DEVICE void end_row(Warp& w, u32 place) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Sum(&d)[2][4] = w.sums[half][0];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float a = fmaf(value(d[0][i * 2]), w.scale[0], w.bias[0]), b = fmaf(value(d[0][i * 2 + 1]), w.scale[1], w.bias[1]);
            float c = fmaf(value(d[1][i * 2]), w.scale[2], w.bias[2]), e = fmaf(value(d[1][i * 2 + 1]), w.scale[3], w.bias[3]);
            store_shared4(place + (half * 2 + i) * 8 * 128, leaky_codes(a, b, c, e));
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                w.sums[half][0][n][i] = w.sums[half][1][n][i];
                w.sums[half][1][n][i] = w.sums[half][2][n][i];
                w.sums[half][2][n][i] = ZERO;
            }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
grouped_conv8(Element* out, const Element* x, const u32* packed, const float* scale, const float* bias, const float* gain, int height,
              int width, int channels, int rows_per_block) {
    extern __shared__ __align__(128) unsigned char memory[];
    u32 ring = shared_address(memory), results = ring + STAGES * ROWS * ROW_BYTES;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Tile t = tile_of_block(height, width, channels, rows_per_block);
    int count = t.y1 - t.y0 + 2;  // input rows
    int phases = (count + ROWS - 1) / ROWS;
    i64 line = (i64)width * channels;
    Fetch f;
    prepare(f, x, t, height, width, channels);
#pragma unroll
    for (int p = 0; p < STAGES - 1; ++p) {
        if (p < phases) fetch_rows(f, ring + p * ROWS * ROW_BYTES, height, line);
        copy_commit();
    }
    bool active = t.channel0 + warp * 16 < channels;
    Warp w;
    if (active) {
        int channel = t.channel0 + warp * 16 + (lane & 3) * 4;
        float inverse_gain = gain[2 * t.batch + 1];
#pragma unroll
        for (int i = 0; i < 4; ++i) w.scale[i] = scale[channel + i], w.bias[i] = bias[channel + i] * inverse_gain;
        load_taps(w, packed, t.channel0 / 16 + warp, lane);
#pragma unroll
        for (int i = 0; i < 48; ++i) w.sums[i / 24][i / 8 % 3][i / 4 % 2][i % 4] = ZERO;
    }
    u32 mine = results + place(lane >> 2, warp) + (lane & 3) * 4;
    // What this thread writes out: sixteen bytes of one pixel in every row. The first two rows of a strip complete nothing.
    int chunk = threadIdx.x & 7, column = threadIdx.x >> 3;
    bool inside = t.x0 + column < width && t.channel0 + chunk * 16 < channels;
    u32 piece = results + place(column, chunk);
    Element* target = out + (((i64)t.batch * height + t.y0 - 2) * width + t.x0 + column) * channels + t.channel0 + chunk * 16;
    auto write_out = [&](int p) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            int row = p * ROWS + r;
            store_global16_if(inside && row >= 2 && row < count, target, load_shared16(piece + (p & 1) * OUT_BYTES + r * OUT_ROW_BYTES));
            target += line;
        }
    };
    int slot = 0, free_slot = STAGES - 1;
    for (int p = 0; p < phases; ++p) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        int next = p + STAGES - 1;
        if (next < phases) fetch_rows(f, ring + free_slot * ROWS * ROW_BYTES, height, line);
        copy_commit();
        if (p) write_out(p - 1);
        if (active) {
            int rows = min(ROWS, count - p * ROWS);
            u32 row = ring + slot * ROWS * ROW_BYTES, done = mine + (p & 1) * OUT_BYTES;
#pragma unroll 1
            for (int r = 0; r < rows; ++r) {
                add_row(w, row, warp, lane);
                end_row(w, done);
                row += ROW_BYTES, done += OUT_ROW_BYTES;
            }
        }
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        free_slot = free_slot + 1 == STAGES ? 0 : free_slot + 1;
    }
    __syncthreads();
    write_out(phases - 1);
    copy_wait<0>();
}
