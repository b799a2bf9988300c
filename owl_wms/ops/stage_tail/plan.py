"""Chooses the kernels of `stage_tail` that fit a stage, with their shared memory and grids.

Why its own module: everything here is arithmetic that can be tested without a GPU, and mirrors what the .cuh files say.

Usage:
    plan = plan_of(channels=96, shortcut=192)            # TailPlan, or None where no variant fits
    kernel = plan.projection(torch.bfloat16)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import dtype_defines
from owl_wms.ops.enlarging import BRANCH_BYTES, GROUP, HEADERS, LOW_COLUMNS, STRIP

# One block's limit on compute capability 9.0 (CUDA programming guide, "Technical specifications"); each block also
# takes 1 KiB that the system keeps.
SHARED_LIMIT = 227 * 1024
SHARED_PER_SM = 228 * 1024
SLOTS = 2
BOX = (2, 8, 64)  # rows, columns and channels that are fetched at a time where two kernels share the work


def padded(columns: int) -> int:
    """Columns of the matrix product that makes `columns`: those that `product` in hopper.cuh has."""
    return next(size for size in (32, 64, 96) if columns <= size)


@dataclass(frozen=True, slots=True)
class TailPlan:
    """A variant for one stage.

    Args:
        channels: width C of the stage; the hidden branch has 2 C.
        shortcut: channels of the shortcut, 0 without one.
        columns: output channels of one block.
        whole: one kernel for everything, or the hidden branch and the projection apart.
    """

    channels: int
    shortcut: int
    columns: int
    whole: bool

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a projecting block, as project.cuh and kernel.cu lay it out."""
        blocks = -(-2 * self.channels // 64)
        slots, weights = SLOTS * blocks * 64 * 128, blocks * padded(self.columns) * 128
        low = 7 * LOW_COLUMNS * (2 * self.columns + 16)
        shortcut = 2 * (STRIP // 2) * ((2 * self.shortcut + 95) // 128 * 128 + 32) if self.shortcut else 0
        branch = 2 * self.channels // GROUP * BRANCH_BYTES if self.whole else 0
        return slots + weights + low + shortcut + branch + 2 * SLOTS * 8

    @property
    def threads(self) -> int:
        """Threads of a projecting block."""
        return 32 * (4 + (2 * self.channels // GROUP if self.whole else 1))

    def projection(self, dtype: torch.dtype) -> Kernel:
        """The kernel that writes the output: all of it where `whole`."""
        defines = (
            f"MODE={0 if self.whole else 2}",
            f"WIDE={2 * self.channels}",
            f"CHANNELS={self.channels}",
            f"COLUMNS_OUT={self.columns}",
            f"PADDED={padded(self.columns)}",
            f"SHORTCUT={self.shortcut}",
            f"SLOTS={SLOTS}",
        )
        headers = HEADERS if self.whole else ("common/tensor_copies.cuh", *HEADERS)
        return Kernel("stage_tail", "stage_tail", defines + dtype_defines(dtype), self.shared_bytes, headers, "a")


@functools.cache
def plan_of(channels: int, shortcut: int, whole: bool | None = None) -> TailPlan | None:
    """The variant for a stage, or None where none fits.

    Args:
        channels: width C.
        shortcut: channels of the shortcut, 0 without one.
        whole: insist on one kernel (True) or two (False); None takes one where it fits.
    """
    if channels % GROUP or shortcut % 8 or (shortcut and 4 * channels % shortcut):
        return None
    if whole is not False and channels <= 96:
        plan = TailPlan(channels, shortcut, channels, True)
        if plan.shared_bytes <= SHARED_LIMIT:
            return plan
    if whole is True:
        return None
    for columns in range(96, 0, -GROUP):
        plan = TailPlan(channels, shortcut, columns, False)
        if channels % columns == 0 and plan.shared_bytes <= SHARED_LIMIT:
            return plan
    return None


def blocks_at_once(shared_bytes: int, threads: int, processors: int) -> int:
    """Blocks that the card holds at a time, at 128 registers a thread."""
    return processors * max(1, min(SHARED_PER_SM // (shared_bytes + 1024), 65536 // (128 * threads)))
