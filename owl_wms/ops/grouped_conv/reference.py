"""Reference of `grouped_conv` in plain PyTorch, and the layout its weights are packed in.

Usage:
    packed = pack(conv.weight)                                     # [C, 16, 3, 3] -> [C / 16, 9, 32, 8]
    y = reference(x, packed, conv.bias.float(), up2=False)         # [B, H, W, C]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 16
SLOPE = 0.01


def fragment_order() -> tuple[Tensor, Tensor]:
    """Output and input channel inside a group, `[32, 8]` each, of the eight values a lane holds for one tap.

    Lane 4g + t of mma.m16n8k16 wants B[k = 2t + 8r + e, n = g] for registers r and halves e; eight values are tile n,
    register r, half e. Column j of tile n stands for output channel 4 (j // 2) + 2 n + j % 2, so that a thread's
    results in both tiles are four neighbouring channels.
    """
    lane, n, r, e = torch.meshgrid(*(torch.arange(size, device="cpu") for size in (32, 2, 2, 2)), indexing="ij")
    g, t = lane // 4, lane % 4
    return (4 * (g // 2) + 2 * n + g % 2).reshape(32, 8), (2 * t + 8 * r + e).reshape(32, 8)


def pack(weight: Tensor) -> Tensor:
    """`[C, 16, 3, 3]` to `[C / 16, 9, 32, 8]`: group, tap, lane, value. Raises ValueError for another group width."""
    if weight.dim() != 4 or weight.shape[0] % GROUP or tuple(weight.shape[1:]) != (GROUP, 3, 3):
        raise ValueError(f"grouped_conv wants weights [16 n, 16, 3, 3], got {list(weight.shape)}")
    out_channel, in_channel = (order.to(weight.device) for order in fragment_order())
    taps = weight.reshape(-1, GROUP, GROUP, 9).permute(0, 3, 1, 2)
    return taps[:, :, out_channel, in_channel].contiguous()


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    out_channel, in_channel = (order.to(packed.device) for order in fragment_order())
    taps = packed.new_empty(packed.shape[0], 9, GROUP, GROUP)
    taps[:, :, out_channel, in_channel] = packed
    return taps.permute(0, 2, 3, 1).reshape(-1, GROUP, 3, 3)


def enlarge(x: Tensor, scale: int = 2) -> Tensor:
    """Bicubic enlargement of `[B, h, w, C]` as `F.interpolate` does it."""
    image = x.permute(0, 3, 1, 2).contiguous()
    return F.interpolate(image, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).contiguous()


def reference(x: Tensor, weight: Tensor, bias: Tensor, up2: bool) -> Tensor:
    """`leaky_relu(conv3x3(leaky_relu(up(x))) + bias)`, `[B, h, w, C] -> [B, H, W, C]` with H = 2h where `up2`."""
    image = F.leaky_relu(enlarge(x) if up2 else x, SLOPE).permute(0, 3, 1, 2)
    out = F.conv2d(image, unpack(weight), bias.to(x.dtype), padding=1, groups=x.shape[-1] // GROUP)
    return F.leaky_relu(out, SLOPE).permute(0, 2, 3, 1).contiguous()
