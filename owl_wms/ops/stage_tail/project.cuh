// The four warps that finish a stage: out = h w3^T + up2(low) + shuffle(shortcut), 64 pixels (two rows of a strip) a step.
//
// h arrives in a ring of shared-memory slots, w3 stays in shared memory, and the product is one wgmma a 16 channels of h.
// While it runs, the warps take `low` down its columns in fp32; the other two terms are then added to the same accumulators
// as products with constant matrices: along the row with the bicubic weights, and for the shortcut with ones that put a low
// pixel's four phases where they belong. Both are exact: weights and inputs are 16-bit values, sums are fp32.
//
// CHANNELS (multiple of 16): width of the stage. WIDE: channels of h. COLUMNS_OUT: channels one block makes; PADDED: the same
// rounded up to what `product` takes. SHORTCUT: channels of the shortcut, 0 without one.
#define BLOCKS_OF_64 ((WIDE + 63) / 64)
#define SLOT_BYTES (BLOCKS_OF_64 * 64 * 128)
#define WEIGHT_BYTES (BLOCKS_OF_64 * PADDED * 128)
// Pixels lie an odd number of 16-byte units apart: eight of them in different banks.
#define LOW_PITCH (COLUMNS_OUT * 2 + 16)
#define LOW_SLOT_BYTES (LOW_COLUMNS * LOW_PITCH)
#define LOW_RING_SLOTS 7  // five rows in use, one there for the next step, one on its way
#define LOW_RING_BYTES (LOW_RING_SLOTS * LOW_SLOT_BYTES)
#define SHORTCUT_PITCH (SHORTCUT * 2 + 16)
#define SHORTCUT_BYTES (SHORTCUT ? 2 * (STRIP / 2) * SHORTCUT_PITCH : 0)

// Where everything is in shared memory; slots and weights need 1024-byte alignment and come first.
struct Layout {
    u32 slots, weights, low, shortcut, branch, full, empty;
};

