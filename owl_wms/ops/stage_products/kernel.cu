// The two products of a narrow stage before it enlarges, out of one reading of its input:
//     low = x proj^T,  hidden = low w1^T + bias        x [M, DEPTH], low [M, CHANNELS], hidden [M, 2 CHANNELS]
//
// Both are bound by memory, and apart, low is written and read again between them. Here two groups of four warps multiply tiles
// of 64 rows, and one more warp has the tensor copy engine bring what they need. low is rounded to its element type before it
// is multiplied, as apart. A tile's hidden is as large as its x (DEPTH = 2 CHANNELS) and goes out by the slot that x came in by.
// `full` barriers say that something has arrived, `empty` ones that its place is free again.
//
// Held (HALF not defined): a block keeps both matrices in shared memory; each group has a ring of SLOTS tiles of its own.
// Streamed (HALF = CHANNELS / 2), for matrices that do not fit: both groups pass through a ring of SLOTS pieces of them (64
// columns deep, CHANNELS rows: first proj's, then the upper half of w1's rows, then the lower), with a tile for each group.
#define ROWS 64
#define PIECE (ROWS * 128)  // bytes of 64 columns of a tile
#define X_PIECES (DEPTH / 64)
#define LOW_PIECES ((CHANNELS + 63) / 64)
#define SLOT_BYTES (X_PIECES * PIECE)
#ifdef HALF
#define MATRIX_BYTES (CHANNELS * 128)  // of a piece of a matrix
#endif
#define PROJ_BYTES (X_PIECES * CHANNELS * 128)
#define W1_BYTES (LOW_PIECES * 2 * CHANNELS * 128)
#define GROUPS 2

// Sixteen columns of this warp's rows, column group `g` of a tile whose first row of this warp lies at `rows`.
DEVICE void store_columns(u32 rows, int g, int lane, const float* d, float b0, float b1, float b2, float b3) {
    store_matrix(rows + (g >> 2) * PIECE + swizzled(lane & 15, (g & 3) * 2 + (lane >> 4)), pack(d[0] + b0, d[1] + b1), pack(d[2] + b0, d[3] + b1),
                 pack(d[4] + b2, d[5] + b3), pack(d[6] + b2, d[7] + b3));
}

#ifdef HALF
// Multiplies a tile (pieces of 64 columns at `rows`) by COUNT pieces out of the ring: 2 HALF columns, `sum` of each half.
template <int COUNT>
DEVICE void multiply(float (&sum)[2][HALF / 2], u32 rows, Place<SLOTS>& at, u32 matrices, u32 full, u32 empty, int lane) {
#pragma unroll
    for (int piece = 0; piece < COUNT; ++piece) {
        u32 matrix = matrices + at.slot * MATRIX_BYTES;
        barrier_wait(full + at.slot * 8, at.parity);
        product_begin();
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                product<HALF>(sum[half], matrix_descriptor(rows + piece * PIECE) + k * 2, matrix_descriptor(matrix + half * HALF * 128) + k * 2,
                              piece + k > 0);
        product_commit();
        if (piece > 0) {
            products_left<1>();
            if (lane == 0) barrier_arrive(empty + (at.slot + SLOTS - 1) % SLOTS * 8);
        }
        at.next();
    }
    product_wait(sum[0]);
    product_wait(sum[1]);
    if (lane == 0) barrier_arrive(empty + (at.slot + SLOTS - 1) % SLOTS * 8);
}

