"""Between wide frames and the square grid the autoencoders work on.

Why it exists: latents are square (8x8 for 360x640 frames), so wide frames are squashed to a power-of-two square before
the encoder and stretched back after the decoder. Both resizes are bicubic and static for a given input shape.

Usage:
    size = is_wide((360, 640))                     # True: wider than tall
    SquareToLandscape(96, 3, size=(360, 640))      # [B, 96, 512, 512] -> [B, 3, 360, 640]
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from owl_wms.vae.blocks import conv2d

# Sizes the later revision snaps to, by area nearest to the square it was given.
LANDSCAPE_SIZES = ((45, 80), (90, 160), (180, 320), (360, 640), (720, 1280), (1080, 1920), (2160, 3840))
WIDE_ASPECT = 16 / 9
ASPECT_TOLERANCE = 0.01


def is_sixteen_nine(size: int | tuple[int, int]) -> bool:
    """Returns whether `(height, width)` is 16:9 within 0.01, the rule of the tiled and distilled variants.

    An int is a square.
    """
    if isinstance(size, int):
        return False
    return abs(size[1] / size[0] - WIDE_ASPECT) < ASPECT_TOLERANCE


def is_wide(size: int | tuple[int, int]) -> bool:
    """Returns whether `(height, width)` is wider than tall, the rule of the learned variant; an int is a square."""
    return not isinstance(size, int) and size[0] < size[1]


def nearest_square(height: int, width: int) -> int:
    """Side of the power-of-two square nearest in area (in log2): `(360, 640) -> 512`."""
    side: int = 2 ** round(math.log2(round(math.sqrt(height * width))))
    return side


def nearest_landscape(height: int, width: int) -> tuple[int, int]:
    """Entry of `LANDSCAPE_SIZES` nearest in area: `(512, 512) -> (360, 640)`."""
    return min(LANDSCAPE_SIZES, key=lambda size: abs(size[0] * size[1] - height * width))


def other_latent_size(config: object, height: int, width: int) -> str | None:
    """Returns what is wrong with latents of another size than a configuration's `latent_size`, or None.

    They are decoded all the same, as upstream does: its decoders are convolutional up to the resize, which stretches
    every square and non-square to the same wide frame.

    Args:
        config: a model section, or anything; without `latent_size` there is nothing to compare with.
        height, width: of the latents.
    """
    side = getattr(config, "latent_size", None)
    if not isinstance(side, int) or (height, width) == (side, side):
        return None
    size = getattr(config, "sample_size", None)
    fate = f"stretched to {size[0]}x{size[1]}" if size is not None and is_wide(size) else "of another size too"
    return f"latents are {height}x{width}, the autoencoder's own are {side}x{side}: frames will be {fate}"


class SquareToLandscape(nn.Module):
    """3x3 projection on the square, then a bicubic resize: `[B, c_in, S, S] -> [B, c_out, H, W]`.

    Args:
        size: `(H, W)`, or None to choose the entry of `LANDSCAPE_SIZES` nearest to the square at hand.
        bias: the learned variant has one, the others do not.
    """

    def __init__(self, c_in: int, c_out: int, *, size: tuple[int, int] | None, bias: bool = False) -> None:
        super().__init__()
        self.size = size
        self.proj = conv2d(c_in, c_out, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        size = self.size or nearest_landscape(x.shape[-2], x.shape[-1])
        return F.interpolate(self.proj(x), size=size, mode="bicubic")


class LandscapeToSquare(nn.Module):
    """Bicubic resize to a square, then a 3x3 projection: `[B, c_in, H, W] -> [B, c_out, S, S]`.

    Args:
        size: `(H, W)` the side is computed from, or None to compute it from the input at hand.
        bias: the learned variant has one, the others do not.
    """

    def __init__(self, c_in: int, c_out: int, *, size: tuple[int, int] | None, bias: bool = False) -> None:
        super().__init__()
        self.side = None if size is None else nearest_square(*size)
        self.proj = conv2d(c_in, c_out, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        side = self.side or nearest_square(x.shape[-2], x.shape[-1])
        out: Tensor = self.proj(F.interpolate(x, size=(side, side), mode="bicubic"))
        return out
