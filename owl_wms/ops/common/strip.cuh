// What the grouped convolutions share: how blocks divide an NHWC image into strips, and how rows of one arrive.
//
// A block walks down a strip STRIP pixels wide and 128 bytes of channels deep. Rows arrive by asynchronous copies, ROWS
// at a time, in a ring of STAGES; BYTES is the size of a channel.
#define STRIP 32
#define THREADS 256
#define COLUMNS (STRIP + 2)
#define ROW_BYTES (COLUMNS * 128)
#define ROWS 4
#define STAGES 3
#define BLOCK_CHANNELS (128 / BYTES)
#if BYTES == 1
typedef unsigned char Element;
#else
typedef u16 Element;
#endif

// Byte of (pixel column, 16-byte chunk) in a row: the exclusive-or keeps eight neighbouring pixels in different banks.
DEVICE u32 place(int column, int chunk) { return column * 128 + ((chunk ^ (column & 7)) << 4); }

struct Tile {
    int batch, x0, y0, y1, channel0;  // outputs [y0, y1) x [x0, x0 + STRIP), channels [channel0, channel0 + BLOCK_CHANNELS)
};

DEVICE Tile tile_of_block(int height, int width, int channels, int rows_per_block) {
    int chunks = (channels + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS, strips = (width + STRIP - 1) / STRIP;
    int bands = (height + rows_per_block - 1) / rows_per_block, index = blockIdx.x;
    Tile t;
    t.channel0 = index % chunks * BLOCK_CHANNELS;
    index /= chunks;
    t.x0 = index % strips * STRIP;
    index /= strips;
    t.y0 = index % bands * rows_per_block;
    t.batch = index / bands;
    t.y1 = min(t.y0 + rows_per_block, height);
    return t;
}

// What one thread copies: sixteen bytes of one pixel in every row, and for the first 64 threads one piece of the two columns
// that 256 threads leave over in ROWS rows. Pointers advance row by row, so the loop has no index arithmetic.
struct Fetch {
    const Element *source, *extra;
    u32 target, extra_target;
    int y, extra_y;
    bool inside, extra_inside;
};

DEVICE void prepare(Fetch& f, const Element* x, const Tile& t, int height, int width, int channels) {
    int chunk = threadIdx.x & 7, column = threadIdx.x >> 3, channel = t.channel0 + chunk * (16 / BYTES);
    int px = t.x0 - 1 + column;
    f.y = t.y0 - 1;
    f.inside = px >= 0 && px < width && channel < channels;
    f.source = x + (((i64)t.batch * height + f.y) * width + px) * channels + channel;
    f.target = place(column, chunk);
    int row = column >> 1;
    column = STRIP + (column & 1), px = t.x0 - 1 + column;
    f.extra_y = f.y + row;
    f.extra_inside = threadIdx.x < ROWS * 16 && px < width && channel < channels;
    f.extra = x + (((i64)t.batch * height + f.extra_y) * width + px) * channels + channel;
    f.extra_target = row * ROW_BYTES + place(column, chunk);
}

// Copies the next ROWS rows to `slot`. Rows past the last one needed are copied too where the image has them: unused.
DEVICE void fetch_rows(Fetch& f, u32 slot, int height, i64 line) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        copy16_or_zero(slot + r * ROW_BYTES + f.target, f.source, f.inside && (unsigned)f.y < (unsigned)height);
        f.source += line, ++f.y;
    }
    if (threadIdx.x < ROWS * 16) {
        copy16_or_zero(slot + f.extra_target, f.extra, f.extra_inside && (unsigned)f.extra_y < (unsigned)height);
        f.extra += ROWS * line, f.extra_y += ROWS;
    }
}
