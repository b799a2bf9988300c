"""Both enlargements of a stage in one launch: its residual, and the grouped convolution behind its hidden branch.

Why it exists: on small images either leaves most of the card idle, and on large ones the residual waits for memory
while the branch computes. Blocks of the residual (`up_residual`) are spread among those of the branch (`enlarging`).

Usage:
    if enlarging.suits(hidden):
        base, branch = launch(low, shortcut, hidden, packed, bias)
        # base as up_residual(low, shortcut), branch as grouped_conv(hidden, packed, bias, True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.gpu import processors
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, dtype_defines
from owl_wms.ops.enlarging import BLOCKS, BRANCH_BYTES, HEADERS, WARPS, grid_of
from owl_wms.ops.up_residual import HEADER, blocks_of


def kernel_of(dtype: torch.dtype, channels: int, shortcut: bool) -> Kernel:
    """The variant for an element type, a hidden branch of `channels`, and a residual with or without a shortcut."""
    defines = ("MODE=1", f"WIDE={channels}", f"RESIDUAL={int(shortcut)}", *dtype_defines(dtype))
    return Kernel("stage_tail", "stage_tail", defines, WARPS * BRANCH_BYTES, (HEADER, *HEADERS))


def launch(low: Tensor, shortcut: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The residual `[B, 2h, 2w, C]` and the branch `[B, 2h, 2w, 2C]` in one launch, bit for bit as apart.

    Args:
        low: `[B, h, w, C]`, 16-bit, on a GPU.
        shortcut: `[B, h, w, Cs]` in the same dtype, 4 C a multiple of Cs, or None.
        hidden: `[B, h, w, 2C]` in the same dtype.
        weight: packed as grouped_conv wants it.
        bias: fp32 `[2C]`.
    """
    low, hidden, weight, bias = aligned(low), aligned(hidden), aligned(weight), bias.float().contiguous()
    shortcut = None if shortcut is None else aligned(shortcut)
    batch, height, width, channels = low.shape
    base = low.new_empty(batch, 2 * height, 2 * width, channels)
    branch = low.new_empty(batch, 2 * height, 2 * width, 2 * channels)
    if not base.numel():
        return base, branch
    residuals, at_once = blocks_of(low), BLOCKS * processors(low.device)
    # A few blocks of the residual take the places of as many of the branch's; many are a wave of their own anyway.
    blocks, rows = grid_of(hidden, at_once - residuals if residuals <= at_once // 4 else at_once)
    shortcut_channels = 0 if shortcut is None else shortcut.shape[-1]
    kernel_of(low.dtype, 2 * channels, shortcut is not None).launch(
        low.device,
        grid=blocks + residuals,
        block=32 * WARPS,
        arguments=(
            *(branch, hidden, weight, bias, base, low, shortcut),
            *(height, width, rows, batch, shortcut_channels, residuals),
        ),
    )
    return base, branch
