"""`owl_wms::grouped_conv`: the middle of a residual block, `leaky(conv3x3_groups_of_16(leaky(x)) + bias)`, NHWC.

Why it exists: libraries run groups of 16 at a fraction of memory speed and cannot fuse LeakyReLU on both sides nor the
bicubic enlargement in front. The kernel is bound by reading x and writing the result once.

Usage:
    y = grouped_conv(x, pack(weight), bias, up2=True)      # x [B, h, w, C] -> [B, 2h, 2w, C]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.grouped_conv.reference import GROUP, enlarge, pack, reference, unpack
from owl_wms.ops.nvrtc import Kernel
from owl_wms.ops.register import define, has_kernel

__all__ = ["enlarge", "grouped_conv", "kernel_of", "pack", "reference", "unpack"]

STRIP = 32
CHANNELS_PER_BLOCK = 64
ROW_BYTES = (STRIP + 2) * 128
DIRECT_SHARED = 3 * 4 * ROW_BYTES
UP2_SHARED = 16 * 24 * 128
# Rows a block walks: long enough to pay for the two halo rows, short enough for several waves of blocks.
ROW_CHOICES = (128, 64, 32, 16)
ENOUGH_BLOCKS = 8 * 132


def kernel_of(dtype: torch.dtype, up2: bool) -> Kernel:
    """The variant for an element type, with or without the enlargement."""
    defines = (("FP16",) if dtype == torch.float16 else ()) + (("UP2",) if up2 else ())
    return Kernel("grouped_conv", "grouped_conv", defines, UP2_SHARED if up2 else DIRECT_SHARED)


def _run(x: Tensor, weight: Tensor, bias: Tensor, up2: bool) -> Tensor:
    if not has_kernel(x):
        return reference(x, weight, bias, up2)
    _check(x, weight, bias)
    # A module cast as a whole hands over a 16-bit bias; the kernel reads fp32.
    x, bias = x.contiguous(), bias.float()
    batch, height, width, channels = x.shape
    if up2:
        height, width = 2 * height, 2 * width
    out = x.new_empty(batch, height, width, channels)
    columns = batch * -(-width // STRIP) * -(-channels // CHANNELS_PER_BLOCK)
    rows = next((rows for rows in ROW_CHOICES if columns * -(-height // rows) >= ENOUGH_BLOCKS), ROW_CHOICES[-1])
    kernel_of(x.dtype, up2).launch(
        x.device,
        grid=columns * -(-height // rows),
        block=256,
        arguments=(out, x, weight, bias, height, width, channels, rows),
    )
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    channels = x.shape[-1]
    fits = weight.shape == (channels // GROUP, 9, 32, 8) and bias.shape == (channels,) and channels % GROUP == 0
    torch._check(fits, lambda: f"grouped_conv: {channels} channels do not fit weights {list(weight.shape)}")
    torch._check(weight.dtype == x.dtype, lambda: f"grouped_conv: input {x.dtype}, weights {weight.dtype}")


def _fake(x: Tensor, weight: Tensor, bias: Tensor, up2: bool) -> Tensor:
    _check(x, weight, bias)
    batch, height, width, channels = x.shape
    return x.new_empty(batch, height * (2 if up2 else 1), width * (2 if up2 else 1), channels)


grouped_conv = define("grouped_conv(Tensor x, Tensor weight, Tensor bias, bool up2) -> Tensor", run=_run, fake=_fake)
