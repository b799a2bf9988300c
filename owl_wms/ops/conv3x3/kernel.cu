// Dense 3x3 convolution, NHWC, padding 1: out = relu(conv(x) + bias) + residual, each of the three optional, or SiLU in the
// place of ReLU. With NORM the sums pass an RMS norm over the channels first, which a tile then has to hold all of.
//
// A tile is 16 x 16 pixels by 128 channels; two warpgroups multiply, 8 x 16 pixels each, as two products of 8 x 8 pixels by
// 128 channels whose sums stay in registers. Of 64 input channels at a time the 18 x 18 pixels around the tile are copied to
// shared memory once, and the nine taps read them there: an operand of wgmma is eight groups of eight rows any distance
// apart, here eight pixels of eight image rows, and may start at any row of the swizzled box, since the swizzle goes by
// address. So a tap asks the L2 for 21 KB, 16 of them weights, where a product of the same size that fetches both operands
// for every tap asks for 48. Hopper's clock follows its power, and what is not fetched is power.
//
// One thread of a third warpgroup fetches everything, in the order in which it is wanted: pixels of the next 64 channels and
// the residual piece by piece between the taps' weights. Two more threads store results, one for each half. Blocks walk over
// tiles; the rings fill for the next tile while results of this one are finished.
//
// Tiles may reach over the lower and right borders: the copies bring zeros from there, and stores leave it out.
//
// What a variant is made of (each is 0 where a variant does not say):
// BIAS, RESIDUAL   what follows the sums.
// RELU             1: before the residual is added, 2: after it. SILU: in the place of 1.
// NORM             before them, with EPS.
// COLUMNS          channels of a tile: 64 or 128; 32 with FRAMES.
// PAST             x has `frames` consecutive frames of each stream. The first half of the input channels is the frame, the
//                  second the frame before it, which for the first frame of a stream lies in the tensor `past`.
// ENLARGE          the convolution behind a nearest enlargement by two: each of the four phases of an output pixel sees
//                  2 x 2 input pixels. Columns are [phase][frame][channel]; `frames` images come of one.
// HOLD             all weights stay in shared memory: one column tile, one chunk.
// FRAMES           the last convolution: clamp to [0, 1] and pixel shuffle by PATCH. 1: 16-bit planes, 2: bytes, RGB.
// SHUFFLE          a pixel shuffle by two behind it, with RESIDUAL: out and residual are enlarged images of `channels`. Columns
//                  are [row parity][column parity][channel], so 64 of them are 64 values side by side in a row of the image.
//                  weight and bias stay in the shuffle's order, [channel][row parity][column parity].
// FP16             element type.
#ifndef COLUMNS
#define COLUMNS 128
#endif
#ifndef PAST
#define PAST 0
#endif
#ifndef ENLARGE
#define ENLARGE 0
#endif
#ifndef HOLD
#define HOLD 0
#endif
#ifndef FRAMES
#define FRAMES 0
#endif
#ifndef PATCH
#define PATCH 1
#endif
#ifndef SHUFFLE
#define SHUFFLE 0
#endif
#define TAPS (ENLARGE ? 4 : 9)
#define DEPTH 64     // input channels at a time: 128 bytes, a row of the operand
#define X_PITCH (18 * 128)
#define X_BYTES (18 * X_PITCH)
#define X_PIECES 3  // of six rows of pixels
#define W_BYTES (COLUMNS * 128)
#define PARTS (COLUMNS / 64)
#define PART_BYTES (128 * 128)  // 8 x 16 pixels, 64 channels
#define OUT_BYTES (PARTS * PART_BYTES)
#define X_SLOTS 2
#define W_SLOTS (HOLD ? TAPS : 4)
#define WARPS 8  // that multiply

struct Layout {
    u32 x, w, out, full_x, empty_x, full_w, empty_w, room, ready, done;
};

struct Work {
    int down, across, column_tiles, tiles, chunks, first, stride, frames, channels, height, width;
};
struct Tile {
    int image, y, x, n;
};

// Channel tiles of the same pixels run together.
DEVICE Tile tile_at(const Work& w, int index) {
    Tile t;
    int pixels = (u32)index / (u32)w.column_tiles;
    t.n = (index - pixels * w.column_tiles) * COLUMNS;
    int row = (u32)pixels / (u32)w.across;
    t.x = (pixels - row * w.across) * 16;
    t.image = (u32)row / (u32)w.down;
    t.y = (row - t.image * w.down) * 16;
    return t;
}

