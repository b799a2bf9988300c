// Depthwise 7x7, NHWC, padding 3, over [x, the frame before it]; FP16: element type.
//
// A thread has 8 x 4 pixels of two neighbouring channels; lanes lie along the channels, so a warp reads 128 bytes of a pixel.
// It walks down the ten input rows that its pixels see, fourteen pixels each, and adds every row to the output rows that see
// it. Threads of the second half of the channels read the frame before: of the first frame of a stream that is `past`.
#define ACROSS 8
#define DOWN 4
#define SIDE 7

extern "C" __global__ void __launch_bounds__(128)
frame_depthwise(u32* out, const u32* x, const u32* past, const float2* taps, int batch, int frames, int height, int width, int channels) {
    // Of x a pixel has channels / 2 words, of the result twice as many: one for each of `channels` threads.
    i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    int pair = (int)(thread % channels);
    i64 strip = thread / channels;
    int strips_across = (width + ACROSS - 1) / ACROSS, strips_down = (height + DOWN - 1) / DOWN;
    int left = (int)(strip % strips_across) * ACROSS;
    strip /= strips_across;
    int top = (int)(strip % strips_down) * DOWN;
    int image = (int)(strip / strips_down);
    if (image >= batch) return;

    int words = channels / 2, word = pair;
    const u32* source = x;
    int from = image;
    if (pair >= words) {
        word -= words;
        if (image % frames == 0) source = past, from = image / frames;
        else from = image - 1;
    }
    source += (i64)from * height * width * words + word;

    float2 sum[DOWN][ACROSS];
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) sum[i][j] = make_float2(0.f, 0.f);

#pragma unroll 1
    for (int r = 0; r < DOWN + SIDE - 1; ++r) {
        int y = top + r - SIDE / 2;
        if (y < 0 || y >= height) continue;
        float2 value[ACROSS + SIDE - 1];
#pragma unroll
        for (int j = 0; j < ACROSS + SIDE - 1; ++j) {
            int column = left + j - SIDE / 2;
            u32 both = column < 0 || column >= width ? 0u : __ldg(source + ((i64)y * width + column) * words);
            value[j] = make_float2(low_float(both), high_float(both));
        }
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
            int tap = r - i;
            if (tap < 0 || tap >= SIDE) continue;
#pragma unroll
            for (int k = 0; k < SIDE; ++k) {
                float2 weight = __ldg(taps + (i64)(tap * SIDE + k) * channels + pair);
#pragma unroll
                for (int j = 0; j < ACROSS; ++j) {
                    sum[i][j].x = fmaf(weight.x, value[j + k].x, sum[i][j].x);
                    sum[i][j].y = fmaf(weight.y, value[j + k].y, sum[i][j].y);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
#pragma unroll
        for (int j = 0; j < ACROSS; ++j)
            if (top + i < height && left + j < width)
                out[(((i64)image * height + top + i) * width + left + j) * channels + pair] = pack(sum[i][j].x, sum[i][j].y);
}
