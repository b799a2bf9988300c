// 1x1 convolutions on 8-bit codes, NHWC: rows of x are pixels, y[pixel][n] = x[pixel][:] . w[n][:].
//     ADDS 0:  codes = encode(leaky(y * scale[n] + bias[n] / gain[image]))
//     ADDS 1:  u += y * scale[n] * gain[image] (+ shuffle(shortcut));  CODES 1: codes = encode(u * inverse[n] / gain[image])
//
// Weights stay, pixels stream. Two warpgroups multiply; each keeps the weights of 64 * BLOCKS channels in registers, as the
// first operand of wgmma, so what comes out lies channels down and pixels across, and scale and bias are one pair of numbers
// a thread. A third warpgroup feeds them: warp 0 copies tiles of 64 pixels of x into a ring of slots, warp 1 (ADDS) the
// residual and the shortcut into another, whose slots also take the results; warps 2 and 3 write these out in whole rows.
// While one multiplies the other finishes results, and within a tile a block's product is begun before the one before is
// finished. Products that ran on from tile to tile measured up to a third slower (docs/log.md). Barriers in shared memory are
// all the synchronisation there is after the start.
//
// A tile never leaves its image, so gain is one number a tile: it is two segments of up to 32 pixels, one after the other
// or, with SHORTCUT, the same columns of two rows, whose pixels are the four phases of 16 pixels of the shortcut.
//
// rings.cuh has the parameters, the tiles and the feeding warpgroup.

// A thread's share of a block of 64 channels: channels 2 g, 2 g + 1 of its warp's sixteen. Rows g and g + 8 of the product.
struct Share {
    int warpgroup, warp, lane;
    DEVICE int channel(int block) const { return (warpgroup * BLOCKS + block) * 64 + warp * 16; }  // the warp's first, in the slice
};

DEVICE void load_weights_of(u32 (&a)[BLOCKS][STEPS][4], const unsigned char* weight, const Share& me, int channel0) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        int n = channel0 + me.channel(b);
        const unsigned char* row = weight + (i64)(n + (me.lane >> 2) * 2) * DEPTH + (me.lane & 3) * 4;
#pragma unroll
        for (int i = 0; i < STEPS * 4; ++i) {
            const int k = (i >> 2) * 32 + (i >> 1 & 1) * 16;
            a[b][i >> 2][i & 3] = 0;
            if (k < DEPTH && n < CHANNELS) a[b][i >> 2][i & 3] = load_weight(row + (i & 1) * DEPTH + k);
        }
    }
}

// Pixels 2 t and 2 t + 1 of each eight are in one register of the transposed matrix, the two channels in its bytes.
#if !ADDS
DEVICE void finish(const Sum (&d)[32], u32 slot, const Share& me, int block, float4 numbers, float2 gain) {
    float s0 = numbers.x, s1 = numbers.y, b0 = numbers.z * gain.y, b1 = numbers.w * gain.y;
    u32 target = slot + me.lane * CODE_PITCH + me.channel(block);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        u32 word[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Sum* v = d + (4 * s + j) * 4;
            word[j] = leaky_codes(fmaf((float)v[0], s0, b0), fmaf((float)v[2], s1, b1), fmaf((float)v[1], s0, b0), fmaf((float)v[3], s1, b1));
        }
        store_matrix_transposed(target + s * 32 * CODE_PITCH, word[0], word[1], word[2], word[3]);
    }
}
#else
#if SHORTCUT
#define SEGMENT(p, q) (q)
#define EIGHT(p, q) (p)
#else
#define SEGMENT(p, q) ((p) / 2)
#define EIGHT(p, q) ((p) % 2 * 2 + (q))
#endif
DEVICE void finish(const Sum (&d)[32], u32 slot, const Share& me, int block, float4 numbers, float2 gain) {
    float s0 = numbers.x * gain.x, s1 = numbers.y * gain.x, i0 = numbers.z * gain.y, i1 = numbers.w * gain.y;
    int g = me.lane >> 2, t = me.lane & 3;
    u32 pair = slot + 2 * t * U_PITCH + me.channel(block) * 2 + g * 4;
#if SHORTCUT
    u32 phases = slot + U_BYTES + CODE_BYTES + t * SHORTCUT_PITCH + me.channel(block) % QUARTER * 8 + g * 16;
#endif
    u32 word[4];
    // Eight pixels of a segment twice: of one segment, so that few words of codes wait, or, with a shortcut, of both.
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        u32 old[2][2];
#pragma unroll
        for (int q = 0; q < 2; ++q)
#pragma unroll
            for (int c = 0; c < 2; ++c) old[q][c] = load_shared4(pair + (32 * SEGMENT(p, q) + 8 * EIGHT(p, q) + c) * U_PITCH);
#if SHORTCUT
        uint4 more = load_shared16(phases + 4 * p * SHORTCUT_PITCH);
#endif
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            const Sum* v = d + (4 * SEGMENT(p, q) + EIGHT(p, q)) * 4;
            u32 place = pair + (32 * SEGMENT(p, q) + 8 * EIGHT(p, q)) * U_PITCH;
            float y0 = fmaf((float)v[0], s0, low_float(old[q][0])), y1 = fmaf((float)v[2], s1, high_float(old[q][0]));
            float y2 = fmaf((float)v[1], s0, low_float(old[q][1])), y3 = fmaf((float)v[3], s1, high_float(old[q][1]));
#if SHORTCUT
            u32 first = q ? more.y : more.x, second = q ? more.w : more.z;
            y0 += low_float(first), y1 += low_float(second), y2 += high_float(first), y3 += high_float(second);
#endif
            store_shared4(place, pack(y0, y1));
            store_shared4(place + U_PITCH, pack(y2, y3));
            if (CODES) word[EIGHT(p, q)] = plain_codes(y0 * i0, y1 * i1, y2 * i0, y3 * i1);
        }
        if (CODES && p % 2)
            store_matrix_transposed(slot + U_BYTES + (p / 2 * 32 + me.lane) * CODE_PITCH + me.channel(block), word[0], word[1], word[2], word[3]);
    }
}
#endif

