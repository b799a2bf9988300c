// What a stage adds its branches to: bicubic x2 of `low`, plus the pixel-shuffled, channel-tiled shortcut, NHWC. A kernel of
// its own (kernel.cu), and blocks of stage_tail's branch kernel.
//
// Memory-bound: a thread owns one low-resolution pixel column and four channels, walks down BAND rows and keeps the five
// horizontally enlarged rows it needs in registers, so each input is widened once. Sums in fp32, rounded once.
#define BAND 8

struct Item {
    int batch, y, x, channel;
};

DEVICE bool locate(Item& item, i64 block, int batch, int bands, int width, int channels) {
    i64 index = block * blockDim.x + threadIdx.x;
    int quads = channels / 4;
    if (index >= (i64)batch * bands * width * quads) return false;
    i64 pixel = index / quads;
    item.channel = (int)(index - pixel * quads) * 4;
    i64 line = pixel / width;
    item.x = (int)(pixel - line * width);
    item.batch = (int)(line / bands);
    item.y = (int)(line - (i64)item.batch * bands);
    return true;
}

// Adds the 2 x 2 patch of the shortcut: channel c takes channel c % quarter of the shuffled image, whose four phases lie
// side by side in the unshuffled one. `sums[phase][channel]`.
DEVICE void add_shortcut(float (&sums)[4][4], const u16* pixel, int channel, int quarter_channels) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        uint2 v = __ldg((const uint2*)(pixel + 4 * ((channel + c) % quarter_channels)));
        sums[0][c] += low_float(v.x), sums[1][c] += high_float(v.x);
        sums[2][c] += low_float(v.y), sums[3][c] += high_float(v.y);
    }
}

// out = up2(low), with the shortcut added where SHUFFLED, by block `block` of as many as the items need.
template <bool SHUFFLED>
DEVICE void enlarge_residual(i64 block, u16* out, const u16* low, const u16* shortcut, int batch, int height, int width, int channels, int shortcut_channels) {
    Item t;
    if (!locate(t, block, batch, (height + BAND - 1) / BAND, width, channels)) return;
    int offset[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) offset[i] = clamp(t.x + i - 2, 0, width - 1) * channels + t.channel;
    const u16* image = low + (i64)t.batch * height * width * channels;
    float rows[5][2][4];  // [row of the window][left or right column][channel]
    auto widen = [&](int y) {
        const u16* row = image + (i64)clamp(y, 0, height - 1) * width * channels;
        float v[5][4];
#pragma unroll
        for (int i = 0; i < 5; ++i) {
            uint2 p = __ldg((const uint2*)(row + offset[i]));
            v[i][0] = low_float(p.x), v[i][1] = high_float(p.x), v[i][2] = low_float(p.y), v[i][3] = high_float(p.y);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            rows[4][0][c] = three_quarters(v[0][c], v[1][c], v[2][c], v[3][c]);
            rows[4][1][c] = quarter(v[1][c], v[2][c], v[3][c], v[4][c]);
        }
    };
    auto roll = [&]() {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) rows[j][0][c] = rows[j + 1][0][c], rows[j][1][c] = rows[j + 1][1][c];
    };
    int y0 = t.y * BAND, y1 = min(y0 + BAND, height);
#pragma unroll
    for (int j = -2; j < 2; ++j) {
        widen(y0 + j);
        roll();
    }
    i64 line = (i64)width * 2 * channels;
    u16* target = out + (((i64)t.batch * height + y0) * 4 * width + 2 * t.x) * channels + t.channel;
    const u16* pixel = SHUFFLED ? shortcut + (((i64)t.batch * height + y0) * width + t.x) * shortcut_channels : nullptr;
#pragma unroll 2
    for (int y = y0; y < y1; ++y) {
        widen(y + 2);
        float sums[4][4];
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                sums[side][c] = three_quarters(rows[0][side][c], rows[1][side][c], rows[2][side][c], rows[3][side][c]);
                sums[2 + side][c] = quarter(rows[1][side][c], rows[2][side][c], rows[3][side][c], rows[4][side][c]);
            }
        if (SHUFFLED) {
            add_shortcut(sums, pixel, t.channel, shortcut_channels / 4);
            pixel += (i64)width * shortcut_channels;
        }
#pragma unroll
        for (int q = 0; q < 4; ++q)
            store_global8(target + (q >> 1) * line + (q & 1) * channels, pack(sums[q][0], sums[q][1]), pack(sums[q][2], sums[q][3]));
        target += 2 * line;
        roll();
    }
}
