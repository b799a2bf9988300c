"""Rotary positions: one table of angles for the whole transformer, in fp32 whatever the weights are cast to.

Two layouts, both linear in the frame index, so attention sees only differences between frames and a cache may move all
its frames to other positions by one rotation (`shift`):

- `motion`: time runs along x and y too, so that a frame's patch is displaced as time passes; inverse frequencies
  base^(-2j/D); the spatial ones alternate x, y and come first, the temporal ones follow.
- `ortho`: frame, row and column each own a quarter of the angles, at frequencies pi * linspace(1, 128); the last
  quarter is zero.

Usage:
    table = RotaryTable(config)
    cos, sin = table.at(first_frame=3, frames=n)
    q = rotate_by(q, cos, sin)        # [b, heads, n * t, e]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.configs.strict import choose
from owl_wms.errors import ConfigError
from owl_wms.nn.setting import latent_grid, setting


def _ortho(config: Any, half: int) -> tuple[Tensor, Tensor]:
    """Angles [n_frames, t, half] and the angle that one frame adds, [half], both fp64."""
    if half % 4:
        raise ConfigError(
            f"rope_impl 'ortho' needs a head width divisible by 8, got d_model / n_heads = {2 * half}",
            key="model.n_heads",
        )
    quarter, frames = half // 4, config.n_frames
    height, width = latent_grid(config)
    frequencies = torch.linspace(1, 128, quarter, dtype=torch.float64) * math.pi
    # One point more than there are rows and columns: the extra corner is where the audio token of a frame sits.
    down, across = (torch.linspace(-1, 1, side + 1, dtype=torch.float64) for side in (height, width))
    rows, columns = down[:-1].repeat_interleave(width), across[:-1].repeat(height)
    if setting(config, "has_audio", False):
        rows, columns = torch.cat([rows, down[-1:]]), torch.cat([columns, across[-1:]])
    times = torch.linspace(-1, 1, frames, dtype=torch.float64)
    tokens = len(rows)
    axes = [
        times[:, None].expand(frames, tokens),
        rows.expand(frames, tokens),
        columns.expand(frames, tokens),
    ]
    angles = torch.cat([axis[..., None] * frequencies for axis in axes], dim=-1)
    step = 2.0 / (frames - 1) if frames > 1 else 0.0
    still = torch.zeros(quarter, dtype=torch.float64)
    shift = torch.cat([frequencies * step, still, still, still])
    return torch.cat([angles, still.expand(frames, tokens, -1)], dim=-1), shift


def _motion(config: Any, half: int) -> tuple[Tensor, Tensor]:
    """Angles [n_frames, t, half] and the angle that one frame adds, [half], both fp64."""
    head = 2 * half
    dim_t = setting(config, "rope_dim_t", head * 2 // 8)
    dim_x = setting(config, "rope_dim_x", head * 3 // 8)
    dim_y = setting(config, "rope_dim_y", head * 3 // 8)
    if dim_x != dim_y or dim_t % 2 or dim_x % 2 or dim_t + dim_x + dim_y != head:
        raise ConfigError(
            f"rope_dim_x = rope_dim_y and rope_dim_t must be even and add up to the head width {head}, "
            f"got x {dim_x}, y {dim_y}, t {dim_t}",
            key="model.rope_dim_t",
        )
    delta, base = setting(config, "rope_ats_delta", 2.0), setting(config, "rope_base", 10000.0)
    height, width = latent_grid(config)
    frequencies = torch.tensor([base ** (-2 * j / head) for j in range(half)], dtype=torch.float64)
    spatial = (dim_x + dim_y) // 2
    down, across = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in (height, width))
    x_offset, y_offset = across.repeat(height), down.repeat_interleave(width)
    if setting(config, "has_audio", False):
        below = torch.tensor([(height - 1) / 2 + 1], dtype=torch.float64)
        x_offset, y_offset = torch.cat([x_offset, torch.zeros_like(below)]), torch.cat([y_offset, below])
    time = torch.arange(config.n_frames, dtype=torch.float64)[:, None] * delta
    x, y = time + x_offset, time + y_offset
    alternating = torch.stack([x, y], dim=-1).repeat(1, 1, (spatial + 1) // 2)[..., :spatial]
    angles = torch.cat(
        [
            alternating * frequencies[:spatial],
            time[..., None].expand(-1, x.shape[1], half - spatial) * frequencies[spatial:],
        ],
        dim=-1,
    )
    return angles, frequencies * delta


LAYOUTS: dict[str, Callable[[Any, int], tuple[Tensor, Tensor]]] = {"ortho": _ortho, "motion": _motion}


class RotaryTable(nn.Module):
    """Cosines and sines for every frame and token, shared by all layers.

    Args:
        config: sample_size, n_frames, has_audio, n_heads, d_model; optional rope_impl and its settings.

    Raises:
        ConfigError: unknown rope_impl, or a head width that the layout cannot divide.
    """

    cos: Tensor
    sin: Tensor
    first: Tensor
    step: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        name = setting(config, "rope_impl", "ortho")
        self._layout = choose(LAYOUTS, name, "model.rope_impl")
        self._config = config
        self.n_frames: int = config.n_frames
        self._fill(torch.get_default_device())

    def _fill(self, device: torch.device) -> None:
        with torch.device("cpu"):
            angles, step = self._layout(self._config, self._config.d_model // self._config.n_heads // 2)
        # fp64 until here: at frame 1500 an fp32 angle is already 2e-4 off.
        self.register_buffer("cos", angles.cos().float().to(device), persistent=False)
        self.register_buffer("sin", angles.sin().float().to(device), persistent=False)
        self.register_buffer("first", angles[0].to(device), persistent=False)
        self.register_buffer("step", step.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        """Follow moves between devices and ignore casts; coming from the meta device, compute the table anew."""
        try:
            target = fn(torch.empty(0, device=self.cos.device)).device  # a cast leaves it where it is
        except NotImplementedError:  # nothing can be moved off the meta device, but this can be computed elsewhere
            target = fn(torch.empty(0, device="cpu")).device
        if self.cos.is_meta and target.type != "meta":
            self._fill(target)
        else:
            self._buffers.update({name: None if t is None else t.to(target) for name, t in self._buffers.items()})
        return self

    def at(self, first_frame: int, frames: int) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines [frames * t, e / 2] in fp32 for positions in the table.

        Args:
            first_frame: position of the first frame, 0 to n_frames - frames.
            frames: how many.
        """
        span = slice(first_frame, first_frame + frames)
        return self.cos[span].flatten(0, 1), self.sin[span].flatten(0, 1)

    def angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines [t, e / 2] in fp32 for one frame at any position, also beyond the table.

        Args:
            position: [1] int64 on the table's device.
        """
        # fp64: at frame 100,000 an fp32 angle would be off by 1e-2.
        angles = self.first + self.step * position
        return angles.cos().float(), angles.sin().float()

    def shift(self, keys: Tensor, frames: int) -> Tensor:
        """Move rotated keys by whole frames, earlier if negative.

        Args:
            keys: [..., e] as `rotate_by` returned them.
            frames: how far.

        Returns:
            The keys as `rotate_by` gives them at positions that many frames later, to one rounding of their dtype.
        """
        angle = self.step * frames
        cos, sin = angle.cos().float(), angle.sin().float()
        return _turned(keys.float().chunk(2, dim=-1), cos, sin).to(keys.dtype)


def rotate_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates queries or keys in fp32.

    Neighbouring elements are a pair; all firsts come out before all seconds, which changes no product of a query with a
    key.

    Args:
        x: [b, heads, tokens, e].
        cos, sin: [tokens, e / 2] fp32.

    Returns:
        [b, heads, tokens, e] in the dtype of x.
    """
    return _turned(x.float().unflatten(-1, (-1, 2)).unbind(-1), cos, sin).to(x.dtype)


def _turned(pairs: tuple[Tensor, ...], cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs of elements, two tensors [..., e / 2], by their angles; [..., e], all firsts before all seconds."""
    first, second = pairs
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
