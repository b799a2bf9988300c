"""Lets a frame's condition steer its tokens: adaptive normalisation before a branch, a gate after it, and the last
projection.

Tokens are [b, n, t, d] and the condition is [b, n, d], so one value serves all tokens of its frame without being
repeated.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class AdaLN(nn.Module):
    """RMS norm without weights, then a scale and shift from the condition; key `fc`."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Args: x [b, n, t, d], cond [b, n, d]. Returns: [b, n, t, d]."""
        scale, shift = self.fc(F.silu(cond)).unsqueeze(2).chunk(2, dim=-1)
        out: Tensor = F.rms_norm(x, (x.shape[-1],)) * (1 + scale) + shift
        return out


class Gate(nn.Module):
    """Multiplies a branch by a value from the condition; key `fc_c`."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.fc_c = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Args: x [b, n, t, d], cond [b, n, d]. Returns: [b, n, t, d]."""
        out: Tensor = x * self.fc_c(F.silu(cond)).unsqueeze(2)
        return out


class FinalProjection(nn.Module):
    """Adaptive norm, SiLU, linear to the latent's channels; keys `norm.fc`, `proj`."""

    def __init__(self, d_model: int, channels: int) -> None:
        super().__init__()
        self.norm = AdaLN(d_model)
        self.proj = nn.Linear(d_model, channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Args: x [b, n, t, d], cond [b, n, d]. Returns: [b, n, t, channels]."""
        out: Tensor = self.proj(F.silu(self.norm(x, cond)))
        return out
