"""Learning rates by step: warm-up, constant, cool-down; the same after a resume.

Run: python -m pytest tests/trainers/optim/test_schedules.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from owl_wms.errors import ConfigError
from owl_wms.trainers.optim.optimisers import build_optimiser, build_schedule
from tests.trainers.test_trainers import build


def rates(name: str, kwargs: dict[str, Any], steps: list[int], last_step: int | None = None) -> list[float]:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(name, kwargs, optimiser, last_step=last_step)
    found = []
    for step in steps:
        schedule(step)
        found.append(optimiser.param_groups[0]["lr"])
    return found


def test_a_linear_cool_down() -> None:
    kwargs = {"warmup_steps": 10, "decay_steps": 40, "min_lr": 0.2}
    found = rates("LinearDecay", kwargs, [0, 5, 10, 60, 80, 100, 200], last_step=100)
    assert found == pytest.approx([0.2, 0.6, 1.0, 1.0, 0.6, 0.2, 0.2])


def test_a_cosine_over_all_steps_after_the_warm_up() -> None:
    found = rates("CosineDecay", {"warmup_steps": 20, "last_step": 120}, [0, 20, 45, 70, 120])
    assert found == pytest.approx([0.0, 1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.0], abs=1e-9)


def test_every_part_of_muon_follows_with_its_own_rate() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimiser = build_optimiser("Muon", model, {"lr": 0.02, "adamw_lr": 0.001})
    build_schedule("LinearDecay", {"decay_steps": 10}, optimiser, last_step=10)(5)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.01, 0.0005])


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("LinearDecay", {}, "needs last_step, or train.max_steps"),
        ("LinearDecay", {"last_step": 10, "warmup_steps": 8, "decay_steps": 5}, "no room"),
        ("CosineDecay", {"last_step": 10, "warmup_steps": 10}, "no room"),
        ("CosineDecay", {"last_step": 1.5}, "steps as whole numbers"),
        ("LinearDecay", {"last_step": 10, "cooldown": 3}, "LinearDecay takes warmup_steps, decay_steps"),
        ("LinearWarmup", {"warmup_steps": 0}, "at least 1"),
        ("LinearWarmup", {"warmup_steps": 5, "decay_steps": 5}, "LinearWarmup takes warmup_steps, min_lr"),
    ],
)
def test_schedules_that_cannot_be(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        rates(name, kwargs, [0])
    assert caught.value.key == "train.scheduler_kwargs"


def test_a_resumed_run_cools_down_as_the_whole_one(tmp_path: Path) -> None:
    schedule = {"scheduler": "LinearDecay", "scheduler_kwargs": {"decay_steps": 3, "last_step": 4}}
    whole = build(tmp_path, "rft", max_steps=4, checkpoint_dir=str(tmp_path / "whole"), **schedule)
    whole.train()
    build(tmp_path, "rft", max_steps=2, checkpoint_dir=str(tmp_path / "cut"), **schedule).train()
    cut = {"checkpoint_dir": str(tmp_path / "cut"), "resume_ckpt": "latest"}
    rest = build(tmp_path, "rft", max_steps=4, **cut, **schedule)
    rest.train()
    assert rest.losses == whole.losses[2:]
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("AdamW", {"lr": -1}), ("AdamW", {"betas": [2, 3]}), ("SGD", {"nesterov": True})]
    + [("AdamW", {"fused": True, "foreach": True})],
)
def test_values_that_an_optimiser_refuses_are_one_line(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"train\.opt_kwargs: .* cannot take") as caught:
        build_optimiser(name, torch.nn.Linear(2, 2), settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lowest", ["x", None, -1, [1], True, float("nan")])
def test_a_lowest_rate_is_a_rate(lowest: object) -> None:
    optimiser = build_optimiser("AdamW", torch.nn.Linear(2, 2), {"lr": 1e-3})
    with pytest.raises(ConfigError, match="min_lr must be a rate"):
        build_schedule("LinearWarmup", {"warmup_steps": 1, "min_lr": lowest}, optimiser)
