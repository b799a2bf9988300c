"""The rest of a residual block at full size once its first product is done, NHWC, in place.

    u += w3 leaky(conv3x3_groups_of_16(leaky(hidden)) + b2)

Why it exists: as two kernels, the hidden branch (twice as wide as the block) is written and read once between the
grouped convolution and the back-projection, half of what both move; here it stays in the multiprocessor. The kernel
needs compute capability 9.0 and a width of 256; everything else takes `parts_`.

Usage:
    add_branch_(u, hidden, w2, b2, w3)
    # u [B, H, W, C] contiguous; hidden [B, H, W, 2C]; w2 packed as grouped_conv wants it [2C / 16, 9, 32, 8]; b2 [2C]
    # fp32; w3 [C, 2C]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.gpu import is_hopper, processors
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, dtype_defines, first_that_runs, has_kernel, require
from owl_wms.ops.common.tensor_maps import tensor_map
from owl_wms.ops.grouped_conv import grouped_conv

__all__ = ["add_branch_", "fits", "kernel_of", "launch_", "parts_", "pays"]

HEADERS = ("common/hopper.cuh", "common/tensor_copies.cuh", "common/cluster.cuh")
# As in kernel.cu: width, a tile, channels of a chunk; blocks that share weights, slots.
CHANNELS, ROWS, COLUMNS, DEPTH = 256, 8, 16, 64
CLUSTER = 2
THREADS = 512
TAP_LINES = 4 * 9 * 4  # of 64 values, for the four groups of a chunk
SLOTS = {"X": 3, "T": 2, "W": 2, "H": 3}
SLOT_BYTES = {"X": 23 * 1024, "T": TAP_LINES * 128, "W": CHANNELS * 128, "H": ROWS * COLUMNS * 128}
# Whether `stage` uses the kernel where it fits; decided by measurement, here only. Not measured yet.
PAYS = False


def kernel_of(dtype: torch.dtype, wide: int, cluster: int = CLUSTER) -> Kernel:
    """The variant for an element type and width of the hidden branch."""
    defines = (f"WIDE={wide}", f"CLUSTER={cluster}", *(f"{name}_SLOTS={count}" for name, count in SLOTS.items()))
    shared = sum(count * (SLOT_BYTES[name] + 2 * 8) for name, count in SLOTS.items())
    return Kernel("block_tail", "block_tail", defines + dtype_defines(dtype), shared, HEADERS, "a")


def fits(u: Tensor, hidden: Tensor) -> bool:
    """Returns whether the kernel takes these: capability 9.0, 16 bits, 256 channels, `u` contiguous and aligned."""
    in_place = u.is_contiguous() and u.data_ptr() % 16 == 0
    return (
        has_kernel(u) and is_hopper(u.device) and in_place and u.shape[-1] == CHANNELS and hidden.shape[-1] % DEPTH == 0
    )


def pays(u: Tensor, hidden: Tensor) -> bool:
    """Returns whether `add_branch_` uses the kernel rather than the parts."""
    return PAYS and fits(u, hidden)


def add_branch_(u: Tensor, hidden: Tensor, w2: Tensor, b2: Tensor, w3: Tensor) -> Tensor:
    """Adds the branch to `u` and returns it; arguments as in the module's docstring."""
    ways = (launch_, parts_) if pays(u, hidden) else (parts_,)
    return first_that_runs("block_tail", ways, u, hidden, w2, b2, w3)


def parts_(u: Tensor, hidden: Tensor, w2: Tensor, b2: Tensor, w3: Tensor) -> Tensor:
    """Computes the same by `grouped_conv` and a library product that accumulates in place."""
    branch = grouped_conv(hidden, w2, b2, False)
    u.view(-1, u.shape[-1]).addmm_(branch.view(-1, branch.shape[-1]), w3.t())
    return u


def launch_(u: Tensor, hidden: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, cluster: int = CLUSTER) -> Tensor:
    """The kernel, where `fits`.

    Raises:
        RuntimeError: shapes or types that do not belong together.
        KernelError: compilation, loading or launching failed.
    """
    batch, height, width, channels = u.shape
    wide = hidden.shape[-1]
    shapes = (batch, height, width, wide), (wide // 16, 9, 32, 8), (wide,), (CHANNELS, wide)
    alike = channels == CHANNELS and tuple(tuple(x.shape) for x in (hidden, w2, b2, w3)) == shapes
    require(
        alike and {x.dtype for x in (hidden, w2, w3)} == {u.dtype},
        lambda: f"block_tail: {[(list(x.shape), x.dtype) for x in (u, hidden, w2, b2, w3)]} do not belong together",
    )
    if not u.numel():
        return u
    # Named, so that a copy lives until the launch is queued; after that the allocator's order of streams keeps it.
    hidden, w2, w3, bias = aligned(hidden), aligned(w2), aligned(w3), aligned(b2.float())
    down, across = -(-height // ROWS), -(-width // COLUMNS)
    tiles = batch * down * across
    # Channel 32 q + 8 t + 2 j + e as q, j, t, e: see kernel.cu.
    permuted = w3.view(CHANNELS // 32, 4, 4, 2, wide).transpose(1, 2)
    kernel_of(u.dtype, wide, cluster).launch(
        u.device,
        grid=min(-(-tiles // cluster), processors(u.device) // cluster) * cluster,
        block=THREADS,
        arguments=(
            u,
            tensor_map(hidden, (1, ROWS + 2, COLUMNS + 2, DEPTH)),
            tensor_map(w2.view(-1, DEPTH), (TAP_LINES // cluster, DEPTH)),
            tensor_map(permuted, (CHANNELS // 32 // cluster, 4, 4, 2, DEPTH)),
            bias,
            tiles, down, across, height, width,
        ),
    )  # fmt: skip
    return u
