// Last convolution, NHWC: (SiLU,) 3x3 to PAD <= 8 channels, fp32 out [B, H, W, PAD].
//
// A 3x3 convolution to few channels is one product with [C, 9 * PAD] per pixel and nine shifted adds. A block makes the
// products of a tile of pixels with its halo, keeps them in shared memory in fp32, and adds them up. Inputs go from global
// memory straight into tensor-core fragments: a thread's 16 bytes are channels 8t..8t+7, and the packed weights are
// permuted to match; SiLU is applied in registers, in fp32. PAD is 4 or 8, TILES = 9 * PAD / 8 rounded up.
// TILE_H: 13 where a block may have the memory (15 x 34 pixels with the halo: sixteen sets of 32, two for each warp), else 4.
#define TILE_W 32
#define SPAN (TILE_W + 2)
#define PIXELS ((TILE_H + 2) * SPAN)
#define COLUMNS (9 * PAD)
#define TILES ((COLUMNS + 7) / 8)
#define THREADS 256

DEVICE u32 activate2(u32 pair) {
#ifdef SILU
    return pack(silu(low_float(pair)), silu(high_float(pair)));
#else
    return pair;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, PAD == 4 ? 2 : 1)
conv_out(float* out, const u16* x, const uint4* packed, const float* bias, int height, int width, int channels) {
    extern __shared__ __align__(128) unsigned char memory[];
    float* products = (float*)memory;                                       // [PIXELS][COLUMNS]
    uint4* weights = (uint4*)(memory + PIXELS * COLUMNS * sizeof(float));  // [channels / 32][TILES][lane]
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int blocks = (channels + 31) / 32, columns = (width + TILE_W - 1) / TILE_W, rows = (height + TILE_H - 1) / TILE_H;
    int x0 = blockIdx.x % columns * TILE_W, y0 = blockIdx.x / columns % rows * TILE_H, batch = blockIdx.x / columns / rows;
    for (int i = threadIdx.x; i < blocks * TILES * 32; i += THREADS) weights[i] = packed[i];
    __syncthreads();

    const u16* image = x + (i64)batch * height * width * channels;
    int first = (lane & 3) * 8;
    for (int set = warp; set < (PIXELS + 31) / 32; set += THREADS / 32) {  // 32 pixels: two fragments of 16
        const u16* source[4];
        bool valid[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int pixel = set * 32 + i * 8 + (lane >> 2), py = y0 - 1 + pixel / SPAN, px = x0 - 1 + pixel % SPAN;
            valid[i] = pixel < PIXELS && py >= 0 && py < height && px >= 0 && px < width;
            source[i] = image + (valid[i] ? ((i64)py * width + px) * channels : 0) + first;
        }
        float sums[2][TILES][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.f;
        uint4 next[4];
        auto fetch = [&](int block) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                next[i] = valid[i] && block * 32 + first < channels ? __ldg((const uint4*)(source[i] + block * 32)) : make_uint4(0, 0, 0, 0);
        };
        fetch(0);
        for (int block = 0; block < blocks; ++block) {
            u32 v[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                v[i][0] = next[i].x, v[i][1] = next[i].y, v[i][2] = next[i].z, v[i][3] = next[i].w;
            if (block + 1 < blocks) fetch(block + 1);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) v[i][j] = activate2(v[i][j]);
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                uint4 b = weights[(block * TILES + n) * 32 + lane];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    u32 a0[4] = {v[2 * m][0], v[2 * m + 1][0], v[2 * m][1], v[2 * m + 1][1]};
                    u32 a1[4] = {v[2 * m][2], v[2 * m + 1][2], v[2 * m][3], v[2 * m + 1][3]};
                    mma(sums[m][n], a0, b.x, b.y);
                    mma(sums[m][n], a1, b.z, b.w);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int pixel = set * 32 + i * 8 + (lane >> 2);
            if (pixel < PIXELS) {
#pragma unroll
                for (int n = 0; n < TILES; ++n) {
                    int column = n * 8 + (lane & 3) * 2;
                    if (column < COLUMNS)
                        *(float2*)(products + pixel * COLUMNS + column) = make_float2(sums[i >> 1][n][(i & 1) * 2], sums[i >> 1][n][(i & 1) * 2 + 1]);
                }
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE_H * TILE_W; i += THREADS) {
        int dy = i / TILE_W, dx = i % TILE_W;
        if (y0 + dy >= height || x0 + dx >= width) continue;
        float* target = out + (((i64)batch * height + y0 + dy) * width + x0 + dx) * PAD;
#pragma unroll
        for (int part = 0; part < PAD / 4; ++part) {
            float4 sum = *(const float4*)(bias + part * 4);
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) {
                float4 v = *(const float4*)(products + ((dy + tap / 3) * SPAN + dx + tap % 3) * COLUMNS + tap * PAD + part * 4);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            *(float4*)(target + part * 4) = sum;
        }
    }
}
