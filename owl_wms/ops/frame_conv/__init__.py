"""`owl_wms::frame_conv`, `enlarge_conv` and `picture_conv`: the 3x3 convolutions of a streaming decoder, NHWC.

Why they exist: TAEHV's blocks see the frame before the current one, double the image and the number of frames, and end
in a pixel shuffle. Written out, the concatenation with the earlier frame, the enlarged image, the frames in the order
of time, the residual and the clamp are each a pass over the largest tensors. Here they are where a convolution reads
or writes.

`how` is one of LIBRARY (cuDNN), LIBRARY_FUSED (cuDNN with bias and ReLU in its own epilogue; only without a residual),
RESIDENT and RESIDENT_64 (our kernel with tiles of 128 and 64 channels). The fastest is measured during a build.

Usage:
    y = frame_conv(x, past, pack(weight), bias, None, LIBRARY)                    # [b n, H, W, C] -> [b n, H, W, O]
    y = enlarge_conv(x, pack_enlarging(grow, weight), 2, False, LIBRARY)          # -> [b n 2, 2H, 2W, O]
    frames = picture_conv(x, *pack_picture(weight, bias), 2, False, LIBRARY)      # -> [b n, 3, 2H, 2W] in [0, 1]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms import cudnn
from owl_wms.ops.common.gpu import is_hopper
from owl_wms.ops.common.register import define, has_kernel, require
from owl_wms.ops.conv3x3 import LIBRARY, LIBRARY_FUSED, RESIDENT
from owl_wms.ops.conv3x3.reference import pack
from owl_wms.ops.frame_conv import kernel
from owl_wms.ops.frame_conv.reference import (
    COLOURS,
    enlarge_reference,
    frame_reference,
    grown,
    pack_enlarging,
    pack_picture,
    picture_reference,
    previous,
)

__all__ = [
    "LIBRARY", "LIBRARY_FUSED", "RESIDENT", "RESIDENT_64",
    "enlarge_conv", "enlarge_reference", "enlarge_ways", "frame_conv", "frame_reference", "frame_ways", "grown", "pack",
    "pack_enlarging", "pack_picture", "picture_conv", "picture_reference", "picture_ways",
]  # fmt: skip

RESIDENT_64 = -5
COLUMNS = {RESIDENT: 128, RESIDENT_64: 64}


def frame_ways(x: Tensor, past: Tensor | None, weight: Tensor, residual: Tensor | None) -> list[int]:
    """Returns every value of `how` that computes this `frame_conv` on `x`'s device."""
    if not has_kernel(x):
        return [LIBRARY]
    ours = [how for how, columns in COLUMNS.items() if kernel.fits_frame(x, past, weight, columns)]
    fused = [LIBRARY_FUSED] if residual is None else []
    return [LIBRARY, *fused, *(ours if is_hopper(x.device) else [])]


def enlarge_ways(x: Tensor, weight: Tensor, frames: int) -> list[int]:
    """Returns every `how` that can compute `enlarge_conv` for this shape."""
    if not has_kernel(x) or not is_hopper(x.device):
        return [LIBRARY]
    return [LIBRARY, *(how for how, columns in COLUMNS.items() if kernel.fits_enlarge(x, weight, frames, columns))]


def picture_ways(x: Tensor, weight: Tensor, patch: int) -> list[int]:
    """Returns every `how` that can compute `picture_conv` for this shape."""
    ours = has_kernel(x) and is_hopper(x.device) and kernel.fits_picture(x, weight, patch)
    return [LIBRARY, RESIDENT] if ours else [LIBRARY]


def _run_frame(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None, how: int
) -> Tensor:
    if not has_kernel(x):
        return frame_reference(x, past, weight, bias, residual)
    if how in COLUMNS:
        return kernel.launch_frame(x, past, weight, bias, residual, COLUMNS[how])
    rows = x.contiguous() if past is None else torch.cat([x, previous(x, past)], -1)
    image, taps = rows.permute(0, 3, 1, 2), weight.contiguous().permute(0, 3, 1, 2)
    residual = None if residual is None else residual.contiguous()
    if how == LIBRARY_FUSED and residual is None:
        own = None if bias is None else bias.to(x.dtype)
        return cudnn.convolution_relu(image, taps, own).permute(0, 2, 3, 1).contiguous()
    from owl_wms.ops.conv3x3.kernel import finish_

    y = cudnn.convolution(image, taps).permute(0, 2, 3, 1).contiguous()
    return finish_(y, bias, residual, False, relu_last=True)


def _frame_by_library(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None, how: int
) -> Tensor:
    return _run_frame(x, past, weight, bias, residual, LIBRARY)


def _frame_by_torch(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None, how: int
) -> Tensor:
    return frame_reference(x, past, weight, bias, residual)


def _fake_frame(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None, how: int
) -> Tensor:
    inputs = x.shape[-1] * (1 if past is None else 2)
    require(inputs == weight.shape[-1], lambda: f"{inputs} channels, weights for {weight.shape[-1]}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _run_enlarge(x: Tensor, weight: Tensor, frames: int, relu: bool, how: int) -> Tensor:
    if has_kernel(x) and how in COLUMNS:
        return kernel.launch_enlarge(x, weight, frames, relu, COLUMNS[how])
    return enlarge_reference(x, weight, frames, relu)


def _enlarge_by_torch(x: Tensor, weight: Tensor, frames: int, relu: bool, how: int) -> Tensor:
    return enlarge_reference(x, weight, frames, relu)


def _fake_enlarge(x: Tensor, weight: Tensor, frames: int, relu: bool, how: int) -> Tensor:
    batch, height, width, channels = x.shape
    require(channels == weight.shape[-1], lambda: f"{channels} channels, weights for {weight.shape[-1]}")
    return x.new_empty(batch * frames, 2 * height, 2 * width, weight.shape[0] // (4 * frames))


def _run_picture(x: Tensor, weight: Tensor, bias: Tensor, patch: int, as_bytes: bool, how: int) -> Tensor:
    if has_kernel(x) and how in COLUMNS:
        return kernel.launch_picture(x, weight, bias.float(), patch, as_bytes)
    return picture_reference(x, weight, bias, patch, as_bytes)


def _picture_by_torch(x: Tensor, weight: Tensor, bias: Tensor, patch: int, as_bytes: bool, how: int) -> Tensor:
    return picture_reference(x, weight, bias, patch, as_bytes)


def _fake_picture(x: Tensor, weight: Tensor, bias: Tensor, patch: int, as_bytes: bool, how: int) -> Tensor:
    batch, height, width, channels = x.shape
    require(channels == weight.shape[-1], lambda: f"{channels} channels, weights for {weight.shape[-1]}")
    if as_bytes:
        return x.new_empty(batch, patch * height, patch * width, COLOURS, dtype=torch.uint8)
    return x.new_empty(batch, COLOURS, patch * height, patch * width)


frame_conv = define(
    "frame_conv(Tensor x, Tensor? past, Tensor weight, Tensor? bias, Tensor? residual, int how) -> Tensor",
    run=_run_frame,
    fake=_fake_frame,
    simpler=(_frame_by_library, _frame_by_torch),
)
enlarge_conv = define(
    "enlarge_conv(Tensor x, Tensor weight, int frames, bool relu, int how) -> Tensor",
    run=_run_enlarge,
    fake=_fake_enlarge,
    simpler=(_enlarge_by_torch,),
)
picture_conv = define(
    "picture_conv(Tensor x, Tensor weight, Tensor bias, int patch, bool as_bytes, int how) -> Tensor",
    run=_run_picture,
    fake=_fake_picture,
    simpler=(_picture_by_torch,),
)
