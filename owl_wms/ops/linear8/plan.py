"""Chooses the variant of `linear8`'s CUDA kernel that fits a product, with its shared memory and grid.

Why its own module: everything here is arithmetic that can be tested without a GPU, and mirrors what rings.cuh says.

Usage:
    plan = plan_of(depth=512, channels=256, adds=True, codes=True, shortcut=0)      # ProductPlan, or None: Triton's
    kernel = plan.kernel(torch.int8, torch.bfloat16)
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from owl_wms.ops.codes import DEFINES
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import dtype_defines

# One block's limit on compute capability 9.0 (CUDA programming guide, "Technical specifications").
SHARED_LIMIT = 227 * 1024
THREADS = 384
TILE = 64
SEGMENT = TILE // 2
HEADERS = ("common/hopper.cuh", "common/hopper8.cuh", "linear8/rings.cuh")
# Registers of a thread that weights may take: two blocks' sums (64) and the epilogue share its 232 with them.
WEIGHT_REGISTERS = 128
# Slots of the two rings, the best first: pixels wait for memory in the one, results in the other.
SLOTS = ((4, 3), (3, 3), (3, 2), (2, 3), (2, 2))
# Depth and channels of the products that this kernel measured faster in (docs/log.md). Deeper ones do not fit.
PAYS = frozenset({(256, 512), (512, 256), (512, 1024), (1024, 512), (1024, 2048)})


def _pitch(size: int) -> int:
    return -(-size // 128) * 128 + 16


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """A variant for one product.

    Args:
        depth: codes a pixel has.
        channels: results a pixel gets.
        adds: whether they are added to a residual.
        codes: whether codes are written; without `adds` they are.
        shortcut: channels of the shortcut, 0 without one.
        blocks: 64-channel blocks that each of the two multiplying warpgroups holds the weights of.
        x_slots: tiles of pixels in shared memory.
        out_slots: tiles of results.
    """

    depth: int
    channels: int
    adds: bool
    codes: bool
    shortcut: int
    blocks: int
    x_slots: int
    out_slots: int

    @property
    def slices(self) -> int:
        """Blocks of the grid that share a tile of pixels."""
        return -(-self.channels // (128 * self.blocks))

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, as rings.cuh lays it out."""
        columns = min(self.channels, 128 * self.blocks)
        x = -(-self.depth // 128) * TILE * 128
        out = TILE * _pitch(2 * columns) * self.adds + TILE * _pitch(columns) * self.codes
        if self.shortcut:
            out += 16 * (-(-8 * min(columns, self.shortcut // 4) // 128) * 128 + 32)
        table, barriers = 128 * self.blocks * 8, 8 * (2 * self.x_slots + 3 * self.out_slots)
        return self.x_slots * x + self.out_slots * out + table + barriers

    def kernel(self, codes: torch.dtype, dtype: torch.dtype) -> Kernel:
        """The variant for a format of codes and an element type of the residual."""
        defines = (
            f"ADDS={self.adds:d}",
            f"DEPTH={self.depth}",
            f"CHANNELS={self.channels}",
            f"CODES={self.codes:d}",
            f"SHORTCUT={self.shortcut}",
            f"BLOCKS={self.blocks}",
            f"X_SLOTS={self.x_slots}",
            f"OUT_SLOTS={self.out_slots}",
            *DEFINES[codes],
            *(dtype_defines(dtype) if self.adds else ()),
        )
        return Kernel("linear8", "linear8", defines, self.shared_bytes, HEADERS, "a")

    def tiles_of_image(self, height: int, width: int) -> int:
        """Tiles of 64 pixels that cover an image; with a shortcut 32 columns of two rows each."""
        return height // 2 * -(-width // SEGMENT) if self.shortcut else -(-height * width // TILE)

    def grid(self, tiles: int, processors: int) -> int:
        """Blocks for so many tiles: one a multiprocessor, a multiple of `slices`."""
        return self.slices * min(tiles, max(1, processors // self.slices))


@functools.cache
def fitting(depth: int, channels: int, adds: bool, codes: bool, shortcut: int) -> ProductPlan | None:
    """The plan of a product, or None where none fits shared memory and registers; arguments are `ProductPlan`'s."""
    if depth % 16 or channels % 16 or not (adds or codes):
        return None
    registers = 4 * -(-depth // 32)  # of a block of 64 channels
    for blocks, (x_slots, out_slots) in itertools.product((4, 2, 1), SLOTS):
        if blocks * registers > WEIGHT_REGISTERS or (blocks > 1 and 64 * blocks >= channels):
            continue
        plan = ProductPlan(depth, channels, adds, codes, shortcut, blocks, x_slots, out_slots)
        if plan.shared_bytes <= SHARED_LIMIT and _shortcut_fits(plan):
            return plan
    return None


def _shortcut_fits(plan: ProductPlan) -> bool:
    if not plan.shortcut:
        return True
    quarter, columns = plan.shortcut // 4, min(plan.channels, 128 * plan.blocks)
    # Copies take eight channels of the shortcut, and a block's channels must not straddle two of its copies.
    even = plan.shortcut % 64 == 0 and plan.channels % quarter == 0
    return even and (columns % quarter == 0 or quarter % columns == 0) and plan.adds and not plan.codes


def plan_of(depth: int, channels: int, adds: bool, codes: bool, shortcut: int) -> ProductPlan | None:
    """The variant to use for a product on compute capability 9.0, or None where Triton's kernel is; see `fitting`."""
    return fitting(depth, channels, adds, codes, shortcut) if (depth, channels) in PAYS else None
