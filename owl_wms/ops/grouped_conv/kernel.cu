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
// UP2: low-resolution rows arrive in a ring of 16; each phase turns them into 8 full rows in one half of a double buffer
// while the tensor cores work on the other half. A ninth warp helps with the 17th pair of columns.
#define STRIP 32
#define COLUMNS (STRIP + 2)
#define ROW_BYTES (COLUMNS * 128)

// Byte of (pixel column, 16-byte chunk) in a row: the exclusive-or keeps eight neighbouring pixels in different banks.
DEVICE u32 place(int column, int chunk) { return column * 128 + ((chunk ^ (column & 7)) << 4); }

struct Tile {
    int batch, x0, y0, y1, channel0;  // outputs [y0, y1) x [x0, x0 + STRIP), channels [channel0, channel0 + 64)
};

DEVICE Tile tile_of_block(int height, int width, int channels, int rows_per_block) {
    int chunks = (channels + 63) / 64, strips = (width + STRIP - 1) / STRIP, bands = (height + rows_per_block - 1) / rows_per_block;
    int index = blockIdx.x;
    Tile t;
    t.channel0 = index % chunks * 64;
    index /= chunks;
    t.x0 = index % strips * STRIP;
    index /= strips;
    t.y0 = index % bands * rows_per_block;
    t.batch = index / bands;
    t.y1 = min(t.y0 + rows_per_block, height);
    return t;
}

// One warp's share: taps, rolling accumulators, and where its results go.
struct Warp {
    u32 taps[36];
    float sums[3][2][4];
    float bias[4];
    u32 shift[3];   // ldmatrix byte offsets inside a row, one for each horizontal tap
    u16* target;    // (batch, y0, x0 + strip + lane / 4, first channel of this thread)
    bool active, store0, store1;
};

DEVICE void load_taps(Warp& w, const uint4* packed, int group, int lane) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
        uint4 v = load_weights(packed + (group * 9 + tap) * 32 + lane);
        w.taps[tap * 4] = v.x, w.taps[tap * 4 + 1] = v.y, w.taps[tap * 4 + 2] = v.z, w.taps[tap * 4 + 3] = v.w;
    }
}

DEVICE void prepare(Warp& w, const Tile& t, u16* out, const float* bias, int height, int width, int channels, int warp, int lane) {
    int group = warp & 3, strip = (warp >> 2) * 16;
    int channel = t.channel0 + group * 16 + (lane & 3) * 4;
    int column = t.x0 + strip + (lane >> 2);
    w.active = warp < 8 && t.channel0 + group * 16 < channels && t.x0 + strip < width;
    w.store0 = w.active && column < width;
    w.store1 = w.active && column + 8 < width;
    w.target = out + (((i64)t.batch * height + t.y0) * width + column) * channels + channel;
#pragma unroll
    for (int i = 0; i < 4; ++i) w.bias[i] = w.active ? bias[channel + i] : 0.f;
#pragma unroll
    for (int s = 0; s < 3; ++s) w.shift[s] = place(strip + s + (lane & 15), group * 2 + (lane >> 4));
}

// Adds one input row (at shared address `row`) to the three output rows it touches, stores the finished one when asked.
template <bool ACTIVATE> DEVICE void add_row(Warp& w, u32 row, bool store, i64 pixel8, i64 line) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) w.sums[2][n][i] = w.bias[n * 2 + (i & 1)];
#pragma unroll
    for (int s = 0; s < 3; ++s) {
        u32 a[4];
        load_matrix(a, row + w.shift[s]);
        if (ACTIVATE) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = leaky2(a[i]);
        }
#pragma unroll
        for (int age = 0; age < 3; ++age) {  // sums[age] is the output row for which this input row is tap 2 - age
            const u32* b = w.taps + ((2 - age) * 3 + s) * 4;
            mma(w.sums[age][0], a, b[0], b[1]);
            mma(w.sums[age][1], a, b[2], b[3]);
        }
    }
    if (store) {
        float(&d)[2][4] = w.sums[0];
        if (w.store0) store_global8(w.target, pack(leaky(d[0][0]), leaky(d[0][1])), pack(leaky(d[1][0]), leaky(d[1][1])));
        if (w.store1)
            store_global8(w.target + pixel8, pack(leaky(d[0][2]), leaky(d[0][3])), pack(leaky(d[1][2]), leaky(d[1][3])));
        w.target += line;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) w.sums[0][n][i] = w.sums[1][n][i], w.sums[1][n][i] = w.sums[2][n][i];
}

#ifndef UP2
#define ROWS 4
#define STAGES 3
#define THREADS 256