// The pixels of the next 64 channels wait for their slot, which is free once the first tap of these 64 has been multiplied.
// So they are asked for late among the taps: the weights behind them in the queue would otherwise wait as well.
#if !ENLARGE && !HOLD && 9 - X_PIECES < W_SLOTS + 1
#error "weights would wait for pixels"
#endif

struct Maps {
    const TensorMap &x, &past, &weight, &out, &residual;
};

// Pixels, 64 channels after 64; runs ahead of the weights.
struct Pixels {
    Place<X_SLOTS> p;
    Tile t;
    int index, chunk;

    DEVICE Pixels(const Work& w) : p{0, 1}, t(tile_at(w, w.first)), index(w.first), chunk(0) {}
    DEVICE void load_piece(const Work& w, const Layout& at, const Maps& maps, int i) {
        if (index >= w.tiles) return;
        u32 full = at.full_x + p.slot * 8;
        if (i == 0) {
            barrier_wait(at.empty_x + p.slot * 8, p.parity);
            barrier_expect(full, X_BYTES);
        }
        int image = t.image, channel = chunk * DEPTH;
        bool before = false;  // the video's frame before the first one of x
        if (PAST && 2 * chunk >= w.chunks) {
            channel -= w.chunks / 2 * DEPTH;
            before = image % w.frames == 0;
            image = before ? image / w.frames : image - 1;
        }
        u32 target = at.x + p.slot * X_BYTES + 6 * i * X_PITCH;
        copy_box(target, before ? maps.past : maps.x, full, channel, t.x - 1, t.y - 1 + 6 * i, image);
        if (i < X_PIECES - 1) return;
        p.next();
        if (++chunk == w.chunks) {
            chunk = 0, index += w.stride;
            if (index < w.tiles) t = tile_at(w, index);
        }
    }
};

// Piece i of a tile's residual: 64 channels of one half, into the place of its results.
DEVICE void load_residual(const Work& w, const Layout& at, const TensorMap& map, const Tile& t, int i, u32 parity) {
    int g = i & 1, part = i >> 1;
    if (part == 0) {
        barrier_wait(at.room + g * 8, parity);
        barrier_expect(at.ready + g * 8, OUT_BYTES);
    }
    u32 target = at.out + g * OUT_BYTES + part * PART_BYTES, ready = at.ready + g * 8;
    int n = t.n + part * 64;
#if SHUFFLE  // the map's dimensions: image, row, its parity, column, and the channels of two neighbours
    int row = n / (2 * w.channels);
    copy_box(target, map, ready, n - row * 2 * w.channels, t.x, row, t.y + 8 * g, t.image);
#else
    copy_box(target, map, ready, n, t.x, t.y + 8 * g, t.image);
#endif
}

// The weights of a tile's columns for 64 input channels of a tap. Under SHUFFLE, columns of one phase are four rows of the
// weights apart, the map's dimensions are channel, phase and the rest, and a phase may end after any 32 columns.
DEVICE void copy_weights(const Work& w, u32 target, const TensorMap& map, u32 full, int depth, const Tile& t) {
#if SHUFFLE
    int phase = t.n / w.channels, channel = t.n - phase * w.channels;
#pragma unroll
    for (int i = 0; i < COLUMNS / 32; ++i) {
        copy_box(target + i * 32 * 128, map, full, depth, phase, channel);
        channel += 32;
        if (channel == w.channels) channel = 0, ++phase;
    }
#else
    copy_box(target, map, full, depth, t.n);
#endif
}

DEVICE void load(const Work& w, const Layout& at, const Maps& maps) {
    Place<W_SLOTS> p{0, 1};
    Pixels pixels(w);
    for (int i = 0; i < X_PIECES; ++i) pixels.load_piece(w, at, maps, i);
    // The place of results is free some taps into the next tile; by the last taps the residual should be there.
    int begin = w.chunks > 1 ? 9 : 1, step = w.chunks > 2 ? 3 : 1;
    u32 parity = 0;
    for (int index = w.first; index < w.tiles; index += w.stride, parity ^= 1) {
        Tile t = tile_at(w, index);
        int count = 0, next = begin, piece = 0;
        for (int chunk = 0; chunk < w.chunks; ++chunk)
#pragma unroll 1
            for (int tap = 0; tap < TAPS; ++tap, ++count) {
                if (!HOLD || index == w.first) {
                    u32 full = at.full_w + p.slot * 8;
                    barrier_wait(at.empty_w + p.slot * 8, p.parity);
                    barrier_expect(full, W_BYTES);
                    copy_weights(w, at.w + p.slot * W_BYTES, maps.weight, full, (tap * w.chunks + chunk) * DEPTH, t);
                    p.next();
                }
                if (ENLARGE && tap == TAPS - 1)
                    for (int i = 0; i < X_PIECES; ++i) pixels.load_piece(w, at, maps, i);
                if (!ENLARGE && tap >= 9 - X_PIECES) pixels.load_piece(w, at, maps, tap - (9 - X_PIECES));
                if (RESIDUAL && count == next && piece < 2 * PARTS) {
                    load_residual(w, at, maps.residual, t, piece, parity);
                    ++piece, next += step;
                }
            }
    }
}

