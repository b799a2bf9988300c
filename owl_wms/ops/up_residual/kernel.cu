// The residual of a stage at full resolution, see residual.cuh.
//
// MODE 0: out = up2(low).  MODE 1: out = up2(low) + shuffle(shortcut).  MODE 2: out = base + shuffle(shortcut), in place
// allowed.
#if MODE == 2
extern "C" __global__ void __launch_bounds__(256)
up_residual(u16* out, const u16* base, const u16* shortcut, int batch, int height, int width, int channels, int shortcut_channels) {
    Item t;
    if (!locate(t, blockIdx.x, batch, height, width, channels)) return;
    i64 line = (i64)width * 2 * channels;
    i64 target = (((i64)t.batch * height + t.y) * 4 * width + 2 * t.x) * channels + t.channel;
    float sums[4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        uint2 v = *(const uint2*)(base + target + (q >> 1) * line + (q & 1) * channels);
        sums[q][0] = low_float(v.x), sums[q][1] = high_float(v.x), sums[q][2] = low_float(v.y), sums[q][3] = high_float(v.y);
    }
    const u16* pixel = shortcut + (((i64)t.batch * height + t.y) * width + t.x) * shortcut_channels;
    add_shortcut(sums, pixel, t.channel, shortcut_channels / 4);
#pragma unroll
    for (int q = 0; q < 4; ++q)
        store_global8(out + target + (q >> 1) * line + (q & 1) * channels, pack(sums[q][0], sums[q][1]), pack(sums[q][2], sums[q][3]));
}
#else
extern "C" __global__ void __launch_bounds__(128)
up_residual(u16* out, const u16* low, const u16* shortcut, int batch, int height, int width, int channels, int shortcut_channels) {
    enlarge_residual<MODE == 1>(blockIdx.x, out, low, shortcut, batch, height, width, channels, shortcut_channels);
}
#endif
