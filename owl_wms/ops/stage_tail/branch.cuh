// One warp's part of the hidden branch: 16 channels (one group) of a strip of 32 output columns, from low-resolution rows in
// global memory to leaky(conv3x3(leaky(up2(hidden))) + bias). A warp needs no other: its rows, enlarged pixels and
// accumulators are its own, so it never waits for more than its own copies.
//
// A step takes low row i and makes enlarged rows 2i+1 and 2i+2 (which lie between low rows i and i+1), in two exact-weight
// passes: down the columns in fp32 on the matrix unit's B fragments, then along the row as a product with a constant
// 16 x 16 matrix. Eight low columns further is sixteen pixels further, so one matrix serves both tiles and three blocks of
// eight columns serve all 34 pixels. The pixels go to shared memory once, to be read in three horizontal shifts.
// The same step's convolution, one pair of rows behind, completes output rows 2i and 2i+1; the two rows begun are kept.
#define STRIP 32
#define COLUMNS (STRIP + 2)
#define LOW_COLUMNS (STRIP / 2 + 4)
#define LOW_SLOTS 6  // four rows in use, two on their way
#define LOW_ROW_BYTES (LOW_COLUMNS * 32)
#define PIXEL_ROW_BYTES (COLUMNS * 32)
#define BRANCH_BYTES (LOW_SLOTS * LOW_ROW_BYTES + 4 * PIXEL_ROW_BYTES)

struct Strip {
    int batch, x0, first, last;  // output columns [x0, x0 + STRIP), low rows [first, last), output rows [2 first, 2 last)
};

// Byte of (pixel, 16-byte half) in a row of one group: eight neighbouring pixels lie in different banks, whatever the first.
DEVICE u32 place(int pixel, int half) { return pixel * 32 + ((half ^ ((pixel >> 2) & 1)) << 4); }

// Weight of low column k for pixel d, both counted from the strip's first (pixel x0 - 1, low column x0 / 2 - 2).
DEVICE float weight(int d, int k) {
    int tap = k - (d >> 1);
    tap = d & 1 ? 3 - tap : tap;
    return tap == 0 ? -27.f / 256 : tap == 1 ? 225.f / 256 : tap == 2 ? 67.f / 256 : tap == 3 ? -9.f / 256 : 0.f;
}

// A fragment of the 16 x 16 enlargement matrix whose first pixel is `first`.
DEVICE void enlargement(u32 (&matrix)[4], int first, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int d = first + (lane >> 2) + (i & 1) * 8, k = (lane & 3) * 2 + (i >> 1) * 8;
        matrix[i] = pack(weight(d, k), weight(d, k + 1));
    }
}

// Two enlarged rows out of four low ones, for the two values of a register.
DEVICE void enlarge_down(u32& upper, u32& lower, u32 a, u32 b, u32 c, u32 d) {
    float a0 = low_float(a), a1 = high_float(a), b0 = low_float(b), b1 = high_float(b);
    float c0 = low_float(c), c1 = high_float(c), d0 = low_float(d), d1 = high_float(d);
    upper = pack(quarter(a0, b0, c0, d0), quarter(a1, b1, c1, d1));
    lower = pack(three_quarters(a0, b0, c0, d0), three_quarters(a1, b1, c1, d1));
}

// Offset into a ring of `size` bytes that may have run past its end once: below 0 is above everything.
DEVICE u32 wrapped(u32 offset, u32 size) { return min(offset, offset - size); }

// Copies one group's low rows, border columns and rows repeated, into a ring of LOW_SLOTS.
struct Rows {
    const u16* source;  // this lane's piece of the row; 20 columns are 40 pieces, so eight lanes copy a second one
    i64 line;
    u32 rest, ring, next, target, rest_target;
    int row, height;
    bool has_rest;
};

DEVICE void prepare(Rows& r, const u16* image, const Strip& s, int height, int width, int channels, int group, u32 ring, int lane) {
    int half = lane & 1, column = lane >> 1, left = s.x0 / 2 - 2, first = clamp(left + column, 0, width - 1);
    r.line = (i64)width * channels;
    r.row = s.first - 2, r.height = height;
    r.source = image + ((i64)s.batch * height + max(r.row, 0)) * r.line + (i64)first * channels + group * 16 + half * 8;
    r.rest = (clamp(left + 16 + column, 0, width - 1) - first) * channels, r.has_rest = lane < 2 * LOW_COLUMNS - 32;
    r.ring = ring, r.next = 0, r.target = ring + place(column, half), r.rest_target = ring + place(16 + column, half);
}

