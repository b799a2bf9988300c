// The two rings of linear8/kernel.cu in shared memory, the tiles they hold, and the warps that fill and empty them.
//
// DEPTH, CHANNELS: k and n, multiples of 16. BLOCKS: 64-channel blocks of a warpgroup; SLICE channels of a block of the grid.
// SHORTCUT: channels of the shortcut, 0 without one. X_SLOTS, OUT_SLOTS: slots of the rings, at least 2.
#if SHORTCUT && (CODES || !ADDS)
#error "the last block of a stage has a shortcut, and no codes"
#endif
#define STEPS ((DEPTH + 31) / 32)
#define SLICE (128 * BLOCKS)
#define COLUMNS (CHANNELS < SLICE ? CHANNELS : SLICE)
#define CONSUMERS 8  // warps that multiply
// A row of a slot, an odd number of 16-byte units: eight rows, or four pairs of rows, lie in different banks.
#define PITCH(bytes) (((bytes) + 127) / 128 * 128 + 16)
#define QUARTER (SHORTCUT / 4)
#define SHORTCUT_COLUMNS (COLUMNS < QUARTER ? COLUMNS : QUARTER)
#define U_PITCH PITCH(2 * COLUMNS)
#define CODE_PITCH PITCH(COLUMNS)
#define SHORTCUT_PITCH ((8 * SHORTCUT_COLUMNS + 127) / 128 * 128 + 32)  // four rows of 16-byte units in different banks
#define X_BYTES ((DEPTH + 127) / 128 * 8192)
#define U_BYTES (ADDS ? 64 * U_PITCH : 0)
#define CODE_BYTES (CODES ? 64 * CODE_PITCH : 0)
#define OUT_BYTES (U_BYTES + CODE_BYTES + (SHORTCUT ? 16 * SHORTCUT_PITCH : 0))
#define TABLE_BYTES (SLICE * 8)

// Where everything is in shared memory. Slots of x come first: they need 1024-byte alignment.
struct Layout {
    u32 x, out, table, full_x, empty_x, full_out, empty_out, done;
};

// What a block does: every `stride`-th tile from `first` on, for channels channel0 to channel0 + SLICE.
struct Work {
    int first, stride, tiles, channel0, pixels, width, tiles_of_image;
};

DEVICE Work work_of_block(int pixels, int width, int tiles_of_image, int tiles) {
    constexpr int SLICES = (CHANNELS + SLICE - 1) / SLICE;
    Work w;
    w.first = blockIdx.x / SLICES, w.stride = gridDim.x / SLICES, w.channel0 = blockIdx.x % SLICES * SLICE;
    w.pixels = pixels, w.width = width, w.tiles_of_image = tiles_of_image, w.tiles = tiles;
    return w;
}

struct Tile {
    int image, start[2], count[2];  // first pixel and number of pixels of each segment
};

DEVICE Tile tile_at(const Work& w, int index) {
    Tile t;
    t.image = (u32)index / (u32)w.tiles_of_image;
    int k = index - t.image * w.tiles_of_image;
    if (SHORTCUT) {
        int across = (w.width + 31) / 32, pair = (u32)k / (u32)across, column = (k - pair * across) * 32;
        t.start[0] = 2 * pair * w.width + column, t.start[1] = t.start[0] + w.width;
        t.count[0] = t.count[1] = min(32, w.width - column);
    } else {
        t.start[0] = 64 * k, t.start[1] = t.start[0] + 32;
        t.count[0] = min(32, w.pixels - t.start[0]), t.count[1] = clamp(w.pixels - t.start[1], 0, 32);
    }
    return t;
}

// Positions in them.
typedef Place<X_SLOTS> XPlace;
typedef Place<OUT_SLOTS> OutPlace;

// How a warp goes through rows of CHUNKS 16-byte chunks: LANES side by side, ROWS at a time.
template <int CHUNKS> struct Walk {
    static constexpr int LANES = CHUNKS >= 32 ? 32 : CHUNKS >= 16 ? 16 : CHUNKS >= 8 ? 8 : CHUNKS >= 4 ? 4 : 2;
    static constexpr int ROWS = 32 / LANES;
};

// Copies the first `rows` of 32 rows of CHUNKS chunks, of which the first `chunks` exist. SWIZZLED: to the operand of wgmma.
template <int CHUNKS, int TARGET_PITCH, int SOURCE_PITCH, bool SWIZZLED, bool ALL>
DEVICE void copy_some_rows(u32 target, const unsigned char* source, int rows, int chunks, int lane) {
    constexpr int LANES = Walk<CHUNKS>::LANES, ROWS = Walk<CHUNKS>::ROWS, PASSES = 32 / ROWS, GROUP = PASSES < 8 ? PASSES : 8;
    int row = lane / LANES;
#pragma unroll 1
    for (int c = lane % LANES; c < chunks; c += LANES) {
        const unsigned char* from = source + row * SOURCE_PITCH + c * 16;
        u32 to = target + row * TARGET_PITCH + (SWIZZLED ? (c >> 3) * 8192 : c * 16);
#pragma unroll 1
        for (int r = row; r < (ALL ? 32 : rows); r += GROUP * ROWS) {
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                u32 place = to + i * ROWS * TARGET_PITCH + (SWIZZLED ? ((c ^ (row + i * ROWS)) & 7) << 4 : 0);
                if (ALL) copy16(place, from + i * ROWS * SOURCE_PITCH);
                else copy16_if(r + i * ROWS < rows, place, from + i * ROWS * SOURCE_PITCH);
            }
            to += GROUP * ROWS * TARGET_PITCH, from += GROUP * ROWS * SOURCE_PITCH;
        }
    }
}
template <int CHUNKS, int TARGET_PITCH, int SOURCE_PITCH, bool SWIZZLED>
DEVICE void copy_rows(u32 target, const void* source, int rows, int chunks, int lane) {
    const unsigned char* from = (const unsigned char*)source;
    if (rows == 32) copy_some_rows<CHUNKS, TARGET_PITCH, SOURCE_PITCH, SWIZZLED, true>(target, from, rows, chunks, lane);
    else copy_some_rows<CHUNKS, TARGET_PITCH, SOURCE_PITCH, SWIZZLED, false>(target, from, rows, chunks, lane);
}

