// out = h * silu(g), where h and g are the halves of depthwise3x3(silu(x)) + bias, NHWC, zero padding.
//
// A thread owns two channels of each half and ROWS output rows, and walks SPAN columns to the right. Every input it loads is
// activated once and added to the three columns of sums that are in flight, so nothing is shared; a column is loaded while
// the one before is added. Three columns a turn, so that sums change roles and not registers.
//
// silu (device.cuh) is one operation of the unit for special functions, which would bound the kernel with two.
//
// CHANNELS of the result and WIDTH are known to the compiler: every load of a column is one address and a constant.
#define X_ROW (WIDTH * 2 * CHANNELS)

struct Sums {
    float hidden[ROWS][2], gate[ROWS][2];
};
struct Column {
    u32 hidden[ROWS + 2], gate[ROWS + 2];
};
struct Taps {
    float hidden[9][2], gate[9][2];
};

struct Walk {
    const u16* x;  // column 0 of row top - 1
    u16* out;      // column 0 of row top
    int rows, first, last;  // columns first to last - 1
    float bias_hidden[2], bias_gate[2];
    bool valid[ROWS + 2];

    DEVICE Column load(int at) const {
        Column c;
#pragma unroll
        for (int r = 0; r < ROWS + 2; ++r) {
            bool inside = valid[r] && (u32)at < (u32)WIDTH;
            const u16* pixel = x + at * 2 * CHANNELS + r * X_ROW;
            c.hidden[r] = inside ? __ldg((const u32*)pixel) : 0u;  // silu(0) = 0: padding after the activation
            c.gate[r] = inside ? __ldg((const u32*)(pixel + CHANNELS)) : 0u;
        }
        return c;
    }
    DEVICE void reset(Sums& s) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int c = 0; c < 2; ++c) s.hidden[r][c] = bias_hidden[c], s.gate[r][c] = bias_gate[c];
    }
    // Column `at` into the sums of the columns at - 1, at and at + 1, of which the first are then complete.
    DEVICE void add(const Taps& w, const Column& column, int at, Sums& left, Sums& here, Sums& right) const {
        reset(right);
#pragma unroll
        for (int r = 0; r < ROWS + 2; ++r) {
            float hv[2] = {silu(low_float(column.hidden[r])), silu(high_float(column.hidden[r]))};
            float gv[2] = {silu(low_float(column.gate[r])), silu(high_float(column.gate[r]))};
#pragma unroll
            for (int dy = 0; dy < 3; ++dy) {
                int o = r - dy;  // input row r is tap dy of output row o
                if (o < 0 || o >= ROWS) continue;
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    left.hidden[o][c] = fmaf(w.hidden[dy * 3 + 2][c], hv[c], left.hidden[o][c]);
                    here.hidden[o][c] = fmaf(w.hidden[dy * 3 + 1][c], hv[c], here.hidden[o][c]);
                    right.hidden[o][c] = fmaf(w.hidden[dy * 3 + 0][c], hv[c], right.hidden[o][c]);
                    left.gate[o][c] = fmaf(w.gate[dy * 3 + 2][c], gv[c], left.gate[o][c]);
                    here.gate[o][c] = fmaf(w.gate[dy * 3 + 1][c], gv[c], here.gate[o][c]);
                    right.gate[o][c] = fmaf(w.gate[dy * 3 + 0][c], gv[c], right.gate[o][c]);
                }
            }
        }
        if (at - 1 < first || at > last) return;
        u16* target = out + (at - 1) * CHANNELS;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (r < rows) {
                const float(&h)[2] = left.hidden[r], (&g)[2] = left.gate[r];
                *(u32*)(target + r * WIDTH * CHANNELS) = pack(h[0] * silu(g[0]), h[1] * silu(g[1]));
            }
    }
};

extern "C" __global__ void __launch_bounds__(128)
depthwise_gate(u16* out, const u16* x, const float* weight, const float* bias, int batch, int height) {
    constexpr int pairs = CHANNELS / 2, spans = (WIDTH + SPAN - 1) / SPAN;
    int bands = (height + ROWS - 1) / ROWS;
    i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (i64)batch * bands * spans * pairs) return;
    int channel = (int)(index % pairs) * 2;
    int rest = (int)(index / pairs);
    Walk walk;
    walk.first = rest % spans * SPAN, walk.last = min(walk.first + SPAN, WIDTH);
    rest /= spans;
    int top = rest % bands * ROWS;
    i64 image = rest / bands;
    i64 row = image * height + top;
    walk.x = x + (row - 1) * X_ROW + channel, walk.out = out + row * WIDTH * CHANNELS + channel;
    walk.rows = height - top;
#pragma unroll
    for (int r = 0; r < ROWS + 2; ++r) walk.valid[r] = (u32)(top + r - 1) < (u32)height;
    Taps w;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        walk.bias_hidden[c] = bias[channel + c], walk.bias_gate[c] = bias[CHANNELS + channel + c];
#pragma unroll
        for (int t = 0; t < 9; ++t) {
            w.hidden[t][c] = weight[t * 2 * CHANNELS + channel + c];
            w.gate[t][c] = weight[t * 2 * CHANNELS + CHANNELS + channel + c];
        }
    }
    Sums a, b, c;
    walk.reset(a), walk.reset(b);
    Column now = walk.load(walk.first - 1), next;
#pragma unroll 1
    for (int at = walk.first - 1; at <= walk.last; at += 3) {
        next = walk.load(at + 1), walk.add(w, now, at, a, b, c);
        now = walk.load(at + 2), walk.add(w, next, at + 1, b, c, a);
        next = walk.load(at + 3), walk.add(w, now, at + 2, c, a, b);
        now = next;
    }
}
