"""Reference implementation of `nearest_up` in plain PyTorch, and the layout of its weights.

Usage:
    y = reference(x, pack(conv.weight), conv.bias.float(), shortcut=True)     # [B, H, W, C] -> [B, 2H, 2W, O]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Output row 2h + i reads rows h - 1 + i and h + i of the small image; of the three taps of a column of the weights, the
# first or the first two fall on the upper one.
_SHARES = ((1, 2), (2, 1))


def phases(weight: Tensor) -> Tensor:
    """`[O, C, 3, 3]` to `[2, 2, O, C, 2, 2]`: for each phase (i, j) the weights on the small image, summed in fp32."""
    wide = weight.detach().float()
    return torch.stack([
        torch.stack([
            torch.stack([
                torch.stack([part.sum((2, 3)) for part in band.split(_SHARES[j], dim=3)], dim=-1)
                for band in wide.split(_SHARES[i], dim=2)
            ], dim=-2)
            for j in range(2)
        ])
        for i in range(2)
    ])  # fmt: skip


def pack(weight: Tensor) -> Tensor:
    """`[O, C, 3, 3]` to `[4 O, 2, 2, C]`, contiguous, phases first, in the dtype of `weight`.

    Raises:
        ValueError: the weights are not those of a dense 3x3 convolution.
    """
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"nearest_up wants weights [O, C, 3, 3], got {list(weight.shape)}")
    return phases(weight).flatten(0, 2).permute(0, 2, 3, 1).to(weight.dtype).contiguous()


def as_pixel_shuffle(weight: Tensor) -> Tensor:
    """Weights `[4 O, C, 3, 3]`, channel `4 o + phase`, with which a convolution and a pixel shuffle by 2 do what
    enlargement and `weight [O, C, 3, 3]` do: the same function with taps of zero, for outputs too few to count.
    """
    parts = phases(weight)
    rows = [
        F.pad(parts[i, j], (j, 1 - j, i, 1 - i))  # phase (i, j) looks at rows i and i + 1 of three, columns alike
        for i in range(2)
        for j in range(2)
    ]
    return torch.stack(rows, dim=1).flatten(0, 1).to(weight.dtype)


def reference(x: Tensor, weight: Tensor, bias: Tensor, shortcut: bool) -> Tensor:
    """The 2x2 convolution of every phase, put in its place, plus bias; plus `x` with channels repeated to 4 O and
    shuffled, where there is a shortcut.
    """
    batch, height, width, channels = x.shape
    outputs = weight.shape[0] // 4
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), padding=1)
    y = y.reshape(batch, 2, 2, outputs, height + 1, width + 1)
    placed = x.new_empty(batch, outputs, height, 2, width, 2)
    for i in range(2):
        for j in range(2):
            placed[:, :, :, i, :, j] = y[:, i, j, :, i : i + height, j : j + width]
    out = placed.reshape(batch, outputs, 2 * height, 2 * width) + bias.to(x.dtype)[:, None, None]
    if shortcut:
        out = out + F.pixel_shuffle(x.permute(0, 3, 1, 2).repeat_interleave(4 * outputs // channels, dim=1), 2)
    return out.permute(0, 2, 3, 1).contiguous()