// Writes rows of a slot out to global memory.
template <int CHUNKS, int SOURCE_PITCH>
DEVICE void store_rows(void* target, u32 source, int target_pitch, int rows, int chunks, int lane) {
    constexpr int LANES = Walk<CHUNKS>::LANES, ROWS = Walk<CHUNKS>::ROWS, PASSES = 32 / ROWS, BATCH = PASSES < 4 ? PASSES : 4;
    int row = lane / LANES, chunk = lane % LANES;
    unsigned char* to = (unsigned char*)target + (i64)row * target_pitch + chunk * 16;
#pragma unroll 1
    for (int c = chunk; c < chunks; c += LANES) {
        unsigned char* piece = to;
        u32 from = source + row * SOURCE_PITCH + c * 16;
#pragma unroll 1
        for (int r = row; r < rows; r += BATCH * ROWS) {
            uint4 v[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) v[i] = load_shared16(from + i * ROWS * SOURCE_PITCH);
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                store_global16_if(r + i * ROWS < rows, piece, v[i]);
                piece += ROWS * target_pitch;
            }
            from += BATCH * ROWS * SOURCE_PITCH;
        }
        to += LANES * 16;
    }
}

// Segments first_segment to last_segment - 1 of every tile.
DEVICE void load_x(const Work& w, const Layout& at, const unsigned char* x, int first_segment, int last_segment, int lane) {
    XPlace p{0, 1};
    for (int index = w.first; index < w.tiles; index += w.stride) {
        Tile t = tile_at(w, index);
        barrier_wait(at.empty_x + p.slot * 8, p.parity);
#pragma unroll 1
        for (int s = first_segment; s < last_segment; ++s) {
            const unsigned char* source = x + ((i64)t.image * w.pixels + (s ? t.start[1] : t.start[0])) * DEPTH;
            copy_rows<DEPTH / 16, 128, DEPTH, true>(at.x + p.slot * X_BYTES + s * 4096, source, s ? t.count[1] : t.count[0], DEPTH / 16, lane);
        }
        barrier_arrive_after_copies(at.full_x + p.slot * 8);
        p.next();
    }
}

DEVICE void load_residual(const Work& w, const Layout& at, const u16* u, const u16* shortcut, int lane) {
    OutPlace p{0, 1};
    int chunks = min(COLUMNS, CHANNELS - w.channel0) / 8;
    for (int index = w.first; index < w.tiles; index += w.stride) {
        Tile t = tile_at(w, index);
        u32 slot = at.out + p.slot * OUT_BYTES;
        barrier_wait(at.empty_out + p.slot * 8, p.parity);
#pragma unroll 1
        for (int s = 0; s < 2; ++s) {
            const u16* source = u + ((i64)t.image * w.pixels + (s ? t.start[1] : t.start[0])) * CHANNELS + w.channel0;
            copy_rows<COLUMNS / 8, U_PITCH, 2 * CHANNELS, false>(slot + s * 32 * U_PITCH, source, s ? t.count[1] : t.count[0], chunks, lane);
        }
#if SHORTCUT
        // Row 2 y, column x of this image is pixel (y, x / 2) of the shortcut.
        int pair = (u32)t.start[0] / (u32)(2 * w.width), column = t.start[0] - pair * 2 * w.width;
        i64 low = (i64)t.image * (w.pixels / 4) + pair * (w.width / 2) + column / 2;
        const u16* source = shortcut + low * SHORTCUT + w.channel0 % QUARTER * 4;
        copy_rows<SHORTCUT_COLUMNS / 2, SHORTCUT_PITCH, 2 * SHORTCUT, false>(slot + U_BYTES + CODE_BYTES, source, t.count[0] / 2,
                                                                            SHORTCUT_COLUMNS / 2, lane);
#endif
        barrier_arrive_after_copies(at.full_out + p.slot * 8);
        p.next();
    }
}

// Segment s of every tile.
DEVICE void store_results(const Work& w, const Layout& at, u16* u, unsigned char* codes, int s, int lane) {
    OutPlace p{0, 0};
    int columns = min(COLUMNS, CHANNELS - w.channel0);
    for (int index = w.first; index < w.tiles; index += w.stride) {
        Tile t = tile_at(w, index);
        int start = s ? t.start[1] : t.start[0], count = s ? t.count[1] : t.count[0];
        i64 place = ((i64)t.image * w.pixels + start) * CHANNELS + w.channel0;
        u32 slot = at.out + p.slot * OUT_BYTES;
        barrier_wait(at.done + p.slot * 8, p.parity);
        if (ADDS) store_rows<COLUMNS / 8, U_PITCH>(u + place, slot + s * 32 * U_PITCH, 2 * CHANNELS, count, columns / 8, lane);
        if (CODES)
            store_rows<COLUMNS / 16, CODE_PITCH>(codes + place, slot + U_BYTES + s * 32 * CODE_PITCH, CHANNELS, count, columns / 16, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(at.empty_out + p.slot * 8);
        p.next();
    }
}
