"""`owl_wms::frame_depthwise`: depthwise 7x7 over a frame and the one before it, NHWC, without their concatenation.

Why it exists: libraries compute a 16-bit depthwise convolution of this size at a few percent of the memory's speed, and
the concatenation is a pass of its own. A thread keeps 8 x 4 pixels of two channels in registers and meets every input
row once; sums are fp32.

Usage:
    y = frame_depthwise(x, past, pack(weight))      # x [b n, H, W, C], past [b, H, W, C] -> [b n, H, W, 2 C]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, define, dtype_defines, has_kernel, require
from owl_wms.ops.frame_depthwise.reference import SIDE, pack, reference

__all__ = ["frame_depthwise", "kernel_of", "pack", "reference"]

ACROSS, DOWN = 8, 4  # pixels of a thread, as in kernel.cu
BLOCK = 128


def kernel_of(dtype: torch.dtype) -> Kernel:
    """The variant for an element type."""
    return Kernel("frame_depthwise", "frame_depthwise", dtype_defines(dtype))


def _run(x: Tensor, past: Tensor, taps: Tensor) -> Tensor:
    out = _fake(x, past, taps)
    if not has_kernel(x) or x.shape[-1] % 2:
        return reference(x, past, taps)
    require(taps.dtype == torch.float32 and past.dtype == x.dtype, lambda: f"got {taps.dtype}, {past.dtype}")
    if not out.numel():
        return out
    x, past, taps = aligned(x), aligned(past), aligned(taps)
    batch, height, width, channels = x.shape
    strips = batch * -(-height // DOWN) * -(-width // ACROSS)
    kernel_of(x.dtype).launch(
        x.device,
        grid=-(-strips * channels // BLOCK),
        block=BLOCK,
        arguments=(out, x, past, taps, batch, batch // len(past), height, width, channels),
    )
    return out


def _fake(x: Tensor, past: Tensor, taps: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    require(taps.shape[1] == 2 * channels, lambda: f"{channels} channels, weights for {taps.shape[1]}")
    require(taps.shape[0] == SIDE**2 and past.shape[1:] == x.shape[1:], lambda: f"past is {list(past.shape)}")
    require(batch % past.shape[0] == 0, lambda: f"{batch} frames of {past.shape[0]} streams")
    return x.new_empty(batch, height, width, 2 * channels)


frame_depthwise = define(
    "frame_depthwise(Tensor x, Tensor past, Tensor taps) -> Tensor", run=_run, fake=_fake, simpler=(reference,)
)
