"""Step sizes against the values that diffusers' scheduler gives, and controls that are long enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from owl_wms.errors import ConfigError
from owl_wms.sampling import (
    batch_permute,
    batch_permute_to_length,
    custom_deltas,
    get_sampler_cls,
    get_sd3_euler,
    zlerp,
)
from owl_wms.sampling.schedule import check_order, take_step


@pytest.mark.parametrize(("steps", "wanted"), [(1, [1.0]), (2, [0.25, 0.75]), (4, [0.1, 0.15, 0.25, 0.5])])
def test_step_sizes_known_by_heart(steps: int, wanted: list[float]) -> None:
    assert torch.allclose(get_sd3_euler(steps), torch.tensor(wanted), atol=1e-7)


@pytest.mark.parametrize("steps", [1, 3, 16, 50])
def test_step_sizes_are_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    # From noise level 1 in even steps, which is how the samplers' schedule was made.
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    assert torch.allclose(get_sd3_euler(steps), -scheduler.sigmas.diff(), atol=1e-6)
    assert abs(float(get_sd3_euler(steps).sum()) - 1) < 1e-6


def test_custom_schedules_end_at_zero_and_stay_untouched() -> None:
    given = [1.0, 0.5]
    assert torch.allclose(custom_deltas(given), torch.tensor([0.5, 0.5]))
    assert torch.allclose(custom_deltas([1.0, 0.75, 0.0]), torch.tensor([0.25, 0.75]))
    assert given == [1.0, 0.5]


@pytest.mark.parametrize("schedule", [[], [0.0], [0.9, 0.5], [1.0, 1.0], [1.0, 0.2, 0.5]])
def test_schedules_that_do_not_fall_from_one_are_refused(schedule: list[float]) -> None:
    with pytest.raises(ConfigError, match="fall strictly"):
        custom_deltas(schedule)


@pytest.mark.parametrize("steps", [0, -1, 0.5, 2.0, 10_001, 2**31, 2**70, float("nan"), float("inf"), "4", None])
def test_numbers_of_steps_that_are_none_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigError, match="n_steps must be at"):
        get_sd3_euler(steps)


@pytest.mark.parametrize(("order", "error"), [(1, 0.05), (2, 0.005)])
def test_steps_of_order_two_miss_a_curve_by_the_square(order: int, error: float) -> None:
    """x' = x from level 1 to 0 gives x / e; with twice the steps the error falls to a half, or to a quarter."""

    def end(steps: int) -> float:
        x, velocities, sizes = torch.ones((), dtype=torch.float64), [], get_sd3_euler(steps).tolist()
        for done in range(1, steps + 1):
            velocities.append(x)
            x = take_step(x, velocities, sizes[:done], order)
        return abs(x.item() * torch.e - 1)

    assert end(16) < error
    assert end(16) / end(32) == pytest.approx(2**order, rel=0.1)


def test_orders_that_are_none_are_refused() -> None:
    assert [check_order(1), check_order(2)] == [1, 2]
    for order in (0, 3, "2", None):
        with pytest.raises(ConfigError, match="order must be 1"):
            check_order(order)  # type: ignore[arg-type]


def test_zlerp_ends() -> None:
    x = torch.randn(50, 50)
    assert torch.equal(zlerp(x, 0.0), x)
    noise = zlerp(x, 1.0)
    assert abs(float(noise.std()) - 1) < 0.1
    assert abs(float((noise * x).mean())) < 0.1


def test_longer_controls_are_others_controls() -> None:
    mouse = torch.arange(3.0)[:, None, None].expand(3, 4, 2)
    button = torch.arange(3.0)[:, None, None].expand(3, 4, 11)
    long_mouse, long_button = batch_permute_to_length(mouse, button, 11)
    assert (long_mouse.shape, long_button.shape) == ((3, 11, 2), (3, 11, 11))
    assert torch.equal(long_mouse[:, :4], mouse)
    assert torch.equal(long_mouse[..., 0], long_button[..., 0]), "one permutation for both"
    assert sorted(batch_permute(mouse, button)[0][:, 5, 0].tolist()) == [0, 1, 2]
    assert batch_permute_to_length(mouse, button, 3)[0].shape == (3, 3, 2)
    with pytest.raises(ValueError, match="n > 0"):
        batch_permute_to_length(mouse[:, :0], button[:, :0], 3)


def test_unknown_samplers_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'av_caching'.*av_causal_no_cfg.*av_window"):
        get_sampler_cls("av_cacheing")