DEVICE void fetch_rows(u32 ring, const u16* x, const Tile& t, int first, int count, int height, int width, int channels) {
    int chunk = threadIdx.x & 7, channel = t.channel0 + chunk * 8;
#pragma unroll
    for (int k = 0; k < (ROWS * COLUMNS * 8 + THREADS - 1) / THREADS; ++k) {
        int pixel = (threadIdx.x >> 3) + k * (THREADS / 8);
        int row = pixel / COLUMNS, column = pixel - row * COLUMNS;
        int y = t.y0 - 1 + first + row, px = t.x0 - 1 + column;
        if (row < ROWS && first + row < count) {
            bool valid = y >= 0 && y < height && px >= 0 && px < width && channel < channels;
            const u16* source = x + (((i64)t.batch * height + y) * width + px) * channels + channel;
            copy16(ring + row * ROW_BYTES + place(column, chunk), valid ? source : x, valid);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
grouped_conv(u16* out, const u16* x, const uint4* packed, const float* bias, int height, int width, int channels, int rows_per_block) {
    extern __shared__ __align__(128) unsigned char memory[];
    u32 ring = shared_address(memory);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Tile t = tile_of_block(height, width, channels, rows_per_block);
    int count = t.y1 - t.y0 + 2;  // input rows
    int phases = (count + ROWS - 1) / ROWS;
#pragma unroll
    for (int p = 0; p < STAGES - 1; ++p) {
        if (p < phases) fetch_rows(ring + p * ROWS * ROW_BYTES, x, t, p * ROWS, count, height, width, channels);
        copy_commit();
    }
    Warp w;
    prepare(w, t, out, bias, height, width, channels, warp, lane);
    if (w.active) load_taps(w, packed, t.channel0 / 16 + (warp & 3), lane);
    i64 pixel8 = 8 * (i64)channels, line = (i64)width * channels;
    int slot = 0, free_slot = STAGES - 1;
    for (int p = 0; p < phases; ++p) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        int next = p + STAGES - 1;
        if (next < phases) fetch_rows(ring + free_slot * ROWS * ROW_BYTES, x, t, next * ROWS, count, height, width, channels);
        copy_commit();
        if (w.active) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (p * ROWS + r >= count) break;
                add_row<true>(w, ring + (slot * ROWS + r) * ROW_BYTES, p * ROWS + r >= 2, pixel8, line);
            }
        }
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        free_slot = free_slot + 1 == STAGES ? 0 : free_slot + 1;
    }
    copy_wait<0>();
}

#else
#define ROWS 8
#define THREADS 288
#define LOW_COLUMNS (STRIP / 2 + 4)
#define LOW_ROW_BYTES (LOW_COLUMNS * 128)
#define LOW_RING 16

// Rows [first, last) of the low-resolution window, counted from image row y0 / 2 - 2; borders are clamped.
DEVICE void fetch_low(u32 ring, const u16* x, const Tile& t, int first, int last, int low_height, int low_width, int channels) {
    int items = (last - first) * LOW_COLUMNS * 8;
    for (int item = threadIdx.x; item < items; item += THREADS) {
        int chunk = item & 7, pixel = item >> 3, row = first + pixel / LOW_COLUMNS, column = pixel % LOW_COLUMNS;
        int y = clamp(t.y0 / 2 - 2 + row, 0, low_height - 1), px = clamp(t.x0 / 2 - 2 + column, 0, low_width - 1);
        int channel = t.channel0 + chunk * 8;
        const u16* source = x + (((i64)t.batch * low_height + y) * low_width + px) * channels + channel;
        copy16(ring + (row & (LOW_RING - 1)) * LOW_ROW_BYTES + column * 128 + chunk * 16, channel < channels ? source : x, channel < channels);
    }
}

// Horizontal pass over one low row: this thread's two full-resolution columns, four channels each.
DEVICE void widen(float (&left)[4], float (&right)[4], u32 source) {
    float v[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 a, b;
        load_shared8(source + i * 128, a, b);
        v[i][0] = low_float(a), v[i][1] = high_float(a), v[i][2] = low_float(b), v[i][3] = high_float(b);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        left[c] = quarter(v[0][c], v[1][c], v[2][c], v[3][c]);
        right[c] = three_quarters(v[0][c], v[1][c], v[2][c], v[3][c]);
    }
}

