"""`owl_wms::grouped_conv`: the middle of a residual block, `leaky(conv3x3_groups_of_16(leaky(x)) + bias)`, NHWC.

Why it exists: libraries run groups of 16 at a fraction of memory speed and cannot fuse LeakyReLU on both sides nor the
bicubic enlargement in front. The kernel is bound by reading x and writing the result once.

Usage:
    y = grouped_conv(x, pack(weight), bias, up2=True)      # x [B, h, w, C] -> [B, 2h, 2w, C]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops import enlarging
from owl_wms.ops.codes import DEFINES
from owl_wms.ops.common.gpu import processors
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, define, dtype_defines, has_kernel, require
from owl_wms.ops.grouped_conv.reference import GROUP, enlarge, pack, reference, unpack

__all__ = ["enlarge", "grid_of", "grouped_conv", "kernel_of", "launch", "pack", "reference", "unpack"]

STRIP = 32
CHANNELS_PER_BLOCK = 64
ROW_BYTES = (STRIP + 2) * 128
DIRECT_SHARED = 3 * 4 * ROW_BYTES
UP2_SHARED = 16 * 24 * 128
# Rows a block walks: long enough to pay for the two halo rows, short enough for several waves of blocks.
ROW_CHOICES = (128, 64, 32, 16)
BLOCKS_PER_PROCESSOR = 8


def kernel_of(dtype: torch.dtype, up2: bool, codes: torch.dtype | None = None) -> Kernel:
    """The variant for an element type, with or without the enlargement, with 8-bit codes for a result where asked."""
    defines = ("BYTES=2", *dtype_defines(dtype), *(("UP2",) if up2 else ()))
    defines += () if codes is None else DEFINES[codes]
    shared = UP2_SHARED if up2 else DIRECT_SHARED
    return Kernel("grouped_conv", "grouped_conv", defines, shared, ("common/strip.cuh",))


def grid_of(batch: int, height: int, width: int, slices: int, processors: int) -> tuple[int, int]:
    """`(blocks, rows a block walks)` for an output of that size whose channels make `slices` of 128 bytes."""
    columns = batch * -(-width // STRIP) * slices
    rows = next(
        (rows for rows in ROW_CHOICES if columns * -(-height // rows) >= BLOCKS_PER_PROCESSOR * processors),
        ROW_CHOICES[-1],
    )
    return columns * -(-height // rows), rows


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    up2: bool,
    codes: torch.dtype | None = None,
    gain: Tensor | None = None,
    by_warps: bool = True,
) -> Tensor:
    """The kernel on a 16-bit CUDA tensor; `codes` makes the result 8-bit (see grouped_conv8), and then wants `gain`.

    With `up2`, `by_warps` chooses the kernel whose warps enlarge for themselves, which is the faster one.
    """
    _check(x, weight, bias)
    # A module cast as a whole hands over a 16-bit bias; the kernel reads fp32.
    x, bias = aligned(x), bias.float()
    batch, height, width, channels = x.shape
    if up2 and by_warps and enlarging.suits(x):
        return enlarging.launch(x, aligned(weight), bias.contiguous(), codes, gain)
    if up2:
        height, width = 2 * height, 2 * width
    out = x.new_empty(batch, height, width, channels, dtype=codes or x.dtype)
    blocks, rows = grid_of(batch, height, width, -(-channels // CHANNELS_PER_BLOCK), processors(x.device))
    kernel_of(x.dtype, up2, codes).launch(
        x.device,
        grid=blocks,
        block=256,
        arguments=(out, x, aligned(weight), bias, gain, height, width, channels, rows),
    )
    return out


def _run(x: Tensor, weight: Tensor, bias: Tensor, up2: bool) -> Tensor:
    return launch(x, weight, bias, up2) if has_kernel(x) else reference(x, weight, bias, up2)


def _by_strips(x: Tensor, weight: Tensor, bias: Tensor, up2: bool) -> Tensor:
    return launch(x, weight, bias, up2, by_warps=False) if has_kernel(x) else reference(x, weight, bias, up2)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    channels = x.shape[-1]
    fits = weight.shape == (channels // GROUP, 9, 32, 8) and bias.shape == (channels,) and channels % GROUP == 0
    require(fits, lambda: f"grouped_conv: {channels} channels do not fit weights {list(weight.shape)}")
    require(weight.dtype == x.dtype, lambda: f"grouped_conv: input {x.dtype}, weights {weight.dtype}")


def _fake(x: Tensor, weight: Tensor, bias: Tensor, up2: bool) -> Tensor:
    _check(x, weight, bias)
    batch, height, width, channels = x.shape
    return x.new_empty(batch, height * (2 if up2 else 1), width * (2 if up2 else 1), channels)


grouped_conv = define(
    "grouped_conv(Tensor x, Tensor weight, Tensor bias, bool up2) -> Tensor",
    run=_run,
    fake=_fake,
    simpler=(_by_strips, reference),
)
