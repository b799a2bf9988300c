"""`owl_wms::frame_bytes`: decoded frames to the bytes of files, pages and logs, in one pass over memory.

Why after the program and not inside it: a program's output is compared with the fp32 decoder's and searched for
values that are not finite. Bytes hide both. The pass costs what the copy into the output tensor costs anyway.

Usage:
    u = frame_bytes(x)      # x [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.nvrtc import Kernel, compile_ahead
from owl_wms.ops.common.register import KERNEL_DTYPES, aligned, define, dtype_defines, has_kernel
from owl_wms.ops.frame_bytes.reference import reference

__all__ = ["compile_soon", "frame_bytes", "kernel_of", "reference"]

_THREADS = 256
_MOST_CHANNELS = 8  # a thread holds the bytes of four pixels in registers


def kernel_of(dtype: torch.dtype, channels: int) -> Kernel:
    """Returns the variant for a 16-bit element type and 1 to 8 channels."""
    return Kernel("frame_bytes", "frame_bytes", (f"CHANNELS={channels}", *dtype_defines(dtype)))


def compile_soon(dtype: torch.dtype | None, channels: int, device: torch.device) -> None:
    """Compiles in another thread what frames of that kind will need, if they will need a kernel."""
    if device.type == "cuda" and dtype is not None and dtype in KERNEL_DTYPES and channels <= _MOST_CHANNELS:
        index = torch.cuda.current_device() if device.index is None else device.index
        compile_ahead([kernel_of(dtype, channels)], index)


def _run(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    pixels = height * width
    if not has_kernel(x) or channels > _MOST_CHANNELS or pixels % 4 or x.numel() == 0:
        return reference(x)
    x, out = aligned(x), _fake(x)
    grid = -(-batch * pixels // (4 * _THREADS))
    kernel_of(x.dtype, channels).launch(x.device, grid=grid, block=_THREADS, arguments=(out, x, batch, pixels))
    return out


def _fake(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty(batch, height, width, channels, dtype=torch.uint8)


frame_bytes = define("frame_bytes(Tensor x) -> Tensor", run=_run, fake=_fake, simpler=(reference,))
