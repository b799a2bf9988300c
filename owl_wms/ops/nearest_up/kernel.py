"""Triton kernel of `nearest_up`: the phases of the 2x2 convolution put in their places, with bias and shortcut.

Usage:
    u = launch(y, bias, x)     # y [B, H + 1, W + 1, 4 O], phases first; x [B, H, W, C] or None -> [B, 2H, 2W, O]
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def place_kernel(
    out_ptr, y_ptr, bias_ptr, x_ptr, height, width, channels, x_channels, repeats,
    HAS_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A program walks along one output row of 2 W O values.
    line = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < 2 * width * channels
    column = place // channels
    channel = place % channels
    i, j = line % 2, column % 2
    row = line // 2  # of all the images' small rows
    image, x = row // height, column // 2
    # With a padding of one, output (h, w) of the 2x2 convolution sees rows h - 1 and h: phase i wants h + i.
    pixel = (image * (height + 1) + row % height + i) * (width + 1) + x + j
    phase = i * 2 + j
    value = tl.load(y_ptr + pixel * (4 * channels) + phase * channels + channel, inside).to(tl.float32)
    value += tl.load(bias_ptr + channel, inside).to(tl.float32)
    if HAS_X:
        source = (row * width + x) * x_channels + (4 * channel + phase) // repeats
        value += tl.load(x_ptr + source, inside).to(tl.float32)
    tl.store(out_ptr + line * (2 * width * channels) + place, value.to(out_ptr.dtype.element_ty), inside)


def launch(y: Tensor, bias: Tensor, x: Tensor | None) -> Tensor:
    """The enlarged image of contiguous `y`."""
    batch, height, width = y.shape[0], y.shape[1] - 1, y.shape[2] - 1
    channels = y.shape[3] // 4
    out = y.new_empty(batch, 2 * height, 2 * width, channels)
    x_channels = 4 * channels if x is None else x.shape[-1]
    place_kernel[(batch * 2 * height, triton.cdiv(2 * width * channels, BLOCK))](
        out, y, bias, y if x is None else x, height, width, channels, x_channels, 4 * channels // x_channels,
        HAS_X=x is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out