// w3[n][k], rows [column0, column0 + COLUMNS_OUT), to the operand of `product`; rows up to PADDED are zero. Where h comes
// out of run_branch, pairs of channels inside 16 stand in the order it stores them: pair 4 n + t is channels 4 t + 2 n, + 1.
DEVICE void load_weights_out(u32 target, const u16* w3, int column0, bool reordered) {
#pragma unroll 1
    for (int i = threadIdx.x; i < PADDED * (WIDE / 2); i += blockDim.x) {
        int n = i / (WIDE / 2), pair = i % (WIDE / 2), inside = pair & 7;
        u32 value = n < COLUMNS_OUT ? *(const u32*)(w3 + (i64)(column0 + n) * WIDE + pair * 2) : 0;
        if (reordered) inside = 4 * (inside & 1) + (inside >> 1);
        int chunk = (pair >> 3) * 2 + (inside >> 2);
        store_shared4(target + (chunk >> 3) * PADDED * 128 + swizzled(n, chunk & 7) + (inside & 3) * 4, value);
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

// A fragment that takes the shortcut's B fragment to pixels: row m is low pixel m / 2, k < 8 its left phase, k >= 8 its right.
DEVICE void spread(u32 (&matrix)[4], int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int pixel = (lane >> 2) + (i & 1) * 8, k = (lane & 3) * 2;
        bool side = (pixel & 1) == i >> 1;
        matrix[i] = pack(side && pixel >> 1 == k ? 1.f : 0.f, side && pixel >> 1 == k + 1 ? 1.f : 0.f);
    }
}

// `out`, `low`: first channel of the block, images of CHANNELS channels; `height`, `width`: low resolution.
DEVICE void run_projection(const Strip& s, u16* out, const u16* low, const u16* shortcut, int column0, int height, int width, const Layout& at) {
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, r = warp >> 1, j = warp & 1;  // row and tile of this warp
    i64 image = (i64)s.batch * height * width;
    Source source{low + image * CHANNELS, shortcut + image * SHORTCUT, s.x0 / 2, height, width};
#pragma unroll 1
    for (int k = 0; k < LOW_RING_SLOTS - 1; ++k) fetch_low(source, at.low + k * LOW_SLOT_BYTES, s.first - 2 + k);
    if (SHORTCUT) fetch_shortcut(source, at.shortcut, s.first);
    copy_commit();
    u32 along[4], phases[4];
    enlargement(along, 1, lane);
    spread(phases, lane);
    // Down the columns: row 2i reads low rows i-2..i+1 with the mirrored weights, row 2i+1 rows i-1..i+2.
    float w0 = (r ? -27.f : -9.f) / 256, w1 = (r ? 225.f : 67.f) / 256, w2 = (r ? 67.f : 225.f) / 256, w3 = (r ? -9.f : -27.f) / 256;
    // Columns past the last one meet zero weights only; they need be no more than numbers.
    u32 fragment = at.low + min(j * 8 + (lane & 15), LOW_COLUMNS - 1) * LOW_PITCH + (lane >> 4) * 16;
    u32 phase = (j * 8 + (lane & 3) * 2) * SHORTCUT_PITCH + r * 4;
    const int lanes = COLUMNS_OUT % 32 == 0 ? 4 : 2;  // lanes that write one pixel together, 16 bytes each
    int pixel = lane / lanes, x = s.x0 + j * 16 + pixel;
    u16* target = out + (((i64)s.batch * height + s.first) * 2 + r) * 2 * width * CHANNELS + (i64)x * CHANNELS + lane % lanes * 8;
    u32 unused = (LOW_RING_SLOTS - 1) * LOW_SLOT_BYTES, oldest = r * LOW_SLOT_BYTES;  // oldest: first of the four rows read
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
        u32 at_row[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) at_row[k] = wrapped(oldest + k * LOW_SLOT_BYTES, LOW_RING_BYTES);
        oldest = at_row[1];
        // In two halves, for the registers' sake: the first beside the product.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int groups = COLUMNS_OUT / 16, begin = half * ((groups + 1) / 2), stop = half ? groups : (groups + 1) / 2;
            u32 b[(groups + 1) / 2][4];
#pragma unroll
            for (int g = begin; g < stop; ++g) {
                u32 v[4][4];
#pragma unroll
                for (int k = 0; k < 4; ++k) load_matrix_transposed(v[k], at_row[k] + g * 32 + fragment);
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    b[g - begin][k] = pack(
                        fmaf(w0, low_float(v[0][k]), fmaf(w1, low_float(v[1][k]), fmaf(w2, low_float(v[2][k]), w3 * low_float(v[3][k])))),
                        fmaf(w0, high_float(v[0][k]), fmaf(w1, high_float(v[1][k]), fmaf(w2, high_float(v[2][k]), w3 * high_float(v[3][k])))));
            }
            if (half == 0) {
                product_wait(sum);
                copy_wait<0>();
                // Copies of the step before are there; all of the slot is read, and what that step read may be overwritten.
                named_barrier(1, 128);
                fetch_low(source, at.low + unused, i + 4);
                unused = wrapped(unused + LOW_SLOT_BYTES, LOW_RING_BYTES);
                if (SHORTCUT) fetch_shortcut(source, at.shortcut + (odd ^ 1) * (SHORTCUT_BYTES / 2), i + 1);
                copy_commit();
            }
#pragma unroll
            for (int n = begin * 2; n < stop * 2; ++n) {
                float(&d)[4] = *(float(*)[4])(sum + 4 * n);
                mma(d, along, b[(n >> 1) - begin][n & 1 ? 2 : 0], b[(n >> 1) - begin][n & 1 ? 3 : 1]);
#if SHORTCUT
                const int quarter = SHORTCUT / 4;
                int channel = quarter % 8 == 0 ? (column0 + 8 * n) % quarter + (lane >> 2) : (column0 + 8 * n + (lane >> 2)) % quarter;
                u32 from = at.shortcut + odd * (SHORTCUT_BYTES / 2) + phase + channel * 8;
                u32 first = load_shared4(from), second = load_shared4(from + SHORTCUT_PITCH);
                mma(d, phases, __byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632));
#endif
            }
            // The slot's 16 rows of this warp carry the result to whole sectors.
#pragma unroll
            for (int g = begin; g < stop; ++g) {
                const float* d = sum + 8 * g;
                u32 row = rows + (g >> 2) * 8192 + swizzled(lane & 15, (g & 3) * 2 + (lane >> 4));
                store_matrix(row, pack(d[0], d[1]), pack(d[2], d[3]), pack(d[4], d[5]), pack(d[6], d[7]));
            }
        }
        __syncwarp();
        uint4 v[COLUMNS_OUT / 16];
#pragma unroll
        for (int k = 0; k < COLUMNS_OUT / 16; ++k) {
            // The warp takes 32 / lanes pixels at a time, `lanes` chunks of each.
            int further = k * lanes / (COLUMNS_OUT / 8) * (32 / lanes), chunk = lane % lanes + k * lanes % (COLUMNS_OUT / 8);
            v[k] = load_shared16(rows + (chunk >> 3) * 8192 + swizzled(pixel + further, chunk & 7));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(at.empty + slot * 8);
#pragma unroll
        for (int k = 0; k < COLUMNS_OUT / 16; ++k) {
            int further = k * lanes / (COLUMNS_OUT / 8) * (32 / lanes);
            store_global16_if(x + further < 2 * width, target + further * CHANNELS + k * lanes % (COLUMNS_OUT / 8) * 8, v[k]);
        }
        target += (i64)4 * width * CHANNELS;
        odd ^= 1;
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    copy_wait<0>();
}
