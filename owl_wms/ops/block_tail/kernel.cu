// What a residual block does behind its first product, NHWC, in place:
//     u += w3 leaky(conv3x3_groups_of_16(leaky(hidden)) + b2)
//
// A tile is 8 x 16 pixels with all 256 channels of u, whose sums stay in the registers of two warpgroups: pixels stay, weights
// pass. The hidden channels go by in chunks of 64. One thread copies a chunk's pixels with the border that the nine taps need;
// a warpgroup multiplies them, one group of 16 channels a warp, as `grouped_conv` does: each row is read once in its three
// shifts, goes through LeakyReLU and feeds three rows of sums. What comes out is rounded and laid into shared memory as the
// first operand of the products with w3, whose 64 x 256 weights of the chunk another thread has copied.
//
// A cluster of CLUSTER blocks wants the same weights at the same time: each copies its share to all of them, so the L2 is
// asked for them once a cluster. A slot may be written when every block of the cluster has read it, and all of them go through
// the same number of tiles; those beyond the last one are zeros that nobody stores.
//
// Rows of w3 come permuted, see finish: a thread then holds eight neighbouring
// channels, and four threads read and write 64 bytes of u side by side, with no detour through shared memory.
//
// WIDE: channels of hidden, a multiple of 64. CLUSTER: 1, 2 or 4. X_SLOTS, T_SLOTS, W_SLOTS, H_SLOTS: slots
// for pixels, taps, weights and what goes from one product to the other.
#define CHANNELS 256
#define CHUNKS (WIDE / 64)
#define ROWS 8
#define COLUMNS 16
#define X_ROW (COLUMNS + 2)
#define X_COPIED ((ROWS + 2) * X_ROW * 128)
#define X_BYTES ((X_COPIED + 1023) / 1024 * 1024)
#define T_BYTES (4 * 9 * 512)
#define W_BYTES (CHANNELS * 128)
#define H_BYTES (ROWS * COLUMNS * 128)
#define CONSUMERS 8  // warps that multiply by w3
#define THREADS (32 * CONSUMERS + 128 + 128)
// Of a thread: threads begin with 128, and the sum must not be more than that.
#define CONSUMER_REGISTERS 176
#define CONV_REGISTERS 112
#define COPY_REGISTERS 32

struct Layout {
    u32 w, x, t, h, full_w, empty_w, full_x, empty_x, full_t, empty_t, full_h, empty_h;
};

struct Work {
    int tiles, down, across, height, width, rounds;
};
struct Tile {
    int image, y, x;
};

DEVICE int index_of(int round) { return round * gridDim.x + blockIdx.x; }
DEVICE Tile tile_at(const Work& w, int index) {
    Tile t;
    int row = (u32)index / (u32)w.across;
    t.x = (index - row * w.across) * COLUMNS;
    t.image = (u32)row / (u32)w.down;
    t.y = (row - t.image * w.down) * ROWS;
    return t;
}

// Pixels of hidden, chunk after chunk; an image beyond the last comes as zeros.
DEVICE void copy_pixels(const Work& w, const Layout& at, const TensorMap& hidden, const u16* u) {
    Place<X_SLOTS> p{0, 1};
    for (int round = 0; round < w.rounds; ++round) {
        Tile t = tile_at(w, index_of(round));
        if (index_of(round) < w.tiles)  // wanted when the tile's sums are there
            for (int y = t.y; y < min(t.y + ROWS, w.height); ++y)
                fetch_ahead(u + (((i64)t.image * w.height + y) * w.width + t.x) * CHANNELS, min(COLUMNS, w.width - t.x) * CHANNELS * 2);
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; ++chunk, p.next()) {
            barrier_wait(at.empty_x + p.slot * 8, p.parity);
            barrier_expect(at.full_x + p.slot * 8, X_COPIED);
            copy_box(at.x + p.slot * X_BYTES, hidden, at.full_x + p.slot * 8, chunk * 64, t.x - 1, t.y - 1, t.image);
        }
    }
}

