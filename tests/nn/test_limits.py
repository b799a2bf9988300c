"""Limits of generated frames: what they leave as it is, what they cut, and where they come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from owl_wms.nn.limits import BEYOND, FrameLimits


def coefficients(x: Tensor) -> Tensor:
    """The orthonormal cosine transform by its definition, in fp64."""
    height, width = x.shape[-2:]

    def waves(size: int) -> Tensor:
        rows = [[math.cos(math.pi / size * (n + 0.5) * k) for n in range(size)] for k in range(size)]
        scale = torch.tensor([math.sqrt((1 if k == 0 else 2) / size) for k in range(size)], dtype=torch.float64)
        return torch.tensor(rows, dtype=torch.float64) * scale[:, None]

    return torch.einsum("ki,...ij,lj->...kl", waves(height), x.double(), waves(width))


@pytest.fixture
def frames() -> Tensor:
    return (
        torch.randn(4000, 3, 4, 6, generator=torch.Generator().manual_seed(1))
        + torch.tensor([2.0, 0.0, -1.0])[:, None, None]
    )


@pytest.fixture
def limits(frames: Tensor) -> FrameLimits:
    limits = FrameLimits(3, 4, 6)
    limits.fit(frames)
    return limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_true_frames_have_is_left_bit_for_bit(limits: FrameLimits, dtype: torch.dtype) -> None:
    x = 0.3 * torch.randn(5, 1, 3, 4, 6) + torch.tensor([2.0, 0.0, -1.0])[:, None, None]
    assert torch.equal(limits(x.to(dtype)), x.to(dtype))
    unlimited = FrameLimits(3, 4, 6)
    assert torch.equal(unlimited(1e4 * x.to(dtype)), 1e4 * x.to(dtype)), "not fitted yet"


def test_each_coefficient_stays_within_its_range(limits: FrameLimits) -> None:
    x = 9 * torch.randn(50, 3, 4, 6)
    found, was = coefficients(limits(x)), coefficients(x)
    low, high = (limits.middle - limits.reach).double(), (limits.middle + limits.reach).double()
    assert torch.allclose(found, was.clamp(low, high), atol=1e-5)
    assert ((was < low) | (was > high)).float().mean() > 0.5, "most of these were beyond"


def test_a_channel_whose_mean_grows_is_held(limits: FrameLimits, frames: Tensor) -> None:
    """No value is unusual, the mean over the picture is: that is how a picture turns into a pattern."""
    x = frames[:1].clone()
    x[:, 1] += 2
    assert x.abs().max() < frames.abs().max()
    means = frames[:, 1].mean(dim=(-2, -1))
    assert means.abs().max() < 1 < x[:, 1].mean()
    assert limits(x)[:, 1].mean() <= means.abs().max()
    assert torch.equal(limits(x)[:, [0, 2]], x[:, [0, 2]]), "the other channels are left"


def test_limits_are_the_range_of_true_frames_but_for_rare_ones(limits: FrameLimits, frames: Tensor) -> None:
    found = coefficients(frames)
    assert torch.allclose(limits.middle.double(), found.mean(dim=0), atol=1e-4)
    beyond = ((found - limits.middle).abs() > limits.reach * (1 + 1e-5)).double().mean(dim=0)
    assert torch.equal((beyond * len(frames)).round(), torch.full((3, 4, 6), BEYOND * len(frames)).double())
    few = FrameLimits(3, 4, 6)
    few.fit(frames[:1])
    assert torch.equal(few.reach, torch.zeros(3, 4, 6)), "one frame has no range"
