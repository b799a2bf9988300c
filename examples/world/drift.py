"""Puts errors into history that a model collects over minutes, where colours wander and contrasts grow.

Why: a model is taught behind its own frames for some seconds. What it does to itself over half a minute is in none of
them, so it meets it in play for the first time and makes it worse. Here the history of some windows for training
drifts, more and more towards its end, while the frames to be learnt and the sinks stay true. So the model learns to
take colours and contrast from the frames that it never forgets, and what goes on from the others.

A drift is a sum of four parts, in shares of its own for each clip: an offset of each channel, the same in the whole
picture; a field that varies slowly over the picture; one that varies from place to place, as where edges get sharper
and sharper; a gain. Unlike the noise of the history's level it stays from frame to frame, the model is not told of it,
and weak channels drift less than strong ones.

Source: our own, after the noise that GameNGen puts into histories (Valevski et al. 2024, arXiv 2408.14837), which is
white, new in every frame, and told to the model.

Usage:
    drift = Drift.of(space, data.latents[:64])
    latents = drift(latents, first, last, chosen, generator)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms.models.latents import LatentSpace

STRENGTH = (0.03, 0.8)  # lowest and highest standard deviation of a part, in those of the latents
GAIN = 0.6  # of the strength
GRID = 4  # values along each side of the picture from which a field is made
LONGEST = 48  # frames over which a drift grows


@dataclass(frozen=True, slots=True)
class Drift:
    """What a drift is made of.

    Attributes:
        space: of the model's latents.
        mean, std: [k, 1, 1] of each channel, in the model's scale.
    """

    space: LatentSpace
    mean: Tensor
    std: Tensor

    @staticmethod
    def of(space: LatentSpace, latents: Tensor) -> Drift:
        """Measure the channels of stored latents [..., c, h, w]."""
        rows = space.to_model(latents.flatten(0, -4).float()).transpose(0, 1).flatten(1)
        return Drift(space, rows.mean(dim=1)[:, None, None], rows.std(dim=1)[:, None, None])

    def __call__(self, latents: Tensor, first: int, last: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Return latents [b, n, c, h, w] as stored, where the frames from `first` to before `last` [b] have drifted in
        the rows that are `chosen`, bool [b]."""
        b, n, (h, w) = len(latents), latents.shape[1], latents.shape[-2:]
        device, k = latents.device, len(self.std)

        def normal(*shape: int) -> Tensor:
            return torch.randn(b, 1, *shape, generator=generator, device=device)

        low, high = (math.log(value) for value in STRENGTH)
        unit = torch.rand(b, 2, generator=generator, device=device)
        strength = (low + (high - low) * unit[:, :1]).exp() * chosen[:, None]
        place = torch.arange(n, device=device)
        left = (last[:, None] - 1 - place) / (1 + LONGEST * unit[:, 1:].square())  # to the end of the history
        grown = (1 - left).clamp(min=0) * (place >= first) * (left >= 0) * strength
        slow = F.interpolate(normal(k, GRID, GRID)[:, 0], size=(h, w), mode="bicubic", align_corners=False)[:, None]
        shares = torch.rand(4, b, 1, 1, 1, 1, generator=generator, device=device)
        field = shares[0] * normal(k, 1, 1) + shares[1] * slow + shares[2] * normal(k, h, w)
        x = self.space.to_model(latents.float())
        change = self.std * field + GAIN * shares[3] * normal(1, 1, 1) * (x - self.mean)
        moved = latents.float() + self.space.difference_to_stored(grown[..., None, None, None] * change)
        return moved.to(latents.dtype)
