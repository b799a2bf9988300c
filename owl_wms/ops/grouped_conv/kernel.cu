// Grouped 3x3 convolution, 16 channels a group, NHWC, LeakyReLU on load, bias and LeakyReLU on store; with UP2 the input
// is first enlarged bicubically by two, in shared memory.
//
// One block walks down a strip 32 pixels wide and 64 channels (4 groups) deep. Warp w owns group w % 4 and pixel columns
// 16 * (w / 4) ..+15; the nine taps of its group live in 36 registers. Every input row is read once from shared memory in
// its three horizontal shifts and feeds three output rows, whose accumulators roll: 18 tensor-core products for three
// matrix loads. Output channels are permuted in the packed weights so that a thread ends with four neighbouring ones and
// four threads write a whole 32-byte sector.
//
// Direct: rows arrive by asynchronous copies, ROWS at a time in a ring of STAGES.
// UP2: only low-resolution rows are in shared memory. The enlargement happens in registers, in two exact-weight passes:
// down the columns in fp32 on the matrix unit's B fragments (16 low columns x 16 channels), rounded, then along the row as
// a product with a constant 16 x 16 matrix for each horizontal tap, whose result is, after LeakyReLU, already the A
// fragment that the convolution wants. Rows of that matrix that belong to the zero padding are zero.
// With INT8 or FP8 the result is 8-bit codes; weights and bias then come divided by the codes' step, channel by channel,
// and `gain` holds, for each image, the factor that the steps are widened by and its inverse.
#if defined(INT8) || defined(FP8)
#define CODES
typedef unsigned char Out;
#else
typedef u16 Out;
#endif
// Rolled loops on purpose: unrolled, sixteen warps at as many places of a long body starve on instruction fetch.
#ifndef UNROLL
#define UNROLL 1
#endif
constexpr int ROW_UNROLL = UNROLL;

// One warp's share: taps, rolling accumulators, and where its results go.
struct Warp {
    u32 taps[36];
    float sums[3][2][4];
    float bias[4];
    Out* target;    // (batch, y0, x0 + strip + lane / 4, first channel of this thread)
    bool active, store0, store1;
#ifdef CODES
    float inverse_gain;
#endif
};

DEVICE void load_taps(Warp& w, const uint4* packed, int group, int lane) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
        uint4 v = load_weights(packed + (group * 9 + tap) * 32 + lane);
        w.taps[tap * 4] = v.x, w.taps[tap * 4 + 1] = v.y, w.taps[tap * 4 + 2] = v.z, w.taps[tap * 4 + 3] = v.w;
    }
}

DEVICE void prepare(Warp& w, const Tile& t, Out* out, const float* bias, const float* gain, int height, int width,
                    int channels, int warp, int lane) {
    int group = warp & 3, strip = (warp >> 2) * 16;
    int channel = t.channel0 + group * 16 + (lane & 3) * 4;
    int column = t.x0 + strip + (lane >> 2);
    w.active = t.channel0 + group * 16 < channels && t.x0 + strip < width;
    w.store0 = w.active && column < width;
    w.store1 = w.active && column + 8 < width;
    w.target = out + (((i64)t.batch * height + t.y0) * width + column) * channels + channel;
#pragma unroll
    for (int i = 0; i < 4; ++i) w.bias[i] = w.active ? bias[channel + i] : 0.f;
#ifdef CODES
    w.inverse_gain = gain[2 * t.batch + 1];
#endif
}

DEVICE void begin_row(Warp& w) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) w.sums[2][n][i] = w.bias[n * 2 + (i & 1)];
}

// Adds one input row in horizontal shift s; sums[age] is the output row for which this input row is tap 2 - age.
DEVICE void multiply(Warp& w, const u32 (&a)[4], int s) {
#pragma unroll
    for (int age = 0; age < 3; ++age) {
        const u32* b = w.taps + ((2 - age) * 3 + s) * 4;
        mma(w.sums[age][0], a, b[0], b[1]);
        mma(w.sums[age][1], a, b[2], b[3]);
    }
}

// Stores the row that is complete, when there is one, and moves on.
DEVICE void end_row(Warp& w, bool store, i64 pixel8, i64 line) {
    float(&d)[2][4] = w.sums[0];
#ifdef CODES
    float g = w.inverse_gain;
    store_global4_if(store && w.store0, w.target, leaky_codes(g * d[0][0], g * d[0][1], g * d[1][0], g * d[1][1]));
    store_global4_if(store && w.store1, w.target + pixel8, leaky_codes(g * d[0][2], g * d[0][3], g * d[1][2], g * d[1][3]));
#else
    store_global8_if(store && w.store0, w.target, leaky2(pack(d[0][0], d[0][1])), leaky2(pack(d[1][0], d[1][1])));
    store_global8_if(store && w.store1, w.target + pixel8, leaky2(pack(d[0][2], d[0][3])), leaky2(pack(d[1][2], d[1][3])));
#endif
    w.target += store ? line : 0;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) w.sums[0][n][i] = w.sums[1][n][i], w.sums[1][n][i] = w.sums[2][n][i];
}

