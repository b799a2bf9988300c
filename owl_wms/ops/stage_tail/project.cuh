// The four warps that finish a stage: out = h w3^T + up2(low) + shuffle(shortcut), 64 pixels (two rows of a strip) a step.
//
// h arrives in a ring of shared-memory slots, w3 stays in shared memory, and the product is one wgmma a 16 channels of h.
// While it runs, the warps take `low` down its columns in fp32; the other two terms are then added to the same accumulators
// as products with constant matrices. A warp has 8 columns of both rows: row m of its 16 is pixel m % 8 of row m / 8. So
// eight low columns, taken down to both rows (k < 8 and k >= 8), make all of its up2(low), and the 16 numbers that four low
// pixels of the shortcut hold for a channel are all of its shuffle. Both are exact: weights and inputs are 16-bit values.
//
// CHANNELS (multiple of 16): width of the stage. WIDE: channels of h. COLUMNS_OUT: channels one block makes; PADDED: the same
// rounded up to what `product` takes. SHORTCUT: channels of the shortcut, 0 without one.
#if MODE != 1
#define BLOCKS_OF_64 ((WIDE + 63) / 64)
#define SLOT_BYTES (BLOCKS_OF_64 * 64 * 128)
#define WEIGHT_BYTES (BLOCKS_OF_64 * PADDED * 128)
// Pixels lie an odd number of 16-byte units apart, eight of them in different banks; those of the shortcut 32 bytes modulo
// 128, four of them in different banks.
#define LOW_PITCH (COLUMNS_OUT * 2 + 16)
#define LOW_SLOT_BYTES (LOW_COLUMNS * LOW_PITCH)
#define LOW_RING_SLOTS 7  // five rows in use, one there for the next step, one on its way
#define LOW_RING_BYTES (LOW_RING_SLOTS * LOW_SLOT_BYTES)
#define SHORTCUT_PITCH ((SHORTCUT * 2 + 95) / 128 * 128 + 32)
#define SHORTCUT_BYTES (SHORTCUT ? 2 * (STRIP / 2) * SHORTCUT_PITCH : 0)

// Where everything is in shared memory; slots and weights need 1024-byte alignment and come first.
struct Layout {
    u32 slots, weights, low, shortcut, branch, full, empty;
};

// w3[n][k], rows [column0, column0 + COLUMNS_OUT), to the operand of `product`; rows up to PADDED are zero. Where h comes
// out of run_branch, pairs of channels inside 16 stand in the order it stores them: pair 4 n + t is channels 4 t + 2 n, + 1.
// `threads` of the block load them, each several pieces at a time: one after the other they took longer than a few steps.
DEVICE void load_weights_out(u32 target, const u16* w3, int column0, bool reordered, int threads) {
    const int at_once = MODE == 0 ? 2 : 8, pieces = PADDED * (WIDE / 8);
#pragma unroll 1
    for (int first = threadIdx.x; first < pieces; first += at_once * threads) {
        uint4 loaded[at_once];
#pragma unroll
        for (int j = 0; j < at_once; ++j) {
            int i = first + j * threads, n = i / (WIDE / 8), piece = i % (WIDE / 8);
            loaded[j] = {0, 0, 0, 0};
            if (i < pieces && n < COLUMNS_OUT) loaded[j] = load_weights((const uint4*)(w3 + (i64)(column0 + n) * WIDE + piece * 8));
        }
#pragma unroll
        for (int j = 0; j < at_once; ++j) {
            int i = first + j * threads, n = i / (WIDE / 8), piece = i % (WIDE / 8);
            if (i >= pieces) break;
            u32 pairs[4] = {loaded[j].x, loaded[j].y, loaded[j].z, loaded[j].w};
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                int inside = (piece & 1) * 4 + p;
                if (reordered) inside = 4 * (inside & 1) + (inside >> 1);
                int chunk = (piece & ~1) + (inside >> 2);
                store_shared4(target + (chunk >> 3) * PADDED * 128 + swizzled(n, chunk & 7) + (inside & 3) * 4, pairs[p]);
            }
        }
    }
}

// What the 128 threads copy for a step: eight threads a pixel of a low row and of the shortcut's row. Low rows have four
// pixels more than the sixteen that makes; the first warp copies those.
struct Source {
    const u16 *low, *shortcut;  // of the batch, first channel of the block
    int left, height, width;
};