// Half g of every tile, once its results are there.
DEVICE void store_results(const Work& w, const Layout& at, const TensorMap& map, int g) {
    u32 place = at.out + g * OUT_BYTES, room = (RESIDUAL ? at.room : at.ready) + g * 8, parity = 0;
    barrier_arrive(room);
    for (int index = w.first; index < w.tiles; index += w.stride, parity ^= 1) {
        Tile t = tile_at(w, index);
        barrier_wait(at.done + g * 8, parity);
#pragma unroll 1
        for (int i = 0; i < PARTS; ++i) {
            int n = t.n + i * 64;
#if ENLARGE  // the map's dimensions: image, row, its parity, column, and the channels of two neighbours
            int phase = n / (w.frames * w.channels), rest = n % (w.frames * w.channels);
            int frame = rest / w.channels, channel = rest % w.channels;
            store_box(map, place + i * PART_BYTES, (phase & 1) * w.channels + channel, t.x, phase >> 1, t.y + 8 * g, t.image * w.frames + frame);
#elif SHUFFLE
            int row = n / (2 * w.channels);
            store_box(map, place + i * PART_BYTES, n - row * 2 * w.channels, t.x, row, t.y + 8 * g, t.image);
#else
            store_box(map, place + i * PART_BYTES, n, t.x, t.y + 8 * g, t.image);
#endif
            store_commit();
            stores_have_read();  // one after the other: weights pass between
        }
        barrier_arrive(room);
    }
    stores_wait();
}

DEVICE float relu(float x) {  // NaN stays NaN, as in PyTorch: whoever looks for it must find it
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float after(float sum, float bias) {
    float y = BIAS ? sum + bias : sum;
#ifdef SILU
    return silu(y);
#else
    return RELU == 1 ? relu(y) : y;
#endif
}

// d / sqrt(mean over channels of d^2 + EPS) * gain. A pixel's channels lie in the four lanes of a quad, as products leave them:
// d[4 n] and d[4 n + 1] belong to one pixel, the next two to another.
#ifdef NORM
DEVICE void normalize(float (&d)[COLUMNS / 2], const float* gain, int lane) {
    float scale[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) scale[i >> 1 & 1] = fmaf(d[i], d[i], scale[i >> 1 & 1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        scale[h] += __shfl_xor_sync(0xffffffffu, scale[h], 1);
        scale[h] += __shfl_xor_sync(0xffffffffu, scale[h], 2);
        scale[h] = rsqrtf(scale[h] / COLUMNS + EPS);
    }
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) {
        float2 g = __ldg((const float2*)(gain + 8 * n) + (lane & 3));
        d[4 * n] *= scale[0] * g.x, d[4 * n + 1] *= scale[0] * g.y;
        d[4 * n + 2] *= scale[1] * g.x, d[4 * n + 3] *= scale[1] * g.y;
    }
}
#define GAIN , const float* gain
#define PASS_GAIN , gain
#else
#define GAIN
#define PASS_GAIN
#endif

// What is added to columns 8 n + 2 lane and the next one of a tile, lane 0 to 3. `bias` is that of the tile's first column;
// under SHUFFLE it is the whole one, `column` the tile's first, and the two columns are of one phase.
DEVICE float2 bias_of(const float* bias, const Work& w, int column, int n, int lane) {
#if SHUFFLE
    column += 8 * n + 2 * lane;
    int phase = column / w.channels;
    bias += 4 * (column - phase * w.channels) + phase;
    return float2{__ldg(bias), __ldg(bias + 4)};
#else
    return __ldg((const float2*)(bias + 8 * n) + lane);
#endif
}

// Sums of 8 x 8 pixels, the left or the right of a half, to results. Warp w has rows 2 w and 2 w + 1 of the pixels; lane
// 8 m + r gives the address of pixel r of block m: the two rows' pixels for eight channels, then for the next eight.
DEVICE void finish(const float (&d)[COLUMNS / 2], const float* bias, const Work& w, int column, u32 place, int right, int warp, int lane) {
    int row = (2 * warp + (lane >> 3 & 1)) * 16 + 8 * right + (lane & 7);
#pragma unroll
    for (int i = 0; i < PARTS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            u32 address = place + i * PART_BYTES + swizzled(row, 2 * j + (lane >> 4));
            u32 word[4], old[4];
            if (RESIDUAL) load_matrix(old, address);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int n = 8 * i + 2 * j + k;
                float2 b = {0, 0};
                if (BIAS) b = bias_of(bias, w, column, n, lane & 3);
                float v[4] = {after(d[4 * n], b.x), after(d[4 * n + 1], b.y), after(d[4 * n + 2], b.x), after(d[4 * n + 3], b.y)};
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (RESIDUAL) v[2 * h] += low_float(old[2 * k + h]), v[2 * h + 1] += high_float(old[2 * k + h]);
                    if (RELU == 2) v[2 * h] = relu(v[2 * h]), v[2 * h + 1] = relu(v[2 * h + 1]);
                    word[2 * k + h] = pack(v[2 * h], v[2 * h + 1]);
                }
            }
            store_matrix(address, word[0], word[1], word[2], word[3]);
        }
}

