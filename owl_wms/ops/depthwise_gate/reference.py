"""Reference of `depthwise_gate` in plain PyTorch, and the layout of its weights.

Usage:
    y = reference(x, pack(conv.weight), conv.bias.float())     # x [B, H, W, 2K] -> [B, H, W, K]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pack(weight: Tensor) -> Tensor:
    """`[2K, 1, 3, 3]` to `[9, 2K]` fp32, a tap a row. Raises ValueError when the convolution is not depthwise 3x3."""
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (1, 3, 3) or weight.shape[0] % 4:
        raise ValueError(f"depthwise_gate wants weights [4 n, 1, 3, 3], got {list(weight.shape)}")
    return weight.flatten(1).t().float().contiguous()


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`h * silu(g)` with `h, g` the two halves of `depthwise3x3(silu(x)) + bias`; products in x's dtype."""
    channels = x.shape[-1]
    taps = weight.t().reshape(channels, 1, 3, 3).to(x.dtype)
    image = F.silu(x).permute(0, 3, 1, 2)
    y = F.conv2d(image, taps, bias.to(x.dtype), padding=1, groups=channels).permute(0, 2, 3, 1)
    hidden, gate = y.chunk(2, dim=-1)
    return (hidden * F.silu(gate)).contiguous()
