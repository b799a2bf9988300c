"""The two products of a narrow stage before it enlarges, in one kernel for compute capability 9.0.

    low = x proj^T,  hidden = low w1^T + b1

Why it exists: on the last stages of a decoder both are bound by memory, and as two products of a library `low` is
written and read again between them. Values are those of the two products apart: `low` is rounded before it is used.

Usage:
    if fits(x, proj, w1):
        low, hidden = launch(x, proj, w1, b1)
        # x [B, h, w, 2C]; proj [C, 2C]; w1 [2C, C]; b1 [2C]; all of one 16-bit dtype -> [B, h, w, C], [B, h, w, 2C]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.gpu import is_hopper, processors
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, dtype_defines, has_kernel
from owl_wms.ops.common.tensor_maps import tensor_map

__all__ = ["fits", "kernel_of", "launch"]

ROWS, DEPTH = 64, 64  # of a box
GROUPS = 2
THREADS = 128 * GROUPS + 32
# C, columns of one or two products in hopper.cuh. Up to 96 a block holds both matrices, beyond it they pass through it.
WIDTHS, HELD = (32, 64, 96, 128, 192), 96
SLOTS = {True: 2, False: 3}  # of a ring: tiles of x where the matrices are held, pieces of the matrices where not
HEADERS = ("common/hopper.cuh", "common/tensor_copies.cuh")


def fits(x: Tensor, proj: Tensor, w1: Tensor) -> bool:
    """Returns whether the kernel runs on these: shapes as above, C of `WIDTHS`, 16 bits, compute capability 9.0."""
    channels = proj.shape[0]
    shapes = channels in WIDTHS and proj.shape[1] == 2 * channels and w1.shape == (2 * channels, channels)
    return shapes and has_kernel(x) and is_hopper(x.device) and x.dtype == proj.dtype == w1.dtype


def kernel_of(dtype: torch.dtype, channels: int) -> Kernel:
    """The variant for an element type and C."""
    held = channels <= HELD
    slots = SLOTS[held]
    defines = (f"CHANNELS={channels}", f"DEPTH={2 * channels}", f"SLOTS={slots}", *dtype_defines(dtype))
    defines += () if held else (f"HALF={channels // 2}",)
    x_pieces, low_pieces = 2 * channels // DEPTH, -(-channels // DEPTH)
    matrices = (x_pieces + 2 * low_pieces if held else slots) * channels * 128
    tiles = GROUPS * ((slots if held else 1) * x_pieces + low_pieces) * ROWS * 128
    barriers = (2 * GROUPS * slots + 1 if held else 2 * slots + 2 * GROUPS) * 8
    return Kernel("stage_products", "stage_products", defines, matrices + tiles + barriers, HEADERS, "a")


def launch(x: Tensor, proj: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """`(low, hidden)` of tensors that fit; `b1` is taken in the dtype of the others."""
    x, proj, w1, b1 = aligned(x), aligned(proj), aligned(w1), aligned(b1.to(x.dtype))
    channels, rows = proj.shape[0], x.numel() // x.shape[-1]
    low, hidden = x.new_empty(*x.shape[:-1], channels), x.new_empty(*x.shape[:-1], 2 * channels)
    if not rows:
        return low, hidden
    # Groups take single tiles in turn where the matrices are held, and go through them together where not.
    tiles, tile = -(-rows // (ROWS if channels <= HELD else GROUPS * ROWS)), (ROWS, DEPTH)
    kernel_of(x.dtype, channels).launch(
        x.device,
        grid=min(tiles, processors(x.device)),
        block=THREADS,
        arguments=(
            tensor_map(x.view(rows, -1), tile),
            tensor_map(proj, (channels, DEPTH)),
            tensor_map(w1, (2 * channels if channels <= HELD else channels, DEPTH)),
            tensor_map(low.view(rows, -1), tile),
            tensor_map(hidden.view(rows, -1), tile),
            b1,
            tiles,
        ),
    )
    return low, hidden
