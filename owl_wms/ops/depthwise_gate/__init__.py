"""`owl_wms::depthwise_gate`: SiLU, depthwise 3x3, bias and the SiLU gate of a gated convolution in one pass, NHWC.

Why it exists: written out these are four passes over the widest tensor of an EfficientViT block, and TensorRT for RTX
has no bf16 kernel for the depthwise convolution at all. The kernel asks for its input 1.6 to 1.7 times.

Usage:
    y = depthwise_gate(x, pack(weight), bias)     # x [B, H, W, 2K] before its SiLU; bias fp32 -> [B, H, W, K]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import define, dtype_defines, has_kernel, require
from owl_wms.ops.depthwise_gate.reference import pack, reference

__all__ = ["depthwise_gate", "kernel_of", "pack", "reference"]

ROWS = 4
SPANS = (64, 32)  # columns that a thread walks: the longer, which reads less twice, where that leaves enough threads
ENOUGH_THREADS = 1 << 16
BLOCK = 128


def kernel_of(dtype: torch.dtype, channels: int, width: int, span: int) -> Kernel:
    """The variant for an element type, channels of the result, the width of an image and the columns of a thread."""
    defines = (f"ROWS={ROWS}", f"SPAN={span}", f"CHANNELS={channels}", f"WIDTH={width}", *dtype_defines(dtype))
    return Kernel("depthwise_gate", "depthwise_gate", defines)


def _run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not has_kernel(x):
        return reference(x, weight, bias)
    x = x.contiguous()
    batch, height, width, channels = x.shape
    out = x.new_empty(batch, height, width, channels // 2)
    for span in SPANS:
        threads = batch * -(-height // ROWS) * -(-width // span) * (channels // 4)
        if threads >= ENOUGH_THREADS:
            break
    kernel_of(x.dtype, channels // 2, width, span).launch(
        x.device,
        grid=-(-threads // BLOCK),
        block=BLOCK,
        arguments=(out, x, weight, bias, batch, height),
    )
    return out


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    require(x.shape[-1] == weight.shape[1], lambda: f"{x.shape[-1]} channels, weights for {weight.shape[1]}")
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


depthwise_gate = define(
    "depthwise_gate(Tensor x, Tensor weight, Tensor bias) -> Tensor", run=_run, fake=_fake, simpler=(reference,)
)
