"""The grouped convolution behind a bicubic enlargement, one warp per group of 16 channels.

Why beside `grouped_conv`'s own kernel: that one enlarges three times, once for each horizontal tap, and runs anywhere;
this one enlarges once, into the warp's own shared memory, and measured a quarter faster on an H100 (docs/log.md). It
is `stage_tail`'s hidden branch by itself; `enlarging_both` launches it together with the residual.

Usage:
    if suits(x):
        y = launch(x, packed, bias, None, None)          # x [B, h, w, C] -> [B, 2h, 2w, C]; arguments as grouped_conv's
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from owl_wms.ops.codes import DEFINES
from owl_wms.ops.common.gpu import processors
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import dtype_defines

GROUP, STRIP = 16, 32
LOW_COLUMNS = STRIP // 2 + 4
BRANCH_BYTES = 6 * LOW_COLUMNS * 32 + 4 * (STRIP + 2) * 32  # of one warp: low rows, two pairs of enlarged rows
# As in kernel.cu: warps a block, blocks a multiprocessor.
WARPS, BLOCKS = 4, 3
CODES_BYTES = 2 * 2 * STRIP * GROUP * WARPS  # of a block: two steps' codes on their way out
# Steps that a block spends on filling its rings and on the rows above and below its band.
BAND_OVERHEAD = 3
HEADERS = ("common/hopper.cuh", "stage_tail/branch.cuh", "stage_tail/project.cuh")


def suits(x: Tensor) -> bool:
    """Returns whether the kernel can take `x`, a 16-bit CUDA tensor."""
    return x.shape[-1] % GROUP == 0


def kernel_of(dtype: torch.dtype, channels: int, codes: torch.dtype | None = None) -> Kernel:
    """The variant for an element type and width, with 8-bit codes for a result where asked."""
    defines = ("MODE=1", f"WIDE={channels}", *dtype_defines(dtype))
    defines += () if codes is None else DEFINES[codes]
    shared = WARPS * BRANCH_BYTES + (0 if codes is None else CODES_BYTES)
    return Kernel("stage_tail", "stage_tail", defines, shared, HEADERS)


def launch(x: Tensor, weight: Tensor, bias: Tensor, codes: torch.dtype | None, gain: Tensor | None) -> Tensor:
    """The kernel on contiguous 16-bit `x [B, h, w, C]` at an address of a multiple of 16 bytes; bias fp32."""
    batch, height, width, channels = x.shape
    out = x.new_empty(batch, 2 * height, 2 * width, channels, dtype=codes or x.dtype)
    if not out.numel():
        return out
    blocks, rows = grid_of(x, BLOCKS * processors(x.device))
    kernel_of(x.dtype, channels, codes).launch(
        x.device,
        grid=blocks,
        block=32 * WARPS,
        arguments=(out, x, weight, bias, gain, None, None, height, width, rows),
    )
    return out


def grid_of(x: Tensor, at_once: int) -> tuple[int, int]:
    """`(blocks, low rows a block walks)` of the branch for `x [B, h, w, C]`; the card holds `at_once` of its blocks."""
    batch, height, width, channels = x.shape
    columns = batch * -(-2 * width // STRIP) * -(-channels // (GROUP * WARPS))
    rows = rows_of_band(height, columns, at_once)
    return columns * -(-height // rows), rows


@functools.cache
def rows_of_band(height: int, columns: int, at_once: int) -> int:
    """Low rows a block walks down: as many as keep the number of steps least.

    Args:
        height: low rows of the image.
        columns: blocks side by side, over the whole batch.
        at_once: blocks that the card holds.
    """

    def steps(rows: int) -> int:
        return -(-columns * -(-height // rows) // at_once) * (rows + BAND_OVERHEAD)

    return min((-(-height // bands) for bands in range(1, min(height, 64) + 1)), key=steps)