// Writes the activated pair of rows (2m, 2m + 1 of a phase) of one column.
DEVICE void heighten(u32 row, u32 offset, const float (&a)[4], const float (&b)[4], const float (&c)[4], const float (&d)[4],
                     bool upper, bool lower, bool inside) {
    float u[4], l[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) u[i] = quarter(a[i], b[i], c[i], d[i]), l[i] = three_quarters(a[i], b[i], c[i], d[i]);
    bool first = upper && inside, second = lower && inside;
    store_shared8(row + offset, first ? leaky2(pack(u[0], u[1])) : 0u, first ? leaky2(pack(u[2], u[3])) : 0u);
    store_shared8(row + ROW_BYTES + offset, second ? leaky2(pack(l[0], l[1])) : 0u, second ? leaky2(pack(l[2], l[3])) : 0u);
}

// Fills the 8 full rows of phase p. Rows and columns outside the image are the convolution's zero padding.
DEVICE void enlarge(u32 buffer, u32 ring, const Tile& t, int p, int count, int height, int width) {
    int pair = threadIdx.x >> 4, quad = threadIdx.x & 15;
    if (pair >= COLUMNS / 2) return;
    int x = t.x0 - 1 + 2 * pair;  // even-odd pair straddles: x = 2i + 1, x + 1 = 2i + 2
    bool inside0 = x >= 0 && x < width, inside1 = x + 1 < width;
    u32 offset0 = place(2 * pair, quad >> 1) + (quad & 1) * 8, offset1 = place(2 * pair + 1, quad >> 1) + (quad & 1) * 8;
    u32 source = ring + pair * 128 + quad * 8;
    float l[4][4], r[4][4];
    int low = p * (ROWS / 2);
#pragma unroll
    for (int j = 0; j < 3; ++j) widen(l[j], r[j], source + ((low + j) & (LOW_RING - 1)) * LOW_ROW_BYTES);
#pragma unroll
    for (int m = 0; m < ROWS / 2; ++m) {
        if (p * ROWS + 2 * m >= count) break;
        widen(l[(m + 3) & 3], r[(m + 3) & 3], source + ((low + m + 3) & (LOW_RING - 1)) * LOW_ROW_BYTES);
        int y = t.y0 - 1 + p * ROWS + 2 * m;
        bool upper = y >= 0 && y < height, lower = y + 1 < height;
        u32 row = buffer + 2 * m * ROW_BYTES;
        heighten(row, offset0, l[m & 3], l[(m + 1) & 3], l[(m + 2) & 3], l[(m + 3) & 3], upper, lower, inside0);
        heighten(row, offset1, r[m & 3], r[(m + 1) & 3], r[(m + 2) & 3], r[(m + 3) & 3], upper, lower, inside1);
    }
}

// `height` and `width` are those of the output; the input is half of both. rows_per_block must be even.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
grouped_conv(u16* out, const u16* x, const uint4* packed, const float* bias, int height, int width, int channels, int rows_per_block) {
    extern __shared__ __align__(128) unsigned char memory[];
    u32 buffers = shared_address(memory), ring = buffers + 2 * ROWS * ROW_BYTES;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Tile t = tile_of_block(height, width, channels, rows_per_block);
    int count = t.y1 - t.y0 + 2, phases = (count + ROWS - 1) / ROWS;
    int low_height = height / 2, low_width = width / 2, lows = count / 2 + 3;
    auto fetch_phase = [&](int p) {  // the low rows that phase p needs and phase p - 1 did not
        int first = p ? p * (ROWS / 2) + 3 : 0, last = min((p + 1) * (ROWS / 2) + 3, lows);
        if (first < last) fetch_low(ring, x, t, first, last, low_height, low_width, channels);
        copy_commit();
    };
    fetch_phase(0);
    fetch_phase(1);
    fetch_phase(2);
    Warp w;
    prepare(w, t, out, bias, height, width, channels, warp, lane);
    i64 pixel8 = 8 * (i64)channels, line = (i64)width * channels;
    copy_wait<2>();
    __syncthreads();
    enlarge(buffers, ring, t, 0, count, height, width);
    for (int p = 0; p < phases; ++p) {
        copy_wait<1>();
        __syncthreads();
        fetch_phase(p + 3);
        // Half of the warps multiply first and enlarge second, so that both kinds of work overlap.
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            if ((half ^ (warp >> 2)) & 1) {
                if (w.active) {
                    u32 rows = buffers + (p & 1) * ROWS * ROW_BYTES;
                    load_taps(w, packed, t.channel0 / 16 + (warp & 3), lane);
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) {
                        if (p * ROWS + r >= count) break;
                        add_row<false>(w, rows + r * ROW_BYTES, p * ROWS + r >= 2, pixel8, line);
                    }
                }
            } else if (p + 1 < phases) {
                enlarge(buffers + ((p + 1) & 1) * ROWS * ROW_BYTES, ring, t, p + 1, count, height, width);
            }
        }
    }
    copy_wait<0>();
}
#endif
