"""Triton kernels of `shuffle_add` and `shuffle_frames`: the result is written once, in order, and gathered from.

Usage:
    u = launch(y, x)                  # contiguous [B, H, W, 4 O] and [B, H, W, C] or None
    image = launch_frames(y, 3)       # contiguous [B, H, W, >= 12] -> [B, 3, 2H, 2W]
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def shuffle_kernel(
    out_ptr, y_ptr, x_ptr, width, channels, x_channels, repeats, HAS_X: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # A program walks along one output row of 2 W O values.
    line = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < 2 * width * channels
    column = place // channels
    channel = place % channels
    phase = (line % 2).to(tl.int32) * 2 + column % 2
    pixel = (line // 2) * width + column // 2
    value = tl.load(y_ptr + pixel * (4 * channels) + phase * channels + channel, inside).to(tl.float32)
    if HAS_X:
        value += tl.load(x_ptr + pixel * x_channels + (4 * channel + phase) // repeats, inside).to(tl.float32)
    tl.store(out_ptr + line * (2 * width * channels) + place, value.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def frames_kernel(out_ptr, y_ptr, height, width, channels, stored, BLOCK: tl.constexpr):
    # A program writes part of one row of one colour plane.
    line = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < 2 * width
    y = line % (2 * height)
    plane = line // (2 * height)
    batch, channel = plane // channels, plane % channels
    pixel = (batch * height + y // 2) * width + x // 2
    value = tl.load(y_ptr + pixel * stored + 4 * channel + (y % 2) * 2 + x % 2, inside)
    tl.store(out_ptr + line * (2 * width) + x, value, inside)


def launch(y: Tensor, x: Tensor | None) -> Tensor:
    """Shuffled `y` plus shuffled, repeated `x`."""
    batch, height, width, wide = y.shape
    channels = wide // 4
    out = y.new_empty(batch, 2 * height, 2 * width, channels)
    shortcut_channels = wide if x is None else x.shape[-1]
    shuffle_kernel[(batch * 2 * height, triton.cdiv(2 * width * channels, BLOCK))](
        out, y, y if x is None else x, width, channels, shortcut_channels, wide // shortcut_channels,
        HAS_X=x is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out


def launch_frames(y: Tensor, channels: int) -> Tensor:
    """The image `[B, channels, 2H, 2W]`."""
    batch, height, width, stored = y.shape
    out = y.new_empty(batch, channels, 2 * height, 2 * width)
    block = min(512, triton.next_power_of_2(2 * width))
    frames_kernel[(batch * channels * 2 * height, triton.cdiv(2 * width, block))](
        out, y, height, width, channels, stored, BLOCK=block, num_warps=4
    )
    return out
