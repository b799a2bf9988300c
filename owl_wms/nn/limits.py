"""Keeps generated frames within the range of true ones, so that a model cannot run away behind its own frames.

Why: what a model adds to its own frames can grow from frame to frame until every place of the picture shows the same
texture, for good. No single value is unusual then, so limits on values do not help; what no true frame has is the
pattern over the picture. Here each channel is turned into cosine coefficients, its mean over the picture first, and
each coefficient stays within the range that it has in true frames. Measured with the example's model: docs/log.md.

Source: the orthonormal cosine transform (DCT-II; Ahmed, Natarajan and Rao 1974). Limiting its coefficients is our own.

Usage:
    limits = FrameLimits(96, 8, 8)
    limits.fit(frames)            # [n, 96, 8, 8], true frames in the model's scale
    x = limits(x)                 # [..., 96, 8, 8]
    x = within_limits(core, x)    # the same, as samplers do it
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

BEYOND = 0.001
"""Share of true frames in which a coefficient is beyond its limit, so that no single frame decides."""
NO_LIMIT = 1e30  # finite, as weights in files must be


class FrameLimits(nn.Module):
    """The middle and the reach of each coefficient, stored with a model's weights; without limits until `fit`.

    Args:
        channels, height, width: of a frame in the model's scale.

    Attributes:
        middle, reach: [channels, height, width]; a coefficient stays within middle - reach to middle + reach.
    """

    middle: Tensor
    reach: Tensor

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("middle", torch.zeros(channels, height, width))
        self.register_buffer("reach", torch.full((channels, height, width), NO_LIMIT))

    @torch.no_grad()
    def fit(self, frames: Tensor) -> None:
        """Take the limits from true frames [n, channels, height, width] in the model's scale, some thousand or more."""
        most = max(1, len(frames) - int(BEYOND * len(frames)))
        height, width = _cosines_of(frames)
        for channel in range(frames.shape[1]):  # one by one: all frames at once would take gigabytes
            found = height @ frames[:, channel].float() @ width.mT
            middle = found.mean(dim=0)
            self.middle[channel] = middle
            self.reach[channel] = (found - middle).abs().kthvalue(most, dim=0).values

    def forward(self, x: Tensor) -> Tensor:
        """Return frames [..., channels, height, width] with the coefficients that were beyond the limits at them; where
        none was, the same bits."""
        exact, (height, width) = x.float(), _cosines_of(x)
        found = height @ exact @ width.mT
        middle, reach = self.middle.float(), self.reach.float()
        beyond = found - torch.clamp(found, middle - reach, middle + reach)
        return (exact - height.mT @ beyond @ width).to(x.dtype)


def within_limits(model: Any, x: Tensor) -> Tensor:
    """Return finished frames [..., channels, height, width] within the limits of a model, if it has any."""
    limits = getattr(model, "limits", None)
    return x if limits is None else limits(x)


def _cosines_of(x: Tensor) -> list[Tensor]:
    """The matrices that turn the columns and the rows of [..., height, width] into cosine coefficients.

    Made anew each time: what a CUDA graph makes while it is captured must not be kept for other uses.
    """
    return [_cosines(size, x.device) for size in x.shape[-2:]]


def _cosines(size: int, device: torch.device) -> Tensor:
    """The matrix of the orthonormal cosine transform, fp32 [size, size]."""
    place = torch.arange(size, device=device, dtype=torch.float32)
    waves = torch.cos(math.pi / size * place[:, None] * (place + 0.5)) * math.sqrt(2 / size)
    waves[0] *= math.sqrt(0.5)
    return waves