#ifndef UP2
extern "C" __global__ void __launch_bounds__(THREADS, 2)
grouped_conv(Out* out, const u16* x, const uint4* packed, const float* bias, const float* gain, int height, int width, int channels,
             int rows_per_block) {
    extern __shared__ __align__(128) unsigned char memory[];
    u32 ring = shared_address(memory);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Tile t = tile_of_block(height, width, channels, rows_per_block);
    int count = t.y1 - t.y0 + 2;  // input rows
    int phases = (count + ROWS - 1) / ROWS;
    i64 pixel8 = 8 * (i64)channels, line = (i64)width * channels;
    Fetch f;
    prepare(f, x, t, height, width, channels);
#pragma unroll
    for (int p = 0; p < STAGES - 1; ++p) {
        if (p < phases) fetch_rows(f, ring + p * ROWS * ROW_BYTES, height, line);
        copy_commit();
    }
    Warp w;
    prepare(w, t, out, bias, gain, height, width, channels, warp, lane);
    if (w.active) load_taps(w, packed, t.channel0 / 16 + (warp & 3), lane);
    int group = warp & 3, strip = (warp >> 2) * 16;
    int slot = 0, free_slot = STAGES - 1;
    for (int p = 0; p < phases; ++p) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        int next = p + STAGES - 1;
        if (next < phases) fetch_rows(f, ring + free_slot * ROWS * ROW_BYTES, height, line);
        copy_commit();
        if (w.active) {
            int rows = min(ROWS, count - p * ROWS);
            u32 row = ring + slot * ROWS * ROW_BYTES;
#pragma unroll ROW_UNROLL
            for (int r = 0; r < rows; ++r) {
                begin_row(w);
#pragma unroll
                for (int s = 0; s < 3; ++s) {
                    u32 a[4];
                    load_matrix(a, row + place(strip + s + (lane & 15), group * 2 + (lane >> 4)));
#pragma unroll
                    for (int i = 0; i < 4; ++i) a[i] = leaky2(a[i]);
                    multiply(w, a, s);
                }
                end_row(w, p * ROWS + r >= 2, pixel8, line);
                row += ROW_BYTES;
            }
        }
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        free_slot = free_slot + 1 == STAGES ? 0 : free_slot + 1;
    }
    copy_wait<0>();
}

#else
#define PAIRS 4  // pairs of output rows a phase; each needs one more low row; four phases fill the ring
#define LOW_COLUMNS 24
#define LOW_ROW_BYTES (LOW_COLUMNS * 128)
#define LOW_RING 16

// Rows [first, last) of the low-resolution window, counted from image row y0 / 2 - 2; borders are clamped. Columns start
// at image column x0 / 2 - 2; the last four only ever meet zero weights, but must be finite.
DEVICE void fetch_low(u32 ring, const u16* x, const Tile& t, int first, int last, int low_height, int low_width, int channels) {
    int chunk = threadIdx.x & 7, column = threadIdx.x >> 3, channel = t.channel0 + chunk * 8;
    if (column >= LOW_COLUMNS) return;
    bool valid = channel < channels;
    i64 line = (i64)low_width * channels;
    const u16* source = x + (i64)t.batch * low_height * line + (i64)clamp(t.x0 / 2 - 2 + column, 0, low_width - 1) * channels + channel;
    u32 target = ring + place(column, chunk);
#pragma unroll 1
    for (int row = first; row < last; ++row) {
        int y = clamp(t.y0 / 2 - 2 + row, 0, low_height - 1);
        copy16_or_zero(target + (row & (LOW_RING - 1)) * LOW_ROW_BYTES, source + y * line, valid);
    }
}

// Weight of low column k for output column d, counted from the first column of the strip's halo: 256 times it.
DEVICE float weight(int d, int k) {
    int tap = k - (d >> 1);
    tap = d & 1 ? 3 - tap : tap;
    return tap == 0 ? -27.f / 256 : tap == 1 ? 225.f / 256 : tap == 2 ? 67.f / 256 : tap == 3 ? -9.f / 256 : 0.f;
}

