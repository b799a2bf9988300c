"""Both enlargements of a stage in one launch: its residual, and the grouped convolution behind its hidden branch.

Why it exists: on small images either leaves most of the card idle, so one launch does both in the time of the longer.
Blocks of the residual (`up_residual`) are spread among those of the branch (`enlarging`). Where the residual fills the
card by itself, one launch is slower than two (H200: `dist` at batch 8 2.72 instead of 2.62 ms, at batch 1 0.425 instead
of 0.430), since its blocks then share a multiprocessor with those that compute; `suits` says where it is worth it.

Usage:
    if suits(low, hidden):
        base, branch = launch(low, shortcut, hidden, packed, bias)
        # base as up_residual(low, shortcut), branch as grouped_conv(hidden, packed, bias, True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops import enlarging
from owl_wms.ops.common.gpu import processors
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, dtype_defines
from owl_wms.ops.enlarging import BLOCKS, BRANCH_BYTES, HEADERS, WARPS, grid_of
from owl_wms.ops.up_residual import HEADER, blocks_of


def kernel_of(dtype: torch.dtype, channels: int, shortcut: bool) -> Kernel:
    """The variant for an element type, a hidden branch of `channels`, and a residual with or without a shortcut."""
    defines = ("MODE=1", f"WIDE={channels}", f"RESIDUAL={int(shortcut)}", *dtype_defines(dtype))
    return Kernel("stage_tail", "stage_tail", defines, WARPS * BRANCH_BYTES, (HEADER, *HEADERS))


def suits(low: Tensor, hidden: Tensor) -> bool:
    """Tell if one launch is quicker: the kernel takes their shapes, and the residual needs few of the card's places."""
    return enlarging.suits(hidden) and blocks_of(low) <= BLOCKS * processors(low.device) // 4


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
    residuals = blocks_of(low)
    # They take the places of as many blocks of the branch, which at least one must keep.
    blocks, rows = grid_of(hidden, max(1, BLOCKS * processors(low.device) - residuals))
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