// This block's share of every chunk's taps, to all blocks of the cluster.
DEVICE void copy_taps(const Work& w, const Layout& at, const TensorMap& taps, int rank) {
    const int lines = T_BYTES / 128 / CLUSTER;
    Place<T_SLOTS> p{0, 1};
    for (int left = w.rounds * CHUNKS, chunk = 0; left > 0; --left, p.next(), chunk = chunk + 1 == CHUNKS ? 0 : chunk + 1) {
        barrier_wait_cluster(at.empty_t + p.slot * 8, p.parity);
        barrier_expect(at.full_t + p.slot * 8, T_BYTES);
        copy_box_to_all<CLUSTER>(at.t + p.slot * T_BYTES + rank * lines * 128, taps, at.full_t + p.slot * 8, 0, chunk * (T_BYTES / 128) + rank * lines);
    }
}

// The same of w3's columns. The map's dimensions are the hidden channel and a channel of u as 32 q + 8 t + 2 j + e: e, t, j, q.
DEVICE void copy_weights(const Work& w, const Layout& at, const TensorMap& w3, int rank) {
    Place<W_SLOTS> p{0, 1};
    for (int left = w.rounds * CHUNKS, chunk = 0; left > 0; --left, p.next(), chunk = chunk + 1 == CHUNKS ? 0 : chunk + 1) {
        barrier_wait_cluster(at.empty_w + p.slot * 8, p.parity);
        barrier_expect(at.full_w + p.slot * 8, W_BYTES);
        copy_box_to_all<CLUSTER>(at.w + p.slot * W_BYTES + rank * (W_BYTES / CLUSTER), w3, at.full_w + p.slot * 8, chunk * 64, 0, 0, 0, rank * (8 / CLUSTER));
    }
}

// One warp's group of every chunk. Lane 4 g + t makes channels 4 t to 4 t + 3 of the group, of pixels g and g + 8.
DEVICE void convolve(const Work& w, const Layout& at, const float* bias, int group, int lane) {
    Place<X_SLOTS> x{0, 0};
    Place<T_SLOTS> p{0, 0};
    Place<H_SLOTS> h{0, 1};
    u32 pixel = (lane & 15) * 128, chunk16 = (group * 2 + (lane >> 4)) << 4;
    int first = lane >> 2;
    // Byte of the four channels in row g of a slot of h; g + 8 and every row of pixels lie multiples of eight rows further.
    u32 target = first * 128 + (((group * 2 + ((lane & 3) >> 1)) ^ first) << 4) + (lane & 1) * 8;
    int left = w.rounds * CHUNKS;
#pragma unroll 1
    for (int step = 0; step < left; ++step, x.next(), p.next(), h.next()) {
        float4 b = __ldg((const float4*)(bias + step % CHUNKS * 64 + group * 16) + (lane & 3));
        u32 taps[9][4];
        barrier_wait(at.full_t + p.slot * 8, p.parity);
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
            // Lane `lane` of a tap is sixteen bytes of the packed weights, 128 of them a line of the copied box.
            int line = (group * 9 + tap) * 4 + (lane >> 3);
            uint4 v = load_shared16(at.t + p.slot * T_BYTES + swizzled(line, lane & 7));
            taps[tap][0] = v.x, taps[tap][1] = v.y, taps[tap][2] = v.z, taps[tap][3] = v.w;
        }
        __syncwarp();
        arrive_everywhere<CLUSTER>(at.empty_t + p.slot * 8, lane);
        barrier_wait(at.full_x + x.slot * 8, x.parity);
        u32 rows = at.x + x.slot * X_BYTES, out = at.h + h.slot * H_BYTES + target;
        float sums[3][2][4];
#pragma unroll
        for (int r = 0; r < ROWS + 2; ++r) {
            // sums[(r + age) % 3] belong to the row of results for which this row is tap 2 - age; rows outside of the tile are left out.
            if (r < ROWS) {
                float(&fresh)[2][4] = sums[(r + 2) % 3];
                fresh[0][0] = fresh[0][2] = b.x, fresh[0][1] = fresh[0][3] = b.y;
                fresh[1][0] = fresh[1][2] = b.z, fresh[1][1] = fresh[1][3] = b.w;
            }
#pragma unroll
            for (int s = 0; s < 3; ++s) {
                u32 a[4], place = pixel + (r * X_ROW + s) * 128;
                load_matrix(a, rows + place + (chunk16 ^ (place >> 3 & 0x70)));
#pragma unroll
                for (int i = 0; i < 4; ++i) a[i] = leaky2(a[i]);
#pragma unroll
                for (int age = 0; age < 3; ++age)
                    if (r + age >= 2 && r + age < ROWS + 2) {
                        const u32(&tap)[4] = taps[(2 - age) * 3 + s];
                        mma(sums[(r + age) % 3][0], a, tap[0], tap[1]);
                        mma(sums[(r + age) % 3][1], a, tap[2], tap[3]);
                    }
            }
            if (r == 2) barrier_wait(at.empty_h + h.slot * 8, h.parity);
            if (r >= 2) {
                const float(&d)[2][4] = sums[r % 3];
                u32 line = out + (r - 2) * COLUMNS * 128;
                store_shared8(line, leaky2(pack(d[0][0], d[0][1])), leaky2(pack(d[1][0], d[1][1])));
                store_shared8(line + 8 * 128, leaky2(pack(d[0][2], d[0][3])), leaky2(pack(d[1][2], d[1][3])));
            }
        }
        async_fence();
        __syncwarp();
        if (lane == 0) barrier_arrive(at.empty_x + x.slot * 8), barrier_arrive(at.full_h + h.slot * 8);
    }
}