#if FRAMES
DEVICE float unit(float x) {  // in [0, 1]; NaN stays
    x = x < 0.f ? 0.f : x;
    return x > 1.f ? 1.f : x;
}
// Sums of 8 x 8 pixels to frames [image, 3, PATCH height, PATCH width], or bytes [image, PATCH height, PATCH width, 3].
// Column c PATCH^2 + dy PATCH + dx is colour c of the pixel (dy, dx). A lane has two columns of pixels of two rows.
DEVICE void write_frames(const float (&d)[COLUMNS / 2], const float* bias, void* frames, const Work& w, const Tile& t, int y, int x, int lane) {
    const int area = PATCH * PATCH;
    x += lane >> 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (x >= w.width || y + h >= w.height) continue;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) {
            int column = 8 * n + 2 * (lane & 3);
            float v[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) v[k] = unit(d[4 * n + 2 * h + k] + __ldg(bias + column + k));
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                if (column + k >= 3 * area) continue;
                int colour = (column + k) / area, dy = (column + k) % area / PATCH, dx = (column + k) % PATCH;
                i64 row = PATCH * (y + h) + dy, place = PATCH * x + dx;
                if (FRAMES == 1) {
                    i64 at = (((i64)t.image * 3 + colour) * PATCH * w.height + row) * PATCH * w.width + place;
                    if (PATCH % 2) ((u16*)frames)[at] = (u16)pack(v[k], 0.f);
                    else if (k == 0) *(u32*)((u16*)frames + at) = pack(v[0], v[1]);
                } else {
                    u32 byte;
                    asm("cvt.rni.u32.f32 %0, %1;" : "=r"(byte) : "f"(v[k] * 255.f));
                    ((unsigned char*)frames)[(((i64)t.image * PATCH * w.height + row) * PATCH * w.width + place) * 3 + colour] = (unsigned char)byte;
                }
            }
        }
    }
}
#endif

// `matrix_descriptor` with groups of eight rows one row of pixels apart.
DEVICE u64 pixel_descriptor(u32 address) { return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(X_PITCH / 16) << 32 | (u64)1 << 62; }

