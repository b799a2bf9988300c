"""Descriptions of tensors for Hopper's tensor copy engine: kernels hand one over and name coordinates, not addresses.

Why it exists: the driver encodes them (`cuTensorMapEncodeTiled`, CUDA driver API, "Tensor Map Object Management"), so a
kernel launched from Python needs a call and 128 aligned bytes, and no header.

Usage:
    box = tensor_map(x, box=(1, 4, 66, 64))     # x [B, H, W, C]; for a `const __grid_constant__ TensorMap`
    kernel.launch(x.device, grid=132, block=384, arguments=(box, bias, 64))
"""

from __future__ import annotations

import ctypes
import itertools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from owl_wms.ops.common.driver import check_driver, driver, ensure_context

BYTES, ALIGNMENT = 128, 64  # CU_TENSOR_MAP_NUM_QWORDS of cuda.h, and what it asks for
FORMATS = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
NO_INTERLEAVE, SWIZZLE_128, PROMOTE_TO_256, ZEROS_OUTSIDE = 0, 3, 3, 0
SWIZZLED_BYTES = 128  # the innermost side of a box under this swizzle
LONGEST_SIDE = 256


@dataclass(frozen=True, slots=True)
class TensorMap:
    """An encoded tensor map; holds no reference to the tensor's memory.

    Args:
        memory: what `address` lies in.
        address: of 128 bytes, a multiple of 64.
    """

    memory: ctypes.Array[ctypes.c_char]
    address: int


def tensor_map(x: Tensor, box: tuple[int, ...]) -> TensorMap:
    """Boxes of contiguous 16-bit `x`, laid down in shared memory with the 128-byte swizzle; zeros beyond its borders.

    Args:
        x: two to five dimensions, the last of them a multiple of 8 elements.
        box: sides in the order of `x`'s dimensions, 1 to 256; the last is 64 elements.

    Raises:
        ValueError: `x` or `box` is none that this engine takes.
        KernelError: the driver refuses them.
    """
    fits = x.dtype in FORMATS and x.is_contiguous() and 2 <= x.dim() == len(box) <= 5 and x.shape[-1] % 8 == 0
    if not fits or box[-1] * x.element_size() != SWIZZLED_BYTES or not all(1 <= side <= LONGEST_SIDE for side in box):
        raise ValueError(f"no tensor map of {list(x.shape)} {x.dtype} in boxes {list(box)}")
    memory = ctypes.create_string_buffer(BYTES + ALIGNMENT)
    address = -(-ctypes.addressof(memory) // ALIGNMENT) * ALIGNMENT
    rank = x.dim()
    # The driver counts dimensions from the innermost; its stride is not asked for.
    sizes = (ctypes.c_uint64 * rank)(*reversed(x.shape))
    # Out of the sizes: the stride of a dimension of size 1 may be anything.
    steps_in_bytes = itertools.accumulate((x.shape[d] for d in range(rank - 1, 0, -1)), operator.mul)
    strides = (ctypes.c_uint64 * (rank - 1))(*(step * x.element_size() for step in steps_in_bytes))
    sides, steps = (ctypes.c_uint32 * rank)(*reversed(box)), (ctypes.c_uint32 * rank)(*(1,) * rank)
    if x.is_cuda:
        ensure_context(x.get_device())
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), FORMATS[x.dtype], rank, ctypes.c_void_p(x.data_ptr()), sizes, strides, sides, steps,
        NO_INTERLEAVE, SWIZZLE_128, PROMOTE_TO_256, ZEROS_OUTSIDE,
    )  # fmt: skip
    check_driver(status, f"describing {list(x.shape)} {x.dtype} in boxes {list(box)}")
    return TensorMap(memory, address)