// Adds a tile's sums to u, and calls `released` once they are there: column 8 (4 q + j) + 2 t + e of the product is channel 32 q + 8 t + 2 j + e.
template <class Released> DEVICE void finish(const Work& w, u16* u, int index, float (&sum)[2][CHANNELS / 4], int row, int lane, Released released) {
    Tile t = tile_at(w, index);
    int y = t.y + row, x = t.x + (lane >> 2);
    bool inside[2] = {index < w.tiles && y < w.height && x < w.width, index < w.tiles && y < w.height && x + 8 < w.width};
    u16* place = u + (((i64)t.image * w.height + y) * w.width + x) * CHANNELS + (lane & 3) * 8;
    // The first quarter is asked for before the sums are there; sums that are done leave their registers to the rest.
    const int QUARTER = CHANNELS / 32 / 4;
    uint4 old[CHANNELS / 32][2];
    auto load = [&](int q) {
        for (int half = 0; half < 2; ++half) old[q][half] = load_global16_if(inside[half], place + half * 8 * CHANNELS + 32 * q);
    };
    auto store = [&](int q) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 v = old[q][half];
            const float* d = sum[q / 4] + 16 * (q % 4) + 2 * half;
            v.x = pack(d[0] + low_float(v.x), d[1] + high_float(v.x));
            v.y = pack(d[4] + low_float(v.y), d[5] + high_float(v.y));
            v.z = pack(d[8] + low_float(v.z), d[9] + high_float(v.z));
            v.w = pack(d[12] + low_float(v.w), d[13] + high_float(v.w));
            store_global16_if(inside[half], place + half * 8 * CHANNELS + 32 * q, v);
        }
    };
#pragma unroll
    for (int q = 0; q < QUARTER; ++q) load(q);
    product_wait(sum[0]), product_wait(sum[1]);
    released();
#pragma unroll
    for (int q = 0; q < QUARTER; ++q) store(q);
#pragma unroll
    for (int q = QUARTER; q < CHANNELS / 32; ++q) load(q);
#pragma unroll
    for (int q = QUARTER; q < CHANNELS / 32; ++q) store(q);
}