DEVICE void copy_row(Rows& r) {
    copy16(r.next + r.target, r.source);
    if (r.has_rest) copy16(r.next + r.rest_target, r.source + r.rest);
    copy_commit();
    r.source += (u32)r.row < (u32)(r.height - 1) ? r.line : 0;
    ++r.row;
    r.next = wrapped(r.next + LOW_ROW_BYTES, LOW_SLOTS * LOW_ROW_BYTES);
}

// The zero padding is zero after the enlargement: clears pixels outside the image in a pair of rows, y and y + 1.
DEVICE void clear_outside(u32 pixels, int x, int y, int height, int width, int lane) {
    __syncwarp();
#pragma unroll 1
    for (int p = lane; p < 2 * COLUMNS; p += 32) {
        int row = p >= COLUMNS, d = p - row * COLUMNS;
        if ((unsigned)(x + d) < (unsigned)width && (unsigned)(y + row) < (unsigned)height) continue;
        store_shared16(pixels + row * PIXEL_ROW_BYTES + d * 32, 0);
        store_shared16(pixels + row * PIXEL_ROW_BYTES + d * 32 + 16, 0);
    }
}

// `packed` holds the taps as grouped_conv packs them. The sink gets, for every low row: begin(), then for row r and tile j of
// 16 columns put(r, j, sum): this lane's eight sums before LeakyReLU, sum[n][2 m + e] channel 4 t + 2 n + e of column
// 16 j + 8 m + g (lane 4 g + t); then end(valid). The first pair of rows of a strip only begins sums: it ends with valid false.
template <class Sink>
DEVICE void run_branch(const Strip& s, const u16* hidden, const uint4* packed, const float* bias, int height, int width, int channels,
                       int group, u32 memory, int lane, Sink& sink) {
    Rows rows;
    prepare(rows, hidden, s, height, width, channels, group, memory, lane);
#pragma unroll 1
    for (int i = 0; i < LOW_SLOTS; ++i) copy_row(rows);
    u32 taps[9][4], matrix[4];
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
        uint4 v = load_weights(packed + (group * 9 + tap) * 32 + lane);
        taps[tap][0] = v.x, taps[tap][1] = v.y, taps[tap][2] = v.z, taps[tap][3] = v.w;
    }
    enlargement(matrix, 0, lane);
    // Pixels 32 and 33 of both rows in one product: rows 0, 1 of the fragment with k < 8, rows 8, 9 with k >= 8.
    u32 halo[4] = {lane < 8 ? matrix[0] : 0, 0, 0, lane < 8 ? matrix[0] : 0};
    float start[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) start[i] = bias[group * 16 + (lane & 3) * 4 + i];
    u32 fragment = memory + place(lane & 15, lane >> 4);                                    // blocks 0 and 1 of a low row
    u32 last_block = memory + place(min(16 + (lane & 7), LOW_COLUMNS - 1), lane >> 3 & 1);  // block 2; its end has no weight
    u32 halo_target = place(STRIP + (lane >> 2 & 1), 0) + (lane & 3) * 4 - place(lane & 15, lane >> 4);
    bool borders = s.x0 == 0 || s.x0 + STRIP >= 2 * width;
    // Two buffers of two rows: one is read, in three shifts, while the other is written.
    u32 pixels = memory + LOW_SLOTS * LOW_ROW_BYTES, oldest = 0;
    int other = 2 * PIXEL_ROW_BYTES;
    u32 shifted[3];