struct Consumer {
    Work w;
    Layout at;
    Share me;
    const float2* gain;
    u32 a[BLOCKS][STEPS][4];
    Sum sums[2][32];
    XPlace x;
    OutPlace out;
    float2 factors;
    int index, image_end;

    DEVICE void await_x(const XPlace& p) const {
        barrier_wait(at.full_x + p.slot * 8, p.parity);
        async_fence();
    }
    template <int BLOCK> DEVICE void begin(Sum (&d)[32], int slot) {
        u64 b = matrix_descriptor(at.x + slot * X_BYTES);
        product_begin();
#pragma unroll
        for (int k = 0; k < STEPS; ++k) product_of_codes(d, a[BLOCK][k], b + (k >> 2) * (8192 / 16) + (k & 3) * 2, k > 0);
        product_commit();
    }
    // One block of 64 channels of a tile, and those after it. The next block's product is begun before this one's is awaited.
    template <int BLOCK> DEVICE void turn() {
        constexpr bool FIRST = BLOCK == 0, LAST = BLOCK == BLOCKS - 1;
        if (FIRST) await_x(x), begin<0>(sums[0], x.slot);
        if constexpr (!LAST) begin<BLOCK + 1>(sums[(BLOCK + 1) & 1], x.slot);
        if (FIRST) {
            while (index >= image_end) image_end += w.tiles_of_image, ++gain;
            factors = __ldg(gain);
        }
        products_wait<!LAST>(sums[BLOCK & 1]);
        if (LAST && me.lane == 0) barrier_arrive(at.empty_x + x.slot * 8);
        if (FIRST) barrier_wait((ADDS ? at.full_out : at.empty_out) + out.slot * 8, out.parity);
        if (CHANNELS % SLICE == 0 || w.channel0 + me.channel(BLOCK) < CHANNELS) {
            float4 numbers = load_shared_floats(at.table + (me.channel(BLOCK) / 2 + (me.lane >> 2)) * 16);
            finish(sums[BLOCK & 1], at.out + out.slot * OUT_BYTES, me, BLOCK, numbers, factors);
        }
        if constexpr (!LAST) turn<BLOCK + 1>();
    }
    DEVICE void run(const unsigned char* weight) {
        load_weights_of(a, weight, me, w.channel0);
        x = {0, 0}, out = {0, ADDS ? 0u : 1u}, index = w.first, image_end = w.tiles_of_image;
        for (; index < w.tiles; index += w.stride) {
            turn<0>();
            __syncwarp();
            if (me.lane == 0) barrier_arrive(at.done + out.slot * 8);
            out.next(), x.next();
        }
    }
};

extern "C" __global__ void __launch_bounds__(384, 1)
linear8(unsigned char* codes, u16* u, const unsigned char* x, const unsigned char* weight, const float* scale, const float* other,
        const float* gain, const u16* shortcut, int pixels, int width, int tiles_of_image, int tiles) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Layout at;
    at.x = shared_address(memory);
    at.out = at.x + X_SLOTS * X_BYTES, at.table = at.out + OUT_SLOTS * OUT_BYTES;
    at.full_x = at.table + TABLE_BYTES, at.empty_x = at.full_x + X_SLOTS * 8;
    at.full_out = at.empty_x + X_SLOTS * 8, at.empty_out = at.full_out + OUT_SLOTS * 8, at.done = at.empty_out + OUT_SLOTS * 8;
    if (at.x & 1023) trap();  // the swizzle goes by address bits
    Work w = work_of_block(pixels, width, tiles_of_image, tiles);
    if (threadIdx.x == 0) {
        for (int i = 0; i < X_SLOTS; ++i) barrier_init(at.full_x + i * 8, ADDS ? 32 : 64), barrier_init(at.empty_x + i * 8, CONSUMERS);
        for (int i = 0; i < OUT_SLOTS; ++i)
            barrier_init(at.full_out + i * 8, 32), barrier_init(at.empty_out + i * 8, 2), barrier_init(at.done + i * 8, CONSUMERS);
    }
    for (int i = threadIdx.x; i < SLICE / 2; i += blockDim.x) {
        int n = w.channel0 + 2 * i;
        float4 v = {0, 0, 0, 0};
        if (n < CHANNELS) v.x = scale[n], v.y = scale[n + 1];
        if (n < CHANNELS && other) v.z = other[n], v.w = other[n + 1];
        store_shared_floats(at.table + i * 16, v);
    }
    // A step takes 32 codes; where the last has 16, the others are zero.
    if (DEPTH % 32)
        for (int i = threadIdx.x; i < X_SLOTS * 64; i += blockDim.x)
            store_shared16(at.x + i / 64 * X_BYTES + DEPTH / 128 * 8192 + swizzled(i % 64, DEPTH / 16 % 8), 0);
    async_fence();
    __syncthreads();
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (warp < 4) {
        fewer_registers<40>();
        if (warp == 1 && ADDS) load_residual(w, at, u, shortcut, lane);
        else if (warp < 2) load_x(w, at, x, warp, ADDS ? 2 : warp + 1, lane);
        if (warp >= 2) store_results(w, at, u, codes, warp - 2, lane);
    } else {
        more_registers<232>();
        Consumer c;
        c.w = w, c.at = at, c.me = {(warp >> 2) - 1, warp & 3, lane}, c.gain = (const float2*)gain;
        c.run(weight);
    }
}
