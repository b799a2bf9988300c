// The tail of a decoder stage with one residual block, at twice the resolution of its inputs, NHWC:
//     out = up2(low) + shuffle(shortcut) + w3 leaky(conv3x3_groups_of_16(leaky(up2(hidden))) + b2)
//
// MODE 0, whole: one block makes all of it. Four warps project (project.cuh); one warp a group of 16 hidden channels feeds
// them (branch.cuh) through SLOTS slots of 64 pixels. Two kinds of barrier, both passed in the same order by everyone, are
// all the synchronisation there is: `full` (all groups have stored the slot) and `empty` (its result is out).
// MODE 1, branch: the hidden branch alone, to global memory; every warp is on its own. With INT8 or FP8 it writes codes (see
// grouped_conv8), and `gain` takes the place of the arguments that only the projection reads. With RESIDUAL (1: and a shortcut)
// other blocks of the same launch make what the branch is added to (residual.cuh): they wait for memory while these compute.
// MODE 2, projection: the rest, for stages whose weights leave no room for the branch: one warp has the tensor copy engine bring
// h into the slots, and blocks side by side make COLUMNS_OUT channels each.
//
// WIDE: channels of hidden; the other widths are explained in project.cuh. height, width: low resolution; rows: low rows of a
// band, the piece of a strip that one block walks down.
struct Work {
    Strip strip;
    int part;  // MODE 1: first group; MODE 2: first channel
};

DEVICE Work work_of_block(int index, int height, int width, int rows, int parts, int part_size) {
    int strips = (2 * width + STRIP - 1) / STRIP, bands = (height + rows - 1) / rows;
    Work w;
    w.part = index % parts * part_size, index /= parts;
    w.strip.x0 = index % strips * STRIP, index /= strips;
    w.strip.first = index % bands * rows, w.strip.last = min(w.strip.first + rows, height);
    w.strip.batch = index / bands;
    return w;
}

#if MODE == 1
#define WARPS 4
#if defined(INT8) || defined(FP8)
// Codes of one group are 16 bytes a pixel, half of a sector of memory: written one by one they took twice the time of 16-bit
// results. The block's warps therefore put what a step makes side by side into shared memory and write it out together.
#define PIXEL (16 * WARPS)
#define STAGE_BYTES (2 * STRIP * PIXEL)
typedef unsigned char Out;
struct Sink {
    u32 mine, piece;  // this lane's place for what it makes, and what this thread writes out: 16 bytes of a pixel of both rows
    Out* target;
    i64 line;
    bool inside, valid;
    int threads, buffer;
    float inverse_gain;
    // Eight neighbouring pixels lie in different banks.
    static DEVICE u32 place(int pixel, int chunk) { return pixel * PIXEL + ((chunk ^ (pixel >> 1 & 3)) << 4); }
    DEVICE Sink(const Work& w, Out* out, const float* gain, int height, int width, u32 memory, int warp, int lane) {
        int warps = min(WARPS, WIDE / 16 - w.part), pixel = threadIdx.x / warps, chunk = threadIdx.x % warps;
        mine = memory + place(lane >> 2, warp) + (lane & 3) * 4, piece = memory + place(pixel, chunk);
        line = (i64)2 * width * WIDE;
        target = out + ((i64)w.strip.batch * height + w.strip.first) * 2 * line + (i64)(w.strip.x0 + pixel) * WIDE + (w.part + chunk) * 16;
        inside = w.strip.x0 + pixel < 2 * width, valid = false;
        threads = warps * 32, buffer = 0, inverse_gain = gain[2 * w.strip.batch + 1];
    }
    DEVICE void begin() {}
    DEVICE void put(int r, int j, const float (&d)[2][4]) {
        if (!valid) return;
        float g = inverse_gain;
        u32 at = mine + buffer + (r * STRIP + 16 * j) * PIXEL;
        store_shared4(at, leaky_codes(g * d[0][0], g * d[0][1], g * d[1][0], g * d[1][1]));
        store_shared4(at + 8 * PIXEL, leaky_codes(g * d[0][2], g * d[0][3], g * d[1][2], g * d[1][3]));
    }
    DEVICE void end(bool) {
        if (valid) {
            // One barrier a step: who writes this buffer again has passed the next one, and its readers were done before that.
            named_barrier(1, threads);
            store_global16_if(inside, target, load_shared16(piece + buffer));
            store_global16_if(inside, target + line, load_shared16(piece + buffer + STRIP * PIXEL));
            target += 2 * line, buffer ^= STAGE_BYTES;
        }
        valid = true;
    }
};
#else
typedef u16 Out;
struct Sink {
    Out* target;  // (batch, row, x0 + g, first channel of this thread)
    i64 line;
    int columns;  // from this lane's first to the image's right border
    bool valid;
    DEVICE Sink(const Work& w, Out* out, const float*, int height, int width, u32, int warp, int lane) {
        int x = w.strip.x0 + (lane >> 2);
        line = (i64)2 * width * WIDE;
        target = out + ((i64)w.strip.batch * height + w.strip.first) * 2 * line + (i64)x * WIDE + (w.part + warp) * 16 + (lane & 3) * 4;
        columns = 2 * width - x, valid = false;
    }
    DEVICE void begin() {}
    DEVICE void put(int r, int j, const float (&d)[2][4]) {
        Out* place = target + r * line + 16 * j * WIDE;
        store_global8_if(valid && 16 * j < columns, place, leaky2(pack(d[0][0], d[0][1])), leaky2(pack(d[1][0], d[1][1])));
        store_global8_if(valid && 16 * j + 8 < columns, place + 8 * WIDE, leaky2(pack(d[0][2], d[0][3])), leaky2(pack(d[1][2], d[1][3])));
    }
    DEVICE void end(bool) {
        target += valid ? 2 * line : 0;
        valid = true;
    }
};
#endif