#pragma unroll
    for (int shift = 0; shift < 3; ++shift) shifted[shift] = pixels + place(shift + (lane & 15), lane >> 4);

    // Enlarged rows 2i+1 and 2i+2 to `target`, this lane's place for tile 0; low row i-1 is in the slot `oldest`.
    auto enlarge = [&](u32 target) {
        u32 slot[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) slot[j] = wrapped(oldest + j * LOW_ROW_BYTES, LOW_SLOTS * LOW_ROW_BYTES);
        u32 b[2][3][2];  // [row][block of eight low columns][eight channels]
        {
            u32 low[4][4];
#pragma unroll
            for (int j = 0; j < 4; ++j) load_matrix_transposed(low[j], slot[j] + fragment);
#pragma unroll
            for (int k = 0; k < 4; ++k) enlarge_down(b[0][k & 1][k >> 1], b[1][k & 1][k >> 1], low[0][k], low[1][k], low[2][k], low[3][k]);
        }
        auto along = [&](int r, int j) {
            float d[2][4] = {};
            mma(d[0], matrix, b[r][j][0], b[r][j + 1][0]);
            mma(d[1], matrix, b[r][j][1], b[r][j + 1][1]);
            store_matrix(target + r * PIXEL_ROW_BYTES + j * 512, leaky2(pack(d[0][0], d[0][1])), leaky2(pack(d[0][2], d[0][3])),
                         leaky2(pack(d[1][0], d[1][1])), leaky2(pack(d[1][2], d[1][3])));
        };
        along(0, 0), along(1, 0);
        {
            u32 low[2][4];
            load_matrix_transposed(low[0], (lane < 16 ? slot[0] : slot[1]) + last_block);
            load_matrix_transposed(low[1], (lane < 16 ? slot[2] : slot[3]) + last_block);
#pragma unroll
            for (int k = 0; k < 2; ++k) enlarge_down(b[0][2][k], b[1][2][k], low[0][k], low[0][k + 2], low[1][k], low[1][k + 2]);
        }
        along(0, 1), along(1, 1);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float d[4] = {};
            mma(d, halo, b[0][2][n], b[1][2][n]);
            // place(32 + g, n) for g < 2: the halves do not change sides.
            store_shared4_if(lane < 8, target + halo_target + n * 16, leaky2(pack(d[0], d[1])));
            store_shared4_if(lane < 8, target + halo_target + n * 16 + PIXEL_ROW_BYTES, leaky2(pack(d[2], d[3])));
        }
        oldest = slot[1];
    };
    // To be called after enlarge(), with the first of the two rows it made.
    auto clear = [&](u32 rows_at, int y) {
        if (borders || y < 0 || y + 1 == 2 * height) clear_outside(rows_at, s.x0 - 1, y, 2 * height, 2 * width, lane);
    };

    copy_wait<LOW_SLOTS - 4>();
    __syncwarp();
    enlarge(shifted[0]);
    int y = 2 * s.first - 1;
    clear(pixels, y);
    bool valid = false;
    float two[2][2][4] = {}, one[2][2][4] = {};  // [tile][eight channels]: output rows with two thirds and one third of their sum
#pragma unroll 1
    for (int left = s.last - s.first; left >= 0; --left) {
        copy_wait<LOW_SLOTS - 5>();
        __syncwarp();  // rows copied and pixels stored by the other lanes are there; nobody still reads what comes next
        copy_row(rows);
        enlarge(shifted[0] + other);
        sink.begin();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float fresh[2][4], newest[2][4];
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) fresh[n][e] = newest[n][e] = start[n * 2 + (e & 1)];
            u32 a[4];
            auto add = [&](float(&sum)[2][4], int tap) {
                mma(sum[0], a, taps[tap][0], taps[tap][1]);
                mma(sum[1], a, taps[tap][2], taps[tap][3]);
            };
#pragma unroll
            for (int shift = 0; shift < 3; ++shift) {
                load_matrix(a, shifted[shift] + j * 512);
                add(two[j], 6 + shift), add(one[j], 3 + shift), add(fresh, shift);
            }
            sink.put(0, j, two[j]);
#pragma unroll
            for (int shift = 0; shift < 3; ++shift) {
                load_matrix(a, shifted[shift] + j * 512 + PIXEL_ROW_BYTES);
                add(one[j], 6 + shift), add(fresh, 3 + shift), add(newest, shift);
            }
            sink.put(1, j, one[j]);
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) two[j][n][e] = fresh[n][e], one[j][n][e] = newest[n][e];
        }
        sink.end(valid);
        valid = true;
        pixels += other, y += 2;
        clear(pixels, y);
#pragma unroll
        for (int shift = 0; shift < 3; ++shift) shifted[shift] += other;
        other = -other;
    }
    copy_wait<0>();
}