// A fragments of the three 16 x 16 enlargement matrices, zero in rows outside the image.
DEVICE void prepare(u32 (&matrix)[3][4], int x_first, int width, int lane) {
#pragma unroll
    for (int s = 0; s < 3; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int d = s + (lane >> 2) + (i & 1) * 8, k = (lane & 3) * 2 + (i >> 1) * 8, x = x_first + d;
            matrix[s][i] = x >= 0 && x < width ? pack(weight(d, k), weight(d, k + 1)) : 0u;
        }
}

// `height` and `width` are those of the output; the input is half of both. rows_per_block must be even.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
grouped_conv(Out* out, const u16* x, const uint4* packed, const float* bias, const float* gain, int height, int width, int channels,
             int rows_per_block) {
    extern __shared__ __align__(128) unsigned char memory[];
    u32 ring = shared_address(memory);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Tile t = tile_of_block(height, width, channels, rows_per_block);
    int pairs = (t.y1 - t.y0) / 2 + 1, phases = (pairs + PAIRS - 1) / PAIRS, lows = pairs + 3;
    auto fetch_phase = [&](int p) {  // the low rows that phase p needs (one output row ahead) and phase p - 1 did not
        fetch_low(ring, x, t, p ? p * PAIRS + 4 : 0, min((p + 1) * PAIRS + 4, lows), height / 2, width / 2, channels);
        copy_commit();
    };
    fetch_phase(0);
    fetch_phase(1);
    Warp w;
    prepare(w, t, out, bias, gain, height, width, channels, warp, lane);
    if (w.active) load_taps(w, packed, t.channel0 / 16 + (warp & 3), lane);
    u32 matrix[3][4];
    prepare(matrix, t.x0 + (warp >> 2) * 16 - 1, width, lane);
    i64 pixel8 = 8 * (i64)channels, line = (i64)width * channels;
    u32 source = ring + place((warp >> 2) * 8 + (lane & 15), (warp & 3) * 2 + (lane >> 4));
    // The A fragments of output row i (counted from y0 - 1): LeakyReLU of the enlarged image at the three shifts.
    auto produce = [&](u32(&a)[3][4], int i) {
        u32 low[4][4], b[4];  // B fragments: registers 0, 1 are channels 0-7, registers 2, 3 channels 8-15
#pragma unroll
        for (int j = 0; j < 4; ++j) load_matrix_transposed(low[j], source + (((i >> 1) + j) & (LOW_RING - 1)) * LOW_ROW_BYTES);
        int y = t.y0 - 1 + i;
        float unit = y >= 0 && y < height ? 1.f / 256 : 0.f;  // rows of the zero padding are zero
        float w0 = unit * (i & 1 ? -9.f : -27.f), w1 = unit * (i & 1 ? 67.f : 225.f);
        float w2 = unit * (i & 1 ? 225.f : 67.f), w3 = unit * (i & 1 ? -27.f : -9.f);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            b[k] = pack(fmaf(w0, low_float(low[0][k]), fmaf(w1, low_float(low[1][k]), fmaf(w2, low_float(low[2][k]), w3 * low_float(low[3][k])))),
                        fmaf(w0, high_float(low[0][k]), fmaf(w1, high_float(low[1][k]), fmaf(w2, high_float(low[2][k]), w3 * high_float(low[3][k])))));
#pragma unroll
        for (int s = 0; s < 3; ++s) {
            float d[2][4] = {};
            mma(d[0], matrix[s], b[0], b[1]);
            mma(d[1], matrix[s], b[2], b[3]);
            a[s][0] = leaky2(pack(d[0][0], d[0][1])), a[s][1] = leaky2(pack(d[0][2], d[0][3]));
            a[s][2] = leaky2(pack(d[1][0], d[1][1])), a[s][3] = leaky2(pack(d[1][2], d[1][3]));
        }
    };
    u32 a[3][4];
    for (int p = 0; p < phases; ++p) {
        copy_wait<1>();
        __syncthreads();
        fetch_phase(p + 2);
        if (!w.active) continue;
        if (p == 0) produce(a, 0);
        int last = min((p + 1) * PAIRS, pairs) * 2;
#pragma unroll 1
        for (int i = p * PAIRS * 2; i < last; ++i) {
            // The next row's enlargement is independent of this row's products: one hides the other's latency. Past the
            // last row it reads whatever the ring holds, and is not used.
            u32 next[3][4];
            produce(next, i + 1);
            begin_row(w);
#pragma unroll
            for (int s = 0; s < 3; ++s) multiply(w, a[s], s);
            end_row(w, i >= 2, pixel8, line);
#pragma unroll
            for (int s = 0; s < 3; ++s)
#pragma unroll
                for (int k = 0; k < 4; ++k) a[s][k] = next[s][k];
        }
    }
    copy_wait<0>();
}
#endif
