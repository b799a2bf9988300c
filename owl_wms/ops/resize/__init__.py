"""`owl_wms::resize` and `owl_wms::frames`: the decoder's last step, fp32 NHWC to the frame size, in one pass.

Why it exists: torch's bicubic kernel is slow, and layout, precision and (for frames) the mapping to uint8 would be
passes of their own.

Usage:
    x = resize(y, 3, 360, 640, torch.bfloat16)      # y [B, 512, 512, 4] fp32 -> [B, 3, 360, 640]
    u = frames(y, 3, 360, 640)                      # -> [B, 360, 640, 3] uint8
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import KERNEL_DTYPES, define
from owl_wms.ops.resize.reference import frames_reference, reference

__all__ = ["frames", "frames_reference", "kernel_of", "reference", "resize"]


def kernel_of(dtype: torch.dtype, *, pad: int) -> Kernel:
    """The variant for an output type (uint8: frames) and 4 or 8 stored input channels."""
    kind = {torch.float16: ("FP16",), torch.uint8: ("FRAMES",)}.get(dtype, ())
    return Kernel("resize", "resize", (f"PAD={pad}", *kind))


def _launch(out: Tensor, x: Tensor, channels: int, height: int, width: int) -> Tensor:
    x = x.contiguous()
    batch, low_height, low_width, pad = x.shape
    kernel_of(out.dtype, pad=pad).launch(
        x.device,
        grid=-(-batch * height * width // 256),
        block=256,
        arguments=(out, x, batch, channels, low_height, low_width, height, width),
    )
    return out


def _run(x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    if not x.is_cuda or dtype not in KERNEL_DTYPES:
        return reference(x, channels, height, width, dtype)
    return _launch(_fake(x, channels, height, width, dtype), x, channels, height, width)


def _run_frames(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    if not x.is_cuda:
        return frames_reference(x, channels, height, width)
    return _launch(_fake_frames(x, channels, height, width), x, channels, height, width)


def _fake(x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    torch._check(x.dtype == torch.float32 and x.shape[-1] in (4, 8), lambda: "resize wants fp32 with 4 or 8 channels")
    return x.new_empty(x.shape[0], channels, height, width, dtype=dtype)


def _fake_frames(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    torch._check(x.dtype == torch.float32 and x.shape[-1] in (4, 8), lambda: "frames wants fp32 with 4 or 8 channels")
    return x.new_empty(x.shape[0], height, width, channels, dtype=torch.uint8)


resize = define(
    "resize(Tensor x, int channels, int height, int width, ScalarType dtype) -> Tensor", run=_run, fake=_fake
)
frames = define("frames(Tensor x, int channels, int height, int width) -> Tensor", run=_run_frames, fake=_fake_frames)