DEVICE void copy_pixel(u32 target, const u16* source, int bytes) {
    int piece = (threadIdx.x & 7) * 16;
#pragma unroll
    for (int k = 0; k < bytes; k += 128)
        if (k + piece < bytes) copy16(target + k + piece, (const unsigned char*)source + k + piece);
}

DEVICE void fetch_low(const Source& f, u32 slot, int y) {
    const u16* line = f.low + (i64)clamp(y, 0, f.height - 1) * f.width * CHANNELS;
    int pixel = threadIdx.x >> 3;
    copy_pixel(slot + pixel * LOW_PITCH, line + (i64)clamp(f.left - 2 + pixel, 0, f.width - 1) * CHANNELS, COLUMNS_OUT * 2);
    if (threadIdx.x < 32) copy_pixel(slot + (16 + pixel) * LOW_PITCH, line + (i64)min(f.left + 14 + pixel, f.width - 1) * CHANNELS, COLUMNS_OUT * 2);
}

DEVICE void fetch_shortcut(const Source& f, u32 slot, int y) {
    int pixel = threadIdx.x >> 3;
    i64 at = (i64)min(y, f.height - 1) * f.width + min(f.left + pixel, f.width - 1);
    copy_pixel(slot + pixel * SHORTCUT_PITCH, f.shortcut + at * SHORTCUT, SHORTCUT * 2);
}

// Row of a slot that holds column `x` of row r of the strip.
DEVICE int slot_row(int x, int r) { return (x >> 3) * 16 + r * 8 + (x & 7); }

// A fragments of the two constant matrices. `along`: pixel m % 8 out of the 8 low columns of row m / 8. `phases`: pixel p of
// row r out of phase 2 r + p % 2 of low pixel p / 2; k is 2 p' + j for row 0 and 8 more for row 1, low pixel p', column phase j.
DEVICE void constants(u32 (&along)[4], u32 (&phases)[4], int lane) {
    int pixel = lane >> 2, k = (lane & 3) * 2;
    along[0] = along[3] = pack(weight(pixel + 1, k), weight(pixel + 1, k + 1));
    phases[0] = phases[3] = pack(pixel == k ? 1.f : 0.f, pixel == k + 1 ? 1.f : 0.f);
    along[1] = along[2] = phases[1] = phases[2] = 0;
}

// `out`, `low`: first channel of the block, images of CHANNELS channels; `height`, `width`: low resolution.
DEVICE void run_projection(const Strip& s, u16* out, const u16* low, const u16* shortcut, int column0, int height, int width, const Layout& at) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    i64 image = (i64)s.batch * height * width;
    Source source{low + image * CHANNELS, shortcut + image * SHORTCUT, s.x0 / 2, height, width};
#pragma unroll 1
    for (int k = 0; k < LOW_RING_SLOTS - 1; ++k) fetch_low(source, at.low + k * LOW_SLOT_BYTES, s.first - 2 + k);
    if (SHORTCUT) fetch_shortcut(source, at.shortcut, s.first);
    copy_commit();
    u32 along[4], phases[4];
    constants(along, phases, lane);
    u32 column = at.low + (warp * 4 + (lane & 7)) * LOW_PITCH, step = (lane >> 3) * 16;  // low column of this lane's matrix row
    u32 pixels = at.shortcut + (warp * 4 + (lane & 3)) * SHORTCUT_PITCH;
    const int lanes = COLUMNS_OUT % 32 == 0 ? 4 : 2, at_once = 32 / lanes;  // lanes that write one pixel together, 16 bytes each
    int chunk = lane % lanes, pixel = lane / lanes, x = s.x0 + warp * 8 + (pixel & 7);
    i64 line = (i64)2 * width * CHANNELS;
    u16* target = out + ((i64)s.batch * height + s.first) * 2 * line + (pixel >> 3) * line + (i64)x * CHANNELS + chunk * 8;
    u32 unused = (LOW_RING_SLOTS - 1) * LOW_SLOT_BYTES, oldest = 0;  // offsets of low rows
    u32 slot = 0, parity = 0, odd = 0;
    float sum[PADDED / 2];
    copy_wait<0>();
    named_barrier(1, 128);

