"""Conditions of the transformer: the noise level of each frame and the player's controls, as vectors of the model's
width.

Sines take arguments up to 1000 times their input, so they are computed in fp32 whatever the weights are: in bf16, 1000
* t has steps of 4 near t = 1, and neighbouring noise levels become one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from owl_wms.nn.mlp import MLP

_THETA = 300.0
_MULT = 1000.0


def sincos(x: Tensor, dim: int) -> Tensor:
    """Sines and cosines of 1000 * x at dim/2 frequencies 300^(-i/(dim/2 - 1)).

    Args:
        x: [...] of any float dtype, nominally 0 to 1.
        dim: even, at least 4.

    Returns:
        [..., dim] fp32, the sines first.
    """
    half = dim // 2
    index = torch.arange(half, device=x.device, dtype=torch.float32)
    frequencies = _THETA ** (-index / (half - 1))
    angles = (x.float() * _MULT)[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Noise level t in [0, 1] (1 is pure noise) to a vector; keys `mlp.fc1`, `mlp.fc2`."""

    SINES = 512

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.mlp = MLP(self.SINES, 4 * d_model, d_model)

    def forward(self, t: Tensor) -> Tensor:
        """Args: t [b, n]. Returns: [b, n, d] in the weights' dtype."""
        out: Tensor = self.mlp(sincos(t, self.SINES).to(self.mlp.fc1.weight.dtype))
        return out


class MouseEmbedding(nn.Module):
    """A mouse movement, by direction and by compressed length; keys `angle_proj`, `mlp.fc1`, `mlp.fc2`.

    A mouse at rest has length 0 and no direction. Upstream embeds the direction "right" then, which is what its weights
    know; with `rest_has_direction` False the direction is the zero vector.
    """

    SINES = 256

    def __init__(self, d_model: int, hidden: int, *, rest_has_direction: bool = True) -> None:
        super().__init__()
        self._rest_has_direction = rest_has_direction
        self.angle_proj = nn.Linear(2, self.SINES, bias=False)
        self.mlp = MLP(2 * self.SINES, hidden, d_model)

    def forward(self, mouse: Tensor) -> Tensor:
        """Args: mouse [b, n, 2], any scale. Returns: [b, n, d] in the weights' dtype."""
        dtype = self.angle_proj.weight.dtype
        moved = mouse.float()
        squashed = moved.sign() * moved.abs().log1p()
        angle = torch.atan2(squashed[..., 1], squashed[..., 0])
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1).to(dtype)
        norm = squashed.norm(dim=-1)
        if not self._rest_has_direction:
            direction = direction * (norm > 0)[..., None]
        length = sincos(norm, self.SINES).to(dtype)
        out: Tensor = self.mlp(torch.cat([self.angle_proj(direction).to(dtype), length], dim=-1))
        return out


class ButtonEmbedding(nn.Module):
    """Held buttons, 0 or 1 each, to a vector; keys `proj.fc1`, `proj.fc2`."""

    def __init__(self, n_buttons: int, d_model: int, hidden: int) -> None:
        super().__init__()
        self.proj = MLP(n_buttons, hidden, d_model)

    def forward(self, buttons: Tensor) -> Tensor:
        """Args: buttons [b, n, n_buttons], bool or number. Returns: [b, n, d] in the weights' dtype."""
        out: Tensor = self.proj(buttons.to(self.proj.fc1.weight.dtype) * 2 - 1)
        return out


class ControlEmbedding(nn.Module):
    """Mouse and buttons, added; `hidden` is the inner width of both, 2048 in every upstream model."""

    def __init__(self, n_buttons: int, d_model: int, hidden: int = 2048, *, rest_has_direction: bool = True) -> None:
        super().__init__()
        self.mouse = MouseEmbedding(d_model, hidden, rest_has_direction=rest_has_direction)
        self.button = ButtonEmbedding(n_buttons, d_model, hidden)

    def forward(self, mouse: Tensor, buttons: Tensor) -> Tensor:
        """Args: mouse [b, n, 2], buttons [b, n, n_buttons]. Returns: [b, n, d]."""
        out: Tensor = self.mouse(mouse) + self.button(buttons)
        return out
