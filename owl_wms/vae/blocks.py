"""Building blocks that every autoencoder of the DCAE family shares: weight-normed convolutions and residual stages.

Why they exist: the shipped decoders are pure convolution (no norm layers, no attention, no buffers), so one residual
block and one resize-and-project pair, at different widths, make up the tiled, learned and distilled variants alike.
Attribute names are upstream's because they are the checkpoint's keys.

Usage:
    block = UpBlock(64, 32, depth=2)
    y = block(torch.randn(1, 64, 8, 8))        # [1, 32, 16, 16]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

# The grouped 3x3 convolution of a residual block always sees 16 channels per group, whatever the width.
GROUP_CHANNELS = 16
LEAKY_SLOPE = 0.01


def conv2d(c_in: int, c_out: int, kernel: int, *, bias: bool = True, groups: int = 1) -> nn.Conv2d:
    """Weight-normed "same" convolution: `[B, c_in, H, W] -> [B, c_out, H, W]`.

    Keys are `parametrizations.weight.original0` (gain, `[c_out, 1, 1, 1]`) and `original1` (direction).
    """
    conv: nn.Conv2d = weight_norm(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=bias, groups=groups))
    return conv


class Residual(nn.Module):
    """Adds a branch of three convolutions, an activation between them, to its input, whose shape stays.

    Subclasses make the modules.
    """

    conv1: nn.Conv1d | nn.Conv2d
    conv2: nn.Conv1d | nn.Conv2d
    conv3: nn.Conv1d | nn.Conv2d
    act1: nn.Module
    act2: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch alone."""
        out: Tensor = self.conv3(self.act2(self.conv2(self.act1(self.conv1(x)))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            out: Tensor = x + checkpoint(self.branch, x, use_reentrant=False)
            return out
        return x + self.branch(x)


class ResBlock(Residual):
    """Bottleneck-inverted residual: 1x1 to twice the width, grouped 3x3, 1x1 back; `[B, ch, H, W]` in and out.

    Args:
        ch: width; `2 * ch` must be a multiple of 16.
    """

    def __init__(self, ch: int) -> None:
        super().__init__()
        hidden = 2 * ch
        self.conv1 = conv2d(ch, hidden, 1)
        self.conv2 = conv2d(hidden, hidden, 3, groups=hidden // GROUP_CHANNELS)
        self.conv3 = conv2d(hidden, ch, 1, bias=False)
        self.act1 = nn.LeakyReLU(LEAKY_SLOPE, inplace=True)
        self.act2 = nn.LeakyReLU(LEAKY_SLOPE, inplace=True)
        for conv in (self.conv1, self.conv2):
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)


class Upsample(nn.Module):
    """Project at low resolution (only where widths differ), then enlarge: `[B, c_in, H, W] -> [B, c_out, s*H, s*W]`.

    Bicubic is torch's kernel (a = -0.75), half-pixel centres, no antialias.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.proj = nn.Sequential() if c_in == c_out else conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.proj(x), scale_factor=self.stride, mode="bicubic")


class Downsample(nn.Module):
    """Shrink, then project (always): `[B, c_in, H, W] -> [B, c_out, H/s, W/s]`."""

    def __init__(self, c_in: int, c_out: int, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.proj = conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(F.interpolate(x, scale_factor=1.0 / self.stride, mode="bicubic"))
        return out


def _res_blocks(ch: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(ResBlock(ch) for _ in range(depth))


class UpBlock(nn.Module):
    """Decoder stage: `up`, then `depth` residual blocks at `c_out`."""

    def __init__(self, c_in: int, c_out: int, depth: int) -> None:
        super().__init__()
        self.up = Upsample(c_in, c_out)
        self.blocks = _res_blocks(c_out, depth)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for block in self.blocks:
            x = block(x)
        return x


class DownBlock(nn.Module):
    """Encoder stage: `depth` residual blocks at `c_in`, then `down`."""

    def __init__(self, c_in: int, c_out: int, depth: int) -> None:
        super().__init__()
        self.down = Downsample(c_in, c_out)
        self.blocks = _res_blocks(c_in, depth)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.down(x)
        return out


class SameBlock(nn.Module):
    """The optional middle: `depth` residual blocks at one width and resolution."""

    def __init__(self, ch: int, depth: int) -> None:
        super().__init__()
        self.blocks = _res_blocks(ch, depth)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def set_gradient_checkpointing(module: nn.Module, enabled: bool = True) -> None:
    """Make every residual block under `module` recompute its branch in the backward pass (training mode only).

    Saves the activations of the doubled width at the price of one more forward; never used in eval or under no_grad,
    so an exported graph does not contain it.
    """
    for child in module.modules():
        if hasattr(child, "gradient_checkpointing"):
            setattr(child, "gradient_checkpointing", enabled)  # noqa: B010  (nn.Module types attributes as tensors)
