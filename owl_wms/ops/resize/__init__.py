"""`owl_wms::resize`: the decoder's last step, fp32 NHWC to the frame size, in one pass.

Why it exists: torch's bicubic kernel is slow, and layout and precision would be passes of their own.

Usage:
    x = resize(y, 3, 360, 640, torch.bfloat16)      # y [B, 512, 512, 4] fp32 -> [B, 3, 360, 640]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import define, dtype_defines, has_kernel, require
from owl_wms.ops.resize.reference import reference

__all__ = ["kernel_of", "reference", "resize"]


def kernel_of(dtype: torch.dtype, *, pad: int) -> Kernel:
    """The variant for an output type and 4 or 8 stored input channels."""
    return Kernel("resize", "resize", (f"PAD={pad}", *dtype_defines(dtype)))


def _run(x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    if not has_kernel(x, dtype):
        return reference(x, channels, height, width, dtype)
    x, out = x.contiguous(), _fake(x, channels, height, width, dtype)
    batch, low_height, low_width, pad = x.shape
    kernel_of(dtype, pad=pad).launch(
        x.device,
        grid=-(-batch * height * width // 256),
        block=256,
        arguments=(out, x, batch, channels, low_height, low_width, height, width),
    )
    return out


def _fake(x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    require(x.dtype == torch.float32 and x.shape[-1] in (4, 8), lambda: "resize wants fp32 with 4 or 8 channels")
    return x.new_empty(x.shape[0], channels, height, width, dtype=dtype)


resize = define(
    "resize(Tensor x, int channels, int height, int width, ScalarType dtype) -> Tensor",
    run=_run,
    fake=_fake,
    simpler=(reference,),
)
