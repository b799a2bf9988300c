"""Reference of `frame_depthwise` in plain PyTorch, and the layout of its weights.

Usage:
    y = reference(x, past, pack(conv.weight))       # [b n, H, W, C], [b, H, W, C] -> [b n, H, W, 2 C]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops.frame_conv.reference import previous

SIDE = 7


def pack(weight: Tensor) -> Tensor:
    """Returns `[49, C]` in fp32 of depthwise weights `[C, 1, 7, 7]`. Raises ValueError for another shape."""
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (1, SIDE, SIDE):
        raise ValueError(f"frame_depthwise wants weights [C, 1, 7, 7], got {list(weight.shape)}")
    return weight.flatten(1).t().float().contiguous()


def reference(x: Tensor, past: Tensor, taps: Tensor) -> Tensor:
    """Depthwise 7x7 convolution with zero padding over the channels of `x` and of the frame before it."""
    rows = torch.cat([x, previous(x, past)], -1).permute(0, 3, 1, 2)
    weight = taps.t().reshape(-1, 1, SIDE, SIDE).to(x.dtype)
    return F.conv2d(rows, weight, padding=SIDE // 2, groups=len(weight)).permute(0, 2, 3, 1).contiguous()