extern "C" __global__ void __launch_bounds__(128 * GROUPS + 32, 1)
stage_products(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap proj, const __grid_constant__ TensorMap w1,
               const __grid_constant__ TensorMap low, const __grid_constant__ TensorMap hidden, const u32* bias, int rounds) {
    static_assert(DEPTH == 2 * CHANNELS && CHANNELS == 2 * HALF && CHANNELS % 64 == 0, "hidden takes the place of x");
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 base = shared_address(memory);
    if (base & 1023) trap();  // the swizzle goes by address bits
    u32 matrices = base, tiles = matrices + SLOTS * MATRIX_BYTES, lows = tiles + GROUPS * SLOT_BYTES;
    u32 full = lows + GROUPS * LOW_PIECES * PIECE, empty = full + SLOTS * 8, x_full = empty + SLOTS * 8, x_empty = x_full + GROUPS * 8;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (threadIdx.x < SLOTS) barrier_init(full + threadIdx.x * 8, 1), barrier_init(empty + threadIdx.x * 8, 4 * GROUPS);
    if (threadIdx.x < GROUPS) barrier_init(x_full + threadIdx.x * 8, 1), barrier_init(x_empty + threadIdx.x * 8, 1);
    async_fence();
    __syncthreads();

    if (warp == 4 * GROUPS) {
        if (lane != 0) return;
        Place<SLOTS> at = {0, 1};
        u32 parity = 1;
        for (int round = blockIdx.x; round < rounds; round += gridDim.x) {
            for (int i = 0; i < X_PIECES + 2 * LOW_PIECES; ++i) {
                barrier_wait(empty + at.slot * 8, at.parity);
                barrier_expect(full + at.slot * 8, MATRIX_BYTES);
                int j = i - X_PIECES;
                if (j < 0)
                    copy_box(matrices + at.slot * MATRIX_BYTES, proj, full + at.slot * 8, i * 64, 0);
                else
                    copy_box(matrices + at.slot * MATRIX_BYTES, w1, full + at.slot * 8, j % LOW_PIECES * 64, j / LOW_PIECES * CHANNELS);
                at.next();
                if (i != SLOTS - 1) continue;
                // All slots of the ring are asked for, which needs nothing of this round; the tiles before may still be on their way out.
                for (int group = 0; group < GROUPS; ++group) {
                    barrier_wait(x_empty + group * 8, parity);
                    barrier_expect(x_full + group * 8, SLOT_BYTES);
                    for (int k = 0; k < X_PIECES; ++k)
                        copy_box(tiles + group * SLOT_BYTES + k * PIECE, x, x_full + group * 8, k * 64, (round * GROUPS + group) * ROWS);
                }
                parity ^= 1;
            }
        }
        return;
    }

    int group = warp >> 2;
    bool leader = (threadIdx.x & 127) == 0;
    u32 x_tile = tiles + group * SLOT_BYTES, rows = x_tile + (warp & 3) * 16 * 128;
    u32 low_tile = lows + group * LOW_PIECES * PIECE, low_rows = low_tile + (warp & 3) * 16 * 128;
    Place<SLOTS> at = {0, 0};
    u32 parity = 0;
    for (int round = blockIdx.x; round < rounds; round += gridDim.x) {
        int row = (round * GROUPS + group) * ROWS;  // may lie beyond the last one: zeros come from there, and nothing goes there
        float sum[2][HALF / 2];
        barrier_wait(x_full + group * 8, parity);
        multiply<X_PIECES>(sum, x_tile, at, matrices, full, empty, lane);
#pragma unroll
        for (int g = 0; g < CHANNELS / 16; ++g)
            store_columns(low_rows, g, lane, sum[g / (HALF / 16)] + 8 * (g % (HALF / 16)), 0.f, 0.f, 0.f, 0.f);
        async_fence();
        named_barrier(1 + group, 128);  // low is there, and all of x is read
        if (leader) {
            for (int i = 0; i < LOW_PIECES; ++i) store_box(low, low_tile + i * PIECE, i * 64, row);
            store_commit();
        }
#pragma unroll 1
        for (int part = 0; part < 2; ++part) {
            multiply<LOW_PIECES>(sum, low_tile, at, matrices, full, empty, lane);
            const u32* pairs = bias + part * CHANNELS / 2 + (lane & 3);
#pragma unroll
            for (int g = 0; g < CHANNELS / 16; ++g) {
                u32 first = __ldg(pairs + g * 8), second = __ldg(pairs + g * 8 + 4);
                store_columns(rows + part * LOW_PIECES * PIECE, g, lane, sum[g / (HALF / 16)] + 8 * (g % (HALF / 16)), low_float(first), high_float(first),
                              low_float(second), high_float(second));
            }
        }
        async_fence();
        named_barrier(1 + group, 128);
        if (leader) {
            for (int i = 0; i < X_PIECES; ++i) store_box(hidden, x_tile + i * PIECE, i * 64, row);
            store_commit();
            stores_have_read();
            barrier_arrive(x_empty + group * 8);
        }
        parity ^= 1;
    }
    if (leader) stores_wait();
}
#else
extern "C" __global__ void __launch_bounds__(128 * GROUPS + 32, 1)
stage_products(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap proj, const __grid_constant__ TensorMap w1,
               const __grid_constant__ TensorMap low, const __grid_constant__ TensorMap hidden, const u32* bias, int tiles) {
    static_assert(DEPTH == 2 * CHANNELS && DEPTH % 64 == 0, "hidden takes the place of x");
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 base = shared_address(memory);
    if (base & 1023) trap();  // the swizzle goes by address bits
    u32 proj_at = base, w1_at = proj_at + PROJ_BYTES, slots = w1_at + W1_BYTES, lows = slots + GROUPS * SLOTS * SLOT_BYTES;
    u32 full = lows + GROUPS * LOW_PIECES * PIECE, empty = full + GROUPS * SLOTS * 8, weights = empty + GROUPS * SLOTS * 8;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (threadIdx.x < GROUPS * SLOTS) barrier_init(full + threadIdx.x * 8, 1), barrier_init(empty + threadIdx.x * 8, 1);
    if (threadIdx.x == 0) barrier_init(weights, 1);
    async_fence();
    __syncthreads();

    if (warp == 4 * GROUPS) {
        if (lane != 0) return;
        barrier_expect(weights, PROJ_BYTES + W1_BYTES);
        for (int i = 0; i < X_PIECES; ++i) copy_box(proj_at + i * CHANNELS * 128, proj, weights, i * 64, 0);
        for (int i = 0; i < LOW_PIECES; ++i) copy_box(w1_at + i * 2 * CHANNELS * 128, w1, weights, i * 64, 0);
        Place<SLOTS> at = {0, 1};
        int group = 0;
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            int slot = group * SLOTS + at.slot;
            barrier_wait(empty + slot * 8, at.parity);
            barrier_expect(full + slot * 8, SLOT_BYTES);
            for (int i = 0; i < X_PIECES; ++i) copy_box(slots + slot * SLOT_BYTES + i * PIECE, x, full + slot * 8, i * 64, tile * ROWS);
            group ^= 1;
            if (group == 0) at.next();
        }
        return;
    }

    int group = warp >> 2;
    bool leader = (threadIdx.x & 127) == 0;
    u32 low_tile = lows + group * LOW_PIECES * PIECE, low_rows = low_tile + (warp & 3) * 16 * 128;
    u32 left = 0;  // barrier of the slot whose hidden is on its way out
    Place<SLOTS> at = {0, 0};
    barrier_wait(weights, 0);
    for (int tile = blockIdx.x + group * gridDim.x; tile < tiles; tile += GROUPS * gridDim.x) {
        int slot = group * SLOTS + at.slot;
        u32 x_tile = slots + slot * SLOT_BYTES, rows = x_tile + (warp & 3) * 16 * 128;
        barrier_wait(full + slot * 8, at.parity);
        float sum[CHANNELS / 2];
        product_begin();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k)
            product<CHANNELS>(sum, matrix_descriptor(x_tile) + (k >> 2) * (PIECE / 16) + (k & 3) * 2,
                              matrix_descriptor(proj_at) + (k >> 2) * (CHANNELS * 128 / 16) + (k & 3) * 2, k > 0);
        product_commit();
        if (leader) {
            stores_have_read();  // of the tile before
            if (left) barrier_arrive(left);
        }
        product_wait(sum);
        named_barrier(1 + group, 128);  // the place for low is free, and all of x is read
