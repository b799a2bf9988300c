"""`owl_wms::nearest_up`: nearest-neighbour enlargement by 2, 3x3 convolution and the repeated shortcut, NHWC.

Why it exists: each pixel of the enlarged image has three equal neighbours, so of nine taps only four see different
values. Added up beforehand, in fp32, they are one 2x2 convolution for each of the four phases: 16 products in the place
of 36, on the small image, and the enlarged input is never written. Exact but for the rounding of the summed weights.

Usage:
    y = nearest_up(x, pack(weight), bias, shortcut=True)     # [B, H, W, C] -> [B, 2H, 2W, O]; bias [O] fp32
"""

from __future__ import annotations

from torch import Tensor

from owl_wms import cudnn
from owl_wms.ops.common.register import define, has_kernel, require
from owl_wms.ops.nearest_up.reference import as_pixel_shuffle, pack, reference

__all__ = ["as_pixel_shuffle", "nearest_up", "pack", "reference"]


def _run(x: Tensor, weight: Tensor, bias: Tensor, shortcut: bool) -> Tensor:
    if not has_kernel(x):
        return reference(x, weight, bias, shortcut)
    from owl_wms.ops.nearest_up.kernel import launch

    x, weight = x.contiguous(), weight.contiguous()
    y = cudnn.convolution(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
    return launch(y, bias, x if shortcut else None)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, shortcut: bool) -> Tensor:
    batch, height, width, channels = x.shape
    outputs = weight.shape[0] // 4
    require(channels == weight.shape[-1], lambda: f"{channels} channels, weights for {weight.shape[-1]}")
    whole = not shortcut or (4 * outputs) % channels == 0
    require(whole, lambda: f"{channels} channels cannot be repeated to 4 x {outputs}")
    return x.new_empty(batch, 2 * height, 2 * width, outputs)


nearest_up = define(
    "nearest_up(Tensor x, Tensor weight, Tensor bias, bool shortcut) -> Tensor",
    run=_run,
    fake=_fake,
    simpler=(reference,),
)
