// Final resize: fp32 NHWC (PAD channels, the first `channels` used) to any size, bicubic as PyTorch computes it (a = -0.75,
// half-pixel centres, borders clamped). Writes NCHW in the element type. Equal sizes give weights (0, 1, 0, 0), that is an
// exact layout change.
DEVICE void weights_of(float (&w)[4], float t) {
    const float a = -0.75f;
    float u = t + 1.f, v = 1.f - t, s = 2.f - t;
    w[0] = ((a * u - 5.f * a) * u + 8.f * a) * u - 4.f * a;
    w[1] = ((a + 2.f) * t - (a + 3.f)) * t * t + 1.f;
    w[2] = ((a + 2.f) * v - (a + 3.f)) * v * v + 1.f;
    w[3] = ((a * s - 5.f * a) * s + 8.f * a) * s - 4.f * a;
}

extern "C" __global__ void __launch_bounds__(256)
resize(void* out, const float* x, int batch, int channels, int low_height, int low_width, int height, int width) {
    i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (i64)batch * height * width) return;
    int column = (int)(index % width), row = (int)(index / width % height), image = (int)(index / width / height);
    float fy = (float)low_height / height * (row + 0.5f) - 0.5f, fx = (float)low_width / width * (column + 0.5f) - 0.5f;
    int iy = (int)floorf(fy), ix = (int)floorf(fx);
    float wy[4], wx[4];
    weights_of(wy, fy - iy);
    weights_of(wx, fx - ix);
#pragma unroll
    for (int part = 0; part < PAD / 4; ++part) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* line = x + ((i64)image * low_height + clamp(iy - 1 + i, 0, low_height - 1)) * low_width * PAD + part * 4;
            float4 across = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float4 v = __ldg((const float4*)(line + (i64)clamp(ix - 1 + j, 0, low_width - 1) * PAD));
                across.x = fmaf(wx[j], v.x, across.x), across.y = fmaf(wx[j], v.y, across.y);
                across.z = fmaf(wx[j], v.z, across.z), across.w = fmaf(wx[j], v.w, across.w);
            }
            sum.x = fmaf(wy[i], across.x, sum.x), sum.y = fmaf(wy[i], across.y, sum.y);
            sum.z = fmaf(wy[i], across.z, sum.z), sum.w = fmaf(wy[i], across.w, sum.w);
        }
        float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            int channel = part * 4 + c;
            if (channel >= channels) break;
            ((u16*)out)[(((i64)image * channels + channel) * height + row) * width + column] = (u16)pack(values[c], 0.f);
        }
    }
}