#pragma unroll 1
    for (int i = s.first; i < s.last; ++i) {
        u32 h = at.slots + slot * SLOT_BYTES, rows = h + warp * 2048;
        barrier_wait(at.full + slot * 8, parity);
        product_begin();
#pragma unroll
        for (int k = 0; k < WIDE / 16; ++k) {
            u64 a = matrix_descriptor(h) + (k >> 2) * (64 * 128 / 16) + (k & 3) * 2;
            u64 b = matrix_descriptor(at.weights) + (k >> 2) * (PADDED * 128 / 16) + (k & 3) * 2;
            product<PADDED>(sum, a, b, k > 0);
        }
        product_commit();
        // Row 2i lies between low rows i-1 and i, row 2i+1 between i and i+1.
        u32 b[COLUMNS_OUT / 8][2];
        u32 four = column + wrapped(oldest + (lane >> 3) * LOW_SLOT_BYTES, LOW_RING_BYTES);
        u32 fifth = column + wrapped(oldest + 4 * LOW_SLOT_BYTES, LOW_RING_BYTES) + step;
        u32 last[4];
#pragma unroll
        for (int n = 0; n < COLUMNS_OUT / 8; ++n) {
            u32 v[4], unread;
            if (n % 4 == 0) load_matrix_transposed(last, n + 4 <= COLUMNS_OUT / 8 ? fifth + n * 16 : fifth + n * 16 - (step & 32));
            load_matrix_transposed(v, four + n * 16);
            enlarge_down(unread, b[n][0], v[0], v[1], v[2], v[3]);
            enlarge_down(b[n][1], unread, v[1], v[2], v[3], last[n % 4]);
        }
        oldest = wrapped(oldest + LOW_SLOT_BYTES, LOW_RING_BYTES);
        product_wait(sum);
        copy_wait<0>();
        // Copies of the step before are there; all of the slot is read, and what that step read may be overwritten.
        named_barrier(1, 128);
        fetch_low(source, at.low + unused, i + 4);
        unused = wrapped(unused + LOW_SLOT_BYTES, LOW_RING_BYTES);
        if (SHORTCUT) fetch_shortcut(source, at.shortcut + (odd ^ 1) * (SHORTCUT_BYTES / 2), i + 1);
        copy_commit();
#pragma unroll
        for (int n = 0; n < COLUMNS_OUT / 8; ++n) {
            float(&d)[4] = *(float(*)[4])(sum + 4 * n);
            mma(d, along, b[n][0], b[n][1]);
#if SHORTCUT
            const int quarter = SHORTCUT / 4;
            int channel = quarter % 8 == 0 ? (column0 + 8 * n) % quarter + (lane >> 2) : (column0 + 8 * n + (lane >> 2)) % quarter;
            uint2 v = load_shared8(pixels + odd * (SHORTCUT_BYTES / 2) + channel * 8);
            mma(d, phases, v.x, v.y);
#endif
        }
        // The slot's 16 rows of this warp carry the result to whole sectors.
#pragma unroll
        for (int g = 0; g < COLUMNS_OUT / 16; ++g) {
            const float* d = sum + 8 * g;
            u32 row = rows + (g >> 2) * 8192 + swizzled(lane & 15, (g & 3) * 2 + (lane >> 4));
            store_matrix(row, pack(d[0], d[1]), pack(d[2], d[3]), pack(d[4], d[5]), pack(d[6], d[7]));
        }
        __syncwarp();
        uint4 v[COLUMNS_OUT / 16];
#pragma unroll
        for (int k = 0; k < COLUMNS_OUT / 16; ++k) {
            int p = pixel + k * lanes / (COLUMNS_OUT / 8) * at_once, c = chunk + k * lanes % (COLUMNS_OUT / 8);
            v[k] = load_shared16(rows + (c >> 3) * 8192 + swizzled(p, c & 7));
        }
        if (MODE == 2) async_fence();  // the copy engine writes next where these stores went
        __syncwarp();
        if (lane == 0) barrier_arrive(at.empty + slot * 8);
#pragma unroll
        for (int k = 0; k < COLUMNS_OUT / 16; ++k) {
            i64 row = k * lanes / (COLUMNS_OUT / 8) * at_once / 8 * line;
            store_global16_if(x < 2 * width, target + row + k * lanes % (COLUMNS_OUT / 8) * 8, v[k]);
        }
        target += 2 * line;
        odd ^= 1;
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    copy_wait<0>();
}
#endif
