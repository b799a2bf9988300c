// out = h * silu(g), where h and g are the halves of depthwise3x3(silu(x)) + bias, NHWC, zero padding.
//
// A thread owns two channels of each half and ROWS output rows, and walks SPAN columns to the right. Every input it loads is
// activated once and added to the three columns of sums that are in flight, so nothing is shared and nothing waits.

struct Sums {
    float hidden[ROWS][2], gate[ROWS][2];
};

DEVICE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

DEVICE void reset(Sums& s, const float (&hidden_bias)[2], const float (&gate_bias)[2]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) s.hidden[r][c] = hidden_bias[c], s.gate[r][c] = gate_bias[c];
}

extern "C" __global__ void __launch_bounds__(128)
depthwise_gate(u16* out, const u16* x, const float* weight, const float* bias, int batch, int height, int width, int channels) {
    int pairs = channels / 2, spans = (width + SPAN - 1) / SPAN, bands = (height + ROWS - 1) / ROWS;
    i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (i64)batch * bands * spans * pairs) return;
    int channel = (int)(index % pairs) * 2;
    i64 rest = index / pairs;
    int first = (int)(rest % spans) * SPAN;
    rest /= spans;
    int top = (int)(rest % bands) * ROWS;
    i64 image = rest / bands;

    float wh[9][2], wg[9][2];
#pragma unroll
    for (int t = 0; t < 9; ++t)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            wh[t][c] = weight[t * 2 * channels + channel + c];
            wg[t][c] = weight[t * 2 * channels + channels + channel + c];
        }
    float bh[2] = {bias[channel], bias[channel + 1]}, bg[2] = {bias[channels + channel], bias[channels + channel + 1]};

    // `left`, `here` and `right` are the sums of columns at - 1, at and at + 1 while column `at` is read.
    Sums left, here, right;
    reset(left, bh, bg), reset(here, bh, bg);
    int last = min(first + SPAN, width);
    const u16* base = x + image * height * width * 2 * channels + channel;
    for (int at = first - 1; at <= last; ++at) {
        reset(right, bh, bg);
        if (at >= 0 && at < width) {
            u32 h[ROWS + 2], g[ROWS + 2];
#pragma unroll
            for (int r = 0; r < ROWS + 2; ++r) {
                int y = top + r - 1;
                bool valid = y >= 0 && y < height;
                const u16* pixel = base + ((i64)(valid ? y : 0) * width + at) * 2 * channels;
                h[r] = valid ? __ldg((const u32*)pixel) : 0u;  // silu(0) = 0: padding after the activation
                g[r] = valid ? __ldg((const u32*)(pixel + channels)) : 0u;
            }
#pragma unroll
            for (int r = 0; r < ROWS + 2; ++r) {
                float hv[2] = {silu(low_float(h[r])), silu(high_float(h[r]))};
                float gv[2] = {silu(low_float(g[r])), silu(high_float(g[r]))};
#pragma unroll
                for (int dy = 0; dy < 3; ++dy) {
                    int o = r - dy;  // input row r is tap dy of output row o
                    if (o < 0 || o >= ROWS) continue;
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        left.hidden[o][c] = fmaf(wh[dy * 3 + 2][c], hv[c], left.hidden[o][c]);
                        here.hidden[o][c] = fmaf(wh[dy * 3 + 1][c], hv[c], here.hidden[o][c]);
                        right.hidden[o][c] = fmaf(wh[dy * 3 + 0][c], hv[c], right.hidden[o][c]);
                        left.gate[o][c] = fmaf(wg[dy * 3 + 2][c], gv[c], left.gate[o][c]);
                        here.gate[o][c] = fmaf(wg[dy * 3 + 1][c], gv[c], here.gate[o][c]);
                        right.gate[o][c] = fmaf(wg[dy * 3 + 0][c], gv[c], right.gate[o][c]);
                    }
                }
            }
        }
        if (at - 1 >= first) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (top + r < height) {
                    i64 target = ((image * height + top + r) * width + at - 1) * channels + channel;
                    *(u32*)(out + target) = pack(left.hidden[r][0] * silu(left.gate[r][0]), left.hidden[r][1] * silu(left.gate[r][1]));
                }
        }
        left = here, here = right;
    }
}
