"""The step sizes that take a frame from noise (t = 1) to data (t = 0)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from owl_wms.errors import ConfigError

_SHIFT = 3.0
MOST_STEPS = 10_000
"""Steps per frame; levels of more would be closer than bf16 can tell them."""


def get_sd3_euler(n_steps: int) -> Tensor:
    """Step sizes of the flow-matching Euler schedule with shift 3, as Stable Diffusion 3 uses it.

    Noise levels are s(u) = 3u / (1 + 2u) at u = 1, (n-1)/n, ..., 1/n, then 0 (Esser et al. 2024, section 5.3.2).

    Args:
        n_steps: 1 to `MOST_STEPS`.

    Returns:
        [n_steps] fp32 on the CPU, positive, adding up to 1; for 4 steps 0.1, 0.15, 0.25, 0.5.
    """
    if not isinstance(n_steps, Integral) or n_steps < 1:
        raise ConfigError(f"n_steps must be at least 1, got {n_steps!r}", key="n_steps")
    if n_steps > MOST_STEPS:
        raise ConfigError(f"n_steps must be at most {MOST_STEPS}, got {n_steps}", key="n_steps")
    u = torch.arange(n_steps, -1, -1, dtype=torch.float64, device="cpu") / n_steps
    levels = _SHIFT * u / (1 + (_SHIFT - 1) * u)
    return (levels[:-1] - levels[1:]).float()


def custom_deltas(schedule: Sequence[float]) -> Tensor:
    """Step sizes between given noise levels, ending at 0 whether or not the list says so.

    Args:
        schedule: falling from 1.0, for example [1.0, 0.5].

    Returns:
        [steps] fp32 on the CPU; for the example 0.5, 0.5. The list is left as it is.
    """
    levels = [float(level) for level in schedule]
    if levels and levels[-1] != 0.0:
        levels.append(0.0)
    if len(levels) < 2 or levels[0] != 1.0 or any(a <= b for a, b in pairwise(levels)):
        raise ConfigError(f"custom_schedule must fall strictly from 1.0, got {list(schedule)}", key="custom_schedule")
    exact = torch.tensor(levels, dtype=torch.float64, device="cpu")
    return (exact[:-1] - exact[1:]).float()


def check_order(order: int) -> int:
    """Returns the order of a sampler's steps.

    Raises:
        ConfigError: neither 1 nor 2.
    """
    if order not in (1, 2):
        raise ConfigError(f"order must be 1 (Euler) or 2 (Adams-Bashforth), got {order!r}", key="order")
    return order


def take_step(x: Tensor, velocities: list[Tensor], sizes: list[float], order: int) -> Tensor:
    """Returns a sample after one more step, along velocities that are known.

    Order 1 is Euler's; order 2 that of Adams and Bashforth, which takes the line through this velocity and the one
    before and costs nothing more. The first step is Euler's in any case (Hairer, Norsett and Wanner, Solving Ordinary
    Differential Equations I, section III.5, with steps of unequal size).

    Args:
        x: the sample.
        velocities: at the beginning of this step, the last one, and of those before.
        sizes: of the same steps.
    """
    v = velocities[-1]
    if order == 2 and len(velocities) > 1:
        v = v + (v - velocities[-2]) * (sizes[-1] / (2 * sizes[-2]))
    return x - sizes[-1] * v


def zlerp(x: Tensor, amount: float, generator: torch.Generator | None = None) -> Tensor:
    """x (1 - amount) + amount * noise, noise standard normal; amount 0 to 1."""
    noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    return x * (1 - amount) + noise * amount
