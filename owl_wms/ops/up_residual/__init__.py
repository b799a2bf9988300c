"""`owl_wms::up_residual`: what a stage adds its branches to, bicubic x2 plus the pixel-shuffled shortcut, NHWC.

Why it exists: torch's bicubic kernel runs at a few percent of memory speed, and enlargement, pixel shuffle, tiling and
addition are four passes over the largest tensor of a stage. The kernel is one, bound by writing its result.

Usage:
    u = up_residual(low, shortcut)     # low [B, h, w, C], shortcut [B, h, w, Cs] with 4 C a multiple of Cs, or None
    add_shortcut_(u, shortcut)         # the same shortcut added later, in place
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, define, dtype_defines, first_that_runs, has_kernel, require
from owl_wms.ops.up_residual.reference import reference, shuffle

__all__ = ["add_shortcut_", "kernel_of", "reference", "shuffle", "up_residual"]

BAND, THREADS = 8, 128  # as in residual.cuh
HEADER = "up_residual/residual.cuh"
UP, UP_AND_SHORTCUT, SHORTCUT = 0, 1, 2


def kernel_of(dtype: torch.dtype, mode: int) -> Kernel:
    """The variant for an element type: UP, UP_AND_SHORTCUT or SHORTCUT (in place)."""
    return Kernel("up_residual", "up_residual", (f"MODE={mode}", *dtype_defines(dtype)), headers=(HEADER,))


def blocks_of(low: Tensor) -> int:
    """Blocks that enlarge `low [B, h, w, C]`."""
    batch, height, width, channels = low.shape
    return -(-batch * -(-height // BAND) * width * (channels // 4) // THREADS)


def _run(low: Tensor, shortcut: Tensor | None) -> Tensor:
    if not has_kernel(low):
        return reference(low, shortcut)
    check(low, shortcut)
    low = aligned(low)
    batch, height, width, channels = low.shape
    out = low.new_empty(batch, 2 * height, 2 * width, channels)
    mode = UP if shortcut is None else UP_AND_SHORTCUT
    tail = (batch, height, width, channels, 0 if shortcut is None else shortcut.shape[-1])
    kernel_of(low.dtype, mode).launch(
        low.device,
        grid=blocks_of(low),
        block=THREADS,
        arguments=(out, low, None if shortcut is None else aligned(shortcut), *tail),
    )
    return out


def add_shortcut_(base: Tensor, shortcut: Tensor) -> Tensor:
    """Adds the shuffled `shortcut [B, h, w, Cs]` to `base [B, 2h, 2w, C]` in place; base must be contiguous."""
    ways = (_add_by_kernel_, _add_by_torch_) if has_kernel(base) else (_add_by_torch_,)
    return first_that_runs("up_residual", ways, base, shortcut)


def _add_by_torch_(base: Tensor, shortcut: Tensor) -> Tensor:
    return base.add_(shuffle(shortcut, base.shape[-1]))


def _add_by_kernel_(base: Tensor, shortcut: Tensor) -> Tensor:
    batch, height, width, shortcut_channels = shortcut.shape
    threads = batch * height * width * (base.shape[-1] // 4)
    kernel_of(base.dtype, SHORTCUT).launch(
        base.device,
        grid=-(-threads // 256),
        block=256,
        arguments=(base, base, aligned(shortcut), batch, height, width, base.shape[-1], shortcut_channels),
    )
    return base


def check(low: Tensor, shortcut: Tensor | None) -> None:
    """Raises RuntimeError where `shortcut` does not fit `low`."""
    channels = low.shape[-1]
    require(channels % 4 == 0, lambda: f"up_residual wants a multiple of 4 channels, got {channels}")
    if shortcut is not None:
        fits = shortcut.shape[:3] == low.shape[:3] and 4 * channels % shortcut.shape[-1] == 0
        require(fits, lambda: f"up_residual: shortcut {list(shortcut.shape)} beside {list(low.shape)}")
        require(shortcut.dtype == low.dtype, lambda: f"up_residual: {low.dtype} and {shortcut.dtype}")


def _fake(low: Tensor, shortcut: Tensor | None) -> Tensor:
    check(low, shortcut)
    batch, height, width, channels = low.shape
    return low.new_empty(batch, 2 * height, 2 * width, channels)


up_residual = define("up_residual(Tensor low, Tensor? shortcut) -> Tensor", run=_run, fake=_fake, simpler=(reference,))
