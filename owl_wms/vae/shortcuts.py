"""The shortcuts that run beside every stage: parameter-free ("tiled") and learned.

Why two sets: owl-vaes at 005e9fcf moves channels to space by tiling and averaging, without parameters; its later
revision learns a 3x3 projection instead. Everything else of the two decoders is the same code.

Usage:
    ChannelToSpace(64, 32)(torch.randn(1, 64, 8, 8))           # [1, 32, 16, 16], no parameters
    LearnedChannelToSpace(64, 32)(torch.randn(1, 64, 8, 8))    # [1, 32, 16, 16], key proj.*
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from owl_wms.vae.blocks import conv2d


class ChannelToSpace(nn.Module):
    """Pixel-shuffle by 2, then tile the whole channel block: `[B, c_in, H, W] -> [B, c_out, 2H, 2W]`.

    Tiling repeats 0,1,..,C-1,0,1,..; four times for equal widths, twice where the width halves.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.repeats = 4 * c_out // c_in

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2).repeat(1, self.repeats, 1, 1)


class SpaceToChannel(nn.Module):
    """Pixel-unshuffle by 2, then average strided channels: `[B, c_in, H, W] -> [B, c_out, H/2, W/2]`."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.groups = 4 * c_in // c_out

    def forward(self, x: Tensor) -> Tensor:
        return group_mean(F.pixel_unshuffle(x, 2), self.groups)


class LearnedChannelToSpace(nn.Module):
    """3x3 projection to `4 * c_out`, then pixel-shuffle by 2: `[B, c_in, H, W] -> [B, c_out, 2H, 2W]`."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.proj = conv2d(c_in, 4 * c_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.proj(x), 2)


class LearnedSpaceToChannel(nn.Module):
    """3x3 projection to `c_out / 4`, then pixel-unshuffle by 2: `[B, c_in, H, W] -> [B, c_out, H/2, W/2]`."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.proj = conv2d(c_in, c_out // 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.proj(x), 2)


class ChannelDuplication(nn.Module):
    """3x3 projection plus each input channel repeated side by side, scaled to keep the variance of a sum of copies.

    Channel j of the shortcut is input channel `j // reps` times `reps ** -0.5`; `[B, c_in, H, W] -> [B, c_out, H, W]`.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.repeats = c_out // c_in
        self.proj = conv2d(c_in, c_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x) + x.repeat_interleave(self.repeats, dim=1) * self.repeats**-0.5
        return out


class ChannelAverage(nn.Module):
    """3x3 projection plus the strided group mean times `sqrt(groups)`: `[B, c_in, H, W] -> [B, c_out, H, W]`."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.groups = c_in // c_out
        self.proj = conv2d(c_in, c_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x) + group_mean(x, self.groups) * self.groups**0.5
        return out


def group_mean(x: Tensor, groups: int) -> Tensor:
    """Mean of channels k, k + C/groups, k + 2C/groups, ..: `[B, C, H, W] -> [B, C / groups, H, W]`."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, groups, channels // groups, height, width).mean(dim=1)