DEVICE void multiply(const Work& w, const Layout& at, const float* bias, void* pictures, int g, int warp, int lane GAIN) {
    Place<X_SLOTS> x{0, 0};
    Place<W_SLOTS> p{0, 0};
    float left[COLUMNS / 2], right[COLUMNS / 2];
    u32 parity = 0;
    for (int index = w.first; index < w.tiles; index += w.stride) {
        int before = -1;  // slot of weights whose products are not known to be over
        int corner = 0;   // byte of the first pixel that the first tap reads, from the first of the box
        if (ENLARGE) {
            int phase = tile_at(w, index).n / (w.frames * w.channels);
            corner = (phase >> 1) * X_PITCH + (phase & 1) * 128;
        }
#pragma unroll 1
        for (int c = 0; c < w.chunks; ++c) {
            barrier_wait(at.full_x + x.slot * 8, x.parity);
            u32 pixels = at.x + x.slot * X_BYTES + g * 8 * X_PITCH + corner;
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
                const int side = ENLARGE ? 2 : 3;
                u64 a = pixel_descriptor(pixels + tap / side * X_PITCH + tap % side * 128), b = matrix_descriptor(at.w + p.slot * W_BYTES);
                barrier_wait(at.full_w + p.slot * 8, HOLD ? 0 : p.parity);
                product_begin();
#pragma unroll
                for (int k = 0; k < DEPTH / 16; ++k) {
                    bool add = c > 0 || tap > 0 || k > 0;
                    product<COLUMNS>(left, a + 2 * k, b + 2 * k, add);
                    product<COLUMNS>(right, a + 8 * 128 / 16 + 2 * k, b + 2 * k, add);
                }
                product_commit();
                products_left<1>();
                if (!HOLD && before >= 0 && lane == 0) barrier_arrive(at.empty_w + before * 8);
                if (tap == 0 && c > 0 && lane == 0) barrier_arrive(at.empty_x + (x.slot ^ 1) * 8);
                before = p.slot;
                p.next();
            }
            x.next();
        }
        product_wait(left), product_wait(right);
        if (lane == 0) {
            if (!HOLD) barrier_arrive(at.empty_w + before * 8);
            barrier_arrive(at.empty_x + (x.slot ^ 1) * 8);
        }
#if FRAMES
        Tile t = tile_at(w, index);
        write_frames(left, bias, pictures, w, t, t.y + 8 * g + 2 * warp, t.x, lane);
        write_frames(right, bias, pictures, w, t, t.y + 8 * g + 2 * warp, t.x + 8, lane);
#else
        barrier_wait(at.ready + g * 8, parity);
        int column = tile_at(w, index).n;
        const float* first = SHUFFLE ? bias : bias + column;
#ifdef NORM
        normalize(left, gain, lane), normalize(right, gain, lane);
#endif
        finish(left, first, w, column, at.out + g * OUT_BYTES, 0, warp, lane);
        finish(right, first, w, column, at.out + g * OUT_BYTES, 1, warp, lane);
        async_fence();
        __syncwarp();
        if (lane == 0) barrier_arrive(at.done + g * 8);
        parity ^= 1;
#endif
    }
}

#if PAST || ENLARGE || FRAMES
#define MORE , const __grid_constant__ TensorMap past, void* pictures, int frames, int channels, int height, int width
#elif SHUFFLE
#define MORE , int channels
#else
#define MORE
#endif

extern "C" __global__ void __launch_bounds__(384, 1)
conv3x3(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap out,
        const __grid_constant__ TensorMap residual, const float* bias, int down, int across, int column_tiles, int tiles, int chunks GAIN MORE) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Layout at;
    at.x = shared_address(memory);
    at.w = at.x + X_SLOTS * X_BYTES, at.out = at.w + W_SLOTS * W_BYTES;
    at.full_x = at.out + (FRAMES ? 0 : 2 * OUT_BYTES), at.empty_x = at.full_x + X_SLOTS * 8;
    at.full_w = at.empty_x + X_SLOTS * 8, at.empty_w = at.full_w + W_SLOTS * 8;
    at.room = at.empty_w + W_SLOTS * 8, at.ready = at.room + 2 * 8, at.done = at.ready + 2 * 8;
    if (at.x & 1023) trap();  // the swizzle goes by address bits
    Work w = {down, across, column_tiles, tiles, chunks, (int)blockIdx.x, (int)gridDim.x};
#if PAST || ENLARGE || FRAMES
    w.frames = frames, w.channels = channels, w.height = height, w.width = width;
#else
    const TensorMap& past = x;
    void* pictures = nullptr;
#if SHUFFLE
    w.channels = channels;
#endif
#endif
    if (threadIdx.x == 0) {
        for (int i = 0; i < X_SLOTS; ++i) barrier_init(at.full_x + i * 8, 1), barrier_init(at.empty_x + i * 8, WARPS);
        for (int i = 0; i < W_SLOTS; ++i) barrier_init(at.full_w + i * 8, 1), barrier_init(at.empty_w + i * 8, WARPS);
        for (int i = 0; i < 2; ++i)
            barrier_init(at.room + i * 8, 1), barrier_init(at.ready + i * 8, 1), barrier_init(at.done + i * 8, WARPS / 2);
        async_fence();
        fetch_map(x), fetch_map(weight), fetch_map(out);
    }
    __syncthreads();
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (warp < 4) {
        fewer_registers<40>();
        if (lane == 0) {
            if (warp == 0) load(w, at, {x, past, weight, out, residual});
            else if (!FRAMES && warp < 3) store_results(w, at, out, warp - 1);
        }
    } else {
        more_registers<232>();
        multiply(w, at, bias, pictures, (warp >> 2) - 1, warp & 3, lane PASS_GAIN);
    }
}