// Warpgroup g has rows 4 g to 4 g + 3 of a tile, each warp one.
DEVICE void multiply(const Work& w, const Layout& at, u16* u, int g, int warp, int lane) {
    Place<W_SLOTS> p{0, 0};
    Place<H_SLOTS> h{0, 0};
    float sum[2][CHANNELS / 4];  // one product of all channels would want more registers at once than threads begin with
    auto release = [&](int slot_w, int slot_h) {
        arrive_everywhere<CLUSTER>(at.empty_w + slot_w * 8, lane);
        if (lane == 0) barrier_arrive(at.empty_h + slot_h * 8);
    };
    for (int round = 0; round < w.rounds; ++round) {
        int before_p = -1, before_h = -1;  // slots whose products are not known to be over
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            barrier_wait(at.full_w + p.slot * 8, p.parity);
            barrier_wait(at.full_h + h.slot * 8, h.parity);
            u64 a = matrix_descriptor(at.h + h.slot * H_BYTES + g * (H_BYTES / 2)), b = matrix_descriptor(at.w + p.slot * W_BYTES);
            product_begin();
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                product<CHANNELS / 2>(sum[0], a + 2 * k, b + 2 * k, chunk > 0 || k > 0);
                product<CHANNELS / 2>(sum[1], a + 2 * k, b + 2 * k + W_BYTES / 2 / 16, chunk > 0 || k > 0);
            }
            product_commit();
            products_left<1>();
            if (chunk > 0) release(before_p, before_h);
            before_p = p.slot, before_h = h.slot;
            p.next(), h.next();
        }
        finish(w, u, index_of(round), sum, 4 * g + warp, lane, [&] { release(before_p, before_h); });
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
block_tail(u16* u, const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap taps, const __grid_constant__ TensorMap w3,
           const float* bias, int tiles, int down, int across, int height, int width) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Layout at;
    at.w = shared_address(memory);
    if (at.w & 1023) trap();  // the swizzle goes by address bits
    at.x = at.w + W_SLOTS * W_BYTES, at.t = at.x + X_SLOTS * X_BYTES, at.h = at.t + T_SLOTS * T_BYTES;
    at.full_w = at.h + H_SLOTS * H_BYTES, at.empty_w = at.full_w + W_SLOTS * 8;
    at.full_x = at.empty_w + W_SLOTS * 8, at.empty_x = at.full_x + X_SLOTS * 8;
    at.full_t = at.empty_x + X_SLOTS * 8, at.empty_t = at.full_t + T_SLOTS * 8;
    at.full_h = at.empty_t + T_SLOTS * 8, at.empty_h = at.full_h + H_SLOTS * 8;
    Work w = {tiles, down, across, height, width, (tiles + (int)gridDim.x - 1) / (int)gridDim.x};
    if (threadIdx.x == 0) {
        for (int i = 0; i < W_SLOTS; ++i) barrier_init(at.full_w + i * 8, 1), barrier_init(at.empty_w + i * 8, CONSUMERS * CLUSTER);
        for (int i = 0; i < X_SLOTS; ++i) barrier_init(at.full_x + i * 8, 1), barrier_init(at.empty_x + i * 8, 4);
        for (int i = 0; i < T_SLOTS; ++i) barrier_init(at.full_t + i * 8, 1), barrier_init(at.empty_t + i * 8, 4 * CLUSTER);
        for (int i = 0; i < H_SLOTS; ++i) barrier_init(at.full_h + i * 8, 4), barrier_init(at.empty_h + i * 8, CONSUMERS);
        barriers_are_made();
        fetch_map(hidden), fetch_map(taps), fetch_map(w3);
    }
    __syncthreads();
    cluster_barrier<CLUSTER>();  // every block's barriers are there
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (warp < CONSUMERS) {
        more_registers<CONSUMER_REGISTERS>();
        multiply(w, at, u, warp >> 2, warp & 3, lane);
    } else if (warp < CONSUMERS + 4) {
        fewer_registers<CONV_REGISTERS>();
        convolve(w, at, bias, warp & 3, lane);
    } else {
        fewer_registers<COPY_REGISTERS>();
        int rank = CLUSTER == 1 ? 0 : (int)(blockIdx.x % CLUSTER);
        if (lane == 0) {
            if ((warp & 3) == 0) copy_pixels(w, at, hidden, u);
            if ((warp & 3) == 1) copy_taps(w, at, taps, rank);
            if ((warp & 3) == 2) copy_weights(w, at, w3, rank);
        }
        __syncwarp();
    }
    cluster_barrier<CLUSTER>();  // nobody leaves while others still write into its memory
}
