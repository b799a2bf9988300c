"""Reference of `conv_out` in plain PyTorch, and the layout its weights are packed in.

Usage:
    packed = pack(conv.weight)                               # [O <= 8, C, 3, 3] -> [ceil(C / 32), tiles, 32, 8]
    y = reference(x, packed, bias, silu=True)                # [B, H, W, C] -> [B, H, W, 4 or 8] fp32
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
MAX_OUT = 8


def padded(channels: int) -> int:
    """Output channels the kernel works with: 4 or 8. Raises ValueError above 8."""
    if not 1 <= channels <= MAX_OUT:
        raise ValueError(f"conv_out makes 1 to {MAX_OUT} channels, got {channels}")
    return 4 if channels <= 4 else 8


def fragment_order() -> tuple[Tensor, Tensor]:
    """Column inside a tile of 8 and channel inside a block of 32, `[32, 8]` each, of the eight values a lane holds.

    Lane 4g + t loads channels 8t..8t+7 of its pixel; in step s it feeds 8t + 4s + {0, 1} as k = 2t + e and
    8t + 4s + {2, 3} as k = 2t + 8 + e. Eight values are step s, register r, half e.
    """
    lane, s, r, e = torch.meshgrid(*(torch.arange(size, device="cpu") for size in (32, 2, 2, 2)), indexing="ij")
    g, t = lane // 4, lane % 4
    return g.reshape(32, 8), (8 * t + 4 * s + 2 * r + e).reshape(32, 8)


def pack(weight: Tensor) -> Tensor:
    """`[O, C, 3, 3]` to `[C / 32 (up), 9 * pad / 8 (up), 32, 8]`: channel block, tile of columns, lane, value.

    Column `tap * pad + o` holds tap `tap` of output o; missing outputs and channels are zeros.
    """
    outputs, channels = weight.shape[:2]
    pad, blocks = padded(outputs), -(-channels // BLOCK)
    tiles = -(-9 * pad // 8)
    columns = weight.new_zeros(tiles * 8, blocks * BLOCK)
    taps = columns[: 9 * pad].view(9, pad, blocks * BLOCK)
    taps[:, :outputs, :channels] = weight.reshape(outputs, channels, 9).permute(2, 0, 1)
    column, channel = (order.to(weight.device) for order in fragment_order())
    matrix = columns.view(tiles, 8, blocks, BLOCK).permute(2, 0, 1, 3)
    return matrix[:, :, column, channel].contiguous()


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`, padding included: `[pad, 32 * blocks, 3, 3]`."""
    blocks, tiles = packed.shape[:2]
    column, channel = (order.to(packed.device) for order in fragment_order())
    matrix = packed.new_empty(blocks, tiles, 8, BLOCK)
    matrix[:, :, column, channel] = packed
    pad = 4 if tiles < 9 else 8
    taps = matrix.permute(1, 2, 0, 3).reshape(tiles * 8, blocks * BLOCK)[: 9 * pad]
    return taps.view(9, pad, -1).permute(1, 2, 0).reshape(pad, -1, 3, 3)


def reference(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """`conv3x3(silu(x)) + bias` in fp32."""
    image = (F.silu(x) if silu else x).permute(0, 3, 1, 2)
    out = F.conv2d(image, unpack(weight)[:, : x.shape[-1]], padding=1).permute(0, 2, 3, 1)
    return (out.float() + bias).contiguous()
