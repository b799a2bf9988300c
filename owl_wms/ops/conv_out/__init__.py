"""`owl_wms::conv_out`: the decoder's last convolution, SiLU on load, 3x3 to at most 8 channels, fp32 NHWC out.

Why it exists: a library convolution to 3 channels wastes most of its tile and wants a separate SiLU pass over the
largest tensor of the decoder. The kernel reads that tensor once and writes four floats a pixel.

Usage:
    y = conv_out(x, pack(weight), bias, silu=True)      # x [B, H, W, C] -> [B, H, W, 4 or 8] fp32; bias [4 or 8] fp32
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.gpu import shared_limit
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, define, dtype_defines, has_kernel, require
from owl_wms.ops.conv_out.reference import BLOCK, MAX_OUT, pack, padded, reference, unpack

__all__ = ["MAX_OUT", "conv_out", "kernel_of", "pack", "padded", "reference", "unpack"]

TILE_ROWS, TILE_W = (13, 4), 32


def kernel_of(dtype: torch.dtype, *, pad: int, blocks: int, silu: bool, rows: int = TILE_ROWS[0]) -> Kernel:
    """The variant for an element type, 4 or 8 outputs, `blocks` of 32 input channels, with or without SiLU, tiles of
    `rows` x 32 pixels.
    """
    defines = (f"PAD={pad}", f"TILE_H={rows}") + (("SILU",) if silu else ()) + dtype_defines(dtype)
    pixels = (rows + 2) * (TILE_W + 2)
    shared = pixels * 9 * pad * 4 + blocks * -(-9 * pad // 8) * 512
    return Kernel("conv_out", "conv_out", defines, shared)


def tile_rows(pad: int, blocks: int, limit: int) -> int:
    """Rows of the largest tile whose block stays within `limit` bytes of shared memory; 0 where none does."""
    sizes = {rows: kernel_of(torch.bfloat16, pad=pad, blocks=blocks, silu=False, rows=rows) for rows in TILE_ROWS}
    return next((rows for rows, kernel in sizes.items() if kernel.shared_bytes <= limit), 0)


def _run(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    if not has_kernel(x):
        return reference(x, weight, bias, silu)
    _check(x, weight, bias)
    # A module cast as a whole hands over a 16-bit bias; the kernel reads fp32.
    x, weight, bias = aligned(x), aligned(weight), bias.float()
    batch, height, width, channels = x.shape
    pad, blocks = bias.shape[0], weight.shape[0]
    rows = tile_rows(pad, blocks, shared_limit(x.device))
    if not rows:
        return reference(x, weight, bias, silu)
    out = x.new_empty(batch, height, width, pad, dtype=torch.float32)
    kernel_of(x.dtype, pad=pad, blocks=blocks, silu=silu, rows=rows).launch(
        x.device,
        grid=batch * -(-height // rows) * -(-width // TILE_W),
        block=256,
        arguments=(out, x, weight, bias, height, width, channels),
    )
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    channels, pad = x.shape[-1], bias.shape[0]
    require(channels % 8 == 0, lambda: f"conv_out wants a multiple of 8 channels, got {channels}")
    fits = pad in (4, 8) and weight.shape == (-(-channels // BLOCK), -(-9 * pad // 8), 32, 8)
    require(fits, lambda: f"conv_out: {channels} channels to {pad} do not fit weights {list(weight.shape)}")
    require(weight.dtype == x.dtype, lambda: f"conv_out: input {x.dtype}, weights {weight.dtype}")


def _fake(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    _check(x, weight, bias)
    batch, height, width, _ = x.shape
    return x.new_empty(batch, height, width, bias.shape[0], dtype=torch.float32)


conv_out = define(
    "conv_out(Tensor x, Tensor weight, Tensor bias, bool silu) -> Tensor", run=_run, fake=_fake, simpler=(reference,)
)
