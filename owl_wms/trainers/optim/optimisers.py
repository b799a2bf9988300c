"""Optimisers and learning-rate schedules by the names that configurations use.

Usage:
    optimiser = build_optimiser("Muon", model, {"lr": 1e-3, "adamw_keys": ["core.proj_in"]})
    warmup = build_schedule("LinearWarmup", {"warmup_steps": 500, "min_lr": 1e-6}, optimiser)
    warmup(step)          # before the optimiser's step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from owl_wms.errors import ConfigError
from owl_wms.trainers.optim.muon import MuonWithAdamW, build_muon

Optimiser = torch.optim.Optimizer | MuonWithAdamW


def build_optimiser(name: str, model: nn.Module, kwargs: Mapping[str, Any] | None) -> Optimiser:
    """An optimiser over the trainable parameters of `model`.

    Args:
        name: `Muon` or the name of a class in torch.optim.
        model: its parameters' names decide what Muon takes.
        kwargs: the optimiser's own arguments.

    Raises:
        ConfigError: an unknown name or argument.
    """
    settings = dict(kwargs or {})
    try:
        if name == "Muon":
            return build_muon(model.named_parameters(), **settings)
        made = getattr(torch.optim, name, None)
        if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
            raise ConfigError(
                f"train.opt: unknown optimiser {name!r}; use Muon or a class of torch.optim, such as AdamW",
                key="train.opt",
            )
        return made([p for p in model.parameters() if p.requires_grad], **settings)
    except TypeError as error:
        raise ConfigError(
            f"train.opt_kwargs: {name} cannot take {settings}: {error}", key="train.opt_kwargs"
        ) from error


def build_schedule(name: str | None, kwargs: Mapping[str, Any] | None, optimiser: Optimiser) -> Callable[[int], None]:
    """A function that sets the learning rates for a step; it depends on the step alone, so a resumed run needs no
    state of it.

    Args:
        name: `LinearWarmup` (arguments warmup_steps, min_lr: linear from min_lr to the optimiser's own rates), or None.
        kwargs: its arguments.
        optimiser: whose groups are set.

    Raises:
        ConfigError: an unknown name or wrong arguments.
    """
    if name is None:
        return lambda step: None
    if name != "LinearWarmup":
        raise ConfigError(
            f"train.scheduler: unknown scheduler {name!r}; valid are LinearWarmup, null", key="train.scheduler"
        )
    settings = dict(kwargs or {})
    if set(settings) - {"warmup_steps", "min_lr"} or settings.get("warmup_steps", 0) < 1:
        raise ConfigError(
            f"train.scheduler_kwargs: LinearWarmup takes warmup_steps (at least 1) and min_lr, got {settings}",
            key="train.scheduler_kwargs",
        )
    steps, lowest = settings["warmup_steps"], settings.get("min_lr", 0.0)
    targets = [group["lr"] for group in optimiser.param_groups]

    def warm_up(step: int) -> None:
        share = min(1.0, step / steps)
        for group, target in zip(optimiser.param_groups, targets, strict=True):
            group["lr"] = lowest + (target - lowest) * share

    return warm_up