// Three blocks a multiprocessor: a fourth would spill, and measured slower (docs/log.md).
#ifdef RESIDUAL
// `residuals` of the blocks, spread evenly over all of them, make `base`; `low` and `shortcut` are what they read.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 3)
stage_tail(Out* out, const u16* hidden, const uint4* taps, const float* bias, u16* base_out, const u16* low, const u16* shortcut, int height, int width,
           int rows, int batch, int shortcut_channels, int residuals) {
    int before = (int)((i64)blockIdx.x * residuals / gridDim.x), block = blockIdx.x - before;
    if ((i64)(blockIdx.x + 1) * residuals / gridDim.x > before) {
        enlarge_residual<RESIDUAL == 1>(before, base_out, low, shortcut, batch, height, width, WIDE / 2, shortcut_channels);
        return;
    }
    const float* gain = nullptr;
#else
extern "C" __global__ void __launch_bounds__(32 * WARPS, 3)
stage_tail(Out* out, const u16* hidden, const uint4* taps, const float* bias, const float* gain, const void*, const void*, int height, int width,
           int rows) {
    int block = blockIdx.x;
#endif
    extern __shared__ __align__(1024) unsigned char memory[];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Work w = work_of_block(block, height, width, rows, (WIDE / 16 + WARPS - 1) / WARPS, WARPS);
    int group = w.part + warp;
    if (group >= WIDE / 16) return;
    u32 base = shared_address(memory);
    Sink sink(w, out, gain, height, width, base + WARPS * BRANCH_BYTES, warp, lane);
    run_branch(w.strip, hidden, taps, bias, height, width, WIDE, group, base + warp * BRANCH_BYTES, lane, sink);
}

#else
#if MODE == 0
#define PRODUCERS (WIDE / 16)
#define HIDDEN const u16* hidden
// Stores into the slots; h's 16 channels of a group stand as the fragments have them (load_weights_out).
struct ToSlots {
    u32 row, empty, full;  // this lane's row of the first slot, in its group's chunks
    int lane, slot, parity;
    DEVICE void begin() { barrier_wait(empty + slot * 8, parity); }
    DEVICE void put(int r, int j, const float (&d)[2][4]) {
        store_matrix(row + slot * SLOT_BYTES + slot_row(16 * j, r) * 128, leaky2(pack(d[0][0], d[0][1])), leaky2(pack(d[0][2], d[0][3])),
                     leaky2(pack(d[1][0], d[1][1])), leaky2(pack(d[1][2], d[1][3])));
    }
    DEVICE void end(bool valid) {
        if (!valid) return;  // the slot, still empty, is filled again
        async_fence();
        __syncwarp();
        if (lane == 0) barrier_arrive(full + slot * 8);
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
};
#else
#define PRODUCERS 1
#define HIDDEN const __grid_constant__ TensorMap hidden  // [rows of all images, columns, channels]
// Fetches h into the slots: a box is 64 channels of 8 columns of both rows, so that pixels lie as slot_row says. Columns and
// channels beyond the image come as zeros. A slot is asked for as soon as it is free, while the other one is worked on.
DEVICE void run_copies(const Strip& s, const TensorMap& h, int height, const Layout& at, int lane) {
    int slot = 0, parity = 1;
    for (int i = s.first; i < s.last; ++i) {
        barrier_wait(at.empty + slot * 8, parity);
        u32 full = at.full + slot * 8;
        if (lane == 0) barrier_expect(full, SLOT_BYTES);
        __syncwarp();
        for (int k = lane; k < BLOCKS_OF_64 * (STRIP / 8); k += 32)
            copy_box(at.slots + slot * SLOT_BYTES + k * 2048, h, full, k / (STRIP / 8) * 64, s.x0 + k % (STRIP / 8) * 8, 2 * (s.batch * height + i));
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
}
#endif

extern "C" __global__ void __launch_bounds__(32 * (4 + PRODUCERS), 1)
stage_tail(u16* out, HIDDEN, const uint4* taps, const float* bias, const u16* low, const u16* shortcut, const u16* w3, int height, int width,
           int rows) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 base = shared_address(memory);
    if (base & 1023) asm volatile("trap;");  // the swizzle goes by address bits
    Layout at;
    at.slots = base, at.weights = at.slots + SLOTS * SLOT_BYTES, at.low = at.weights + WEIGHT_BYTES;
    at.shortcut = at.low + LOW_RING_BYTES, at.branch = at.shortcut + SHORTCUT_BYTES;
    at.full = at.branch + (MODE == 0 ? PRODUCERS * BRANCH_BYTES : 0), at.empty = at.full + SLOTS * 8;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    Work w = work_of_block(blockIdx.x, height, width, rows, CHANNELS / COLUMNS_OUT, COLUMNS_OUT);
    if (threadIdx.x < SLOTS) barrier_init(at.full + threadIdx.x * 8, PRODUCERS), barrier_init(at.empty + threadIdx.x * 8, 4);
    if (MODE == 0) load_weights_out(at.weights, w3, w.part, true, blockDim.x);
    async_fence();
    __syncthreads();
    if (warp < 4) {
        // Meanwhile the first slots are filled; a barrier of these warps comes before the first product.
        if (MODE == 2) load_weights_out(at.weights, w3, w.part, false, 128), async_fence();
        run_projection(w.strip, out + w.part, low + w.part, shortcut, w.part, height, width, at);
    } else {
#if MODE == 0
        int group = warp - 4;
        u32 row = at.slots + (group >> 2) * 8192 + swizzled(slot_row(lane & 15, 0), (group & 3) * 2 + (lane >> 4));
        ToSlots sink{row, at.empty, at.full, lane, 0, 1};
        run_branch(w.strip, hidden, taps, bias, height, width, WIDE, group, at.branch + group * BRANCH_BYTES, lane, sink);
#else
        run_copies(w.strip, hidden, height, at, lane);
#endif
    }
}
#endif
