// Frames to bytes: NCHW in the element type to uint8 NHWC, round((clamp(x, -1, 1) + 1) * 127.5), half to even. fmaxf
// returns its other argument for a not-a-number, which makes that -1, black. `pixels` (height * width) is a multiple of
// four: a thread reads four neighbouring pixels of every channel and writes their 4 * CHANNELS bytes as words.
DEVICE u32 level(float value) {
    return (u32)__float2int_rn(__fmul_rn(__fadd_rn(fminf(fmaxf(value, -1.f), 1.f), 1.f), 127.5f));
}

extern "C" __global__ void __launch_bounds__(256)
frame_bytes(u32* out, const u16* x, int batch, int pixels) {
    i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    int quads = pixels / 4;
    if (index >= (i64)batch * quads) return;
    i64 image = index / quads, quad = index % quads;
    u32 words[CHANNELS];
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) words[i] = 0u;
#pragma unroll
    for (int channel = 0; channel < CHANNELS; ++channel) {
        uint2 pairs = __ldg((const uint2*)(x + (image * CHANNELS + channel) * pixels) + quad);
        float values[4] = {low_float(pairs.x), high_float(pairs.x), low_float(pairs.y), high_float(pairs.y)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int place = i * CHANNELS + channel;
            words[place / 4] |= level(values[i]) << (place % 4 * 8);
        }
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) out[index * CHANNELS + i] = words[i];
}