#pragma unroll
        for (int g = 0; g < CHANNELS / 16; ++g) store_columns(low_rows, g, lane, sum + 8 * g, 0.f, 0.f, 0.f, 0.f);
        async_fence();
        named_barrier(1 + group, 128);
        if (leader) {
            for (int i = 0; i < LOW_PIECES; ++i) store_box(low, low_tile + i * PIECE, i * 64, tile * ROWS);
            store_commit();
        }
        float wide[2][CHANNELS / 2];
        product_begin();
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int k = 0; k < CHANNELS / 16; ++k)
                product<CHANNELS>(wide[half], matrix_descriptor(low_tile) + (k >> 2) * (PIECE / 16) + (k & 3) * 2,
                                  matrix_descriptor(w1_at + half * CHANNELS * 128) + (k >> 2) * (2 * CHANNELS * 128 / 16) + (k & 3) * 2, k > 0);
        product_commit();
        product_wait(wide[0]);
        product_wait(wide[1]);
#pragma unroll
        for (int g = 0; g < 2 * CHANNELS / 16; ++g) {
            u32 first = __ldg(bias + g * 8 + (lane & 3)), second = __ldg(bias + g * 8 + 4 + (lane & 3));
            store_columns(rows, g, lane, wide[g / (CHANNELS / 16)] + 8 * (g % (CHANNELS / 16)), low_float(first), high_float(first), low_float(second),
                          high_float(second));
        }
        async_fence();
        named_barrier(1 + group, 128);
        if (leader) {
            for (int i = 0; i < X_PIECES; ++i) store_box(hidden, x_tile + i * PIECE, i * 64, tile * ROWS);
            store_commit();
        }
        left = empty + slot * 8;
        at.next();
    }
    if (leader) stores_wait();
}
#endif
