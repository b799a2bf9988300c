"""Optimisers and learning-rate schedules by the names that configurations use.

Usage:
    optimiser = build_optimiser("Muon", model, {"lr": 1e-3, "adamw_keys": ["core.proj_in"]})
    schedule = build_schedule("LinearDecay", {"warmup_steps": 300, "decay_steps": 5000}, optimiser, last_step=13000)
    schedule(step)          # before the optimiser's step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.errors import ConfigError
from owl_wms.files import one_line
from owl_wms.trainers.optim.muon import MuonWithAdamW, build_muon

Optimiser = torch.optim.Optimizer | MuonWithAdamW

SCHEDULES = {
    "LinearWarmup": ("warmup_steps", "min_lr"),
    "LinearDecay": ("warmup_steps", "decay_steps", "last_step", "min_lr"),
    "CosineDecay": ("warmup_steps", "decay_steps", "last_step", "min_lr"),
}
# A hyperparameter that tells one family of torch's optimisers from another; a state fits its own family alone.
_MARKS = ("betas", "momentum", "alpha", "rho", "lambd")
# Switches that need tensors of their own in the state; SGD alone makes them when they are missing.
_KEPT = ("amsgrad", "centered", "momentum")
# Tensors of a state that have the shape of their parameter.
_SHAPED = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def build_optimiser(name: str, model: nn.Module, kwargs: Mapping[str, Any] | None) -> Optimiser:
    """Build an optimiser over the trainable parameters of `model`.

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
    except (TypeError, ValueError, RuntimeError) as error:  # torch's own remarks on single values
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"train.opt_kwargs: {name} cannot take {settings}: {one_line(error)}", key="train.opt_kwargs"
        ) from error


def parts_of(optimiser: Optimiser) -> tuple[torch.optim.Optimizer, ...]:
    """Return the torch optimisers that an optimiser consists of."""
    return (optimiser.muon, optimiser.adamw) if isinstance(optimiser, MuonWithAdamW) else (optimiser,)


def load_optimiser(optimiser: Optimiser, state: Mapping[str, Any]) -> None:
    """Load a stored state, except for the hyperparameters: those of the configuration hold.

    Args:
        optimiser: as the configuration built it.
        state: from its `state_dict()`, or from upstream's checkpoints.

    Raises:
        ValueError: the state belongs to another optimiser, or to another split of the parameters.
    """
    if isinstance(optimiser, MuonWithAdamW) != ("muon" in state):
        stored = "Muon's" if "muon" in state else "a torch.optim class's"
        raise ValueError(f"the state of the optimiser is {stored}, and train.opt names another")
    states = [state["muon"], state["adamw"]] if isinstance(optimiser, MuonWithAdamW) else [state]
    for part, saved in zip(parts_of(optimiser), states, strict=True):
        own = [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
        for mine, theirs in zip(own, saved["param_groups"], strict=False):
            if any((mark in mine) != (mark in theirs) for mark in _MARKS):
                raise ValueError("the state of the optimiser belongs to another class than train.opt")
            added = next((name for name in _KEPT if mine.get(name) and not theirs.get(name)), None)
            if added is not None and not isinstance(part, torch.optim.SGD):
                raise ValueError(f"the state of the optimiser is of a run without {added}, which train.opt_kwargs adds")
        part.load_state_dict(dict(saved))
        for group, mine in zip(part.param_groups, own, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(mine, params=parameters)
        for parameter, entry in part.state.items():
            for key in _SHAPED:
                if isinstance(entry.get(key), Tensor) and entry[key].shape != parameter.shape:
                    raise ValueError("the state of the optimiser belongs to another split of the parameters")


def build_schedule(
    name: str | None, kwargs: Mapping[str, Any] | None, optimiser: Optimiser, *, last_step: int | None = None
) -> Callable[[int], None]:
    """Build a function that sets the learning rates for a step; it depends on the step alone, so that a resumed run
    needs no state of it.

    Args:
        name: one of the following, or None for constant rates.
            `LinearWarmup`: from min_lr to the optimiser's own rates over `warmup_steps`, then constant.
            `LinearDecay`, `CosineDecay`: the same with `warmup_steps` (default 0), and down to min_lr over the
            `decay_steps` before `last_step` (default: all that follow the warm-up).
        kwargs: its arguments; min_lr (default 0) is a rate, not a factor.
        optimiser: whose groups are set.
        last_step: what `last_step` is when `kwargs` do not say it; `train.max_steps` in a run.

    Raises:
        ConfigError: an unknown name or wrong arguments.
    """
    if name is None:
        return lambda step: None
    key = "train.scheduler"
    if name not in SCHEDULES:
        raise ConfigError(f"{key}: unknown scheduler {name!r}; valid are {', '.join(SCHEDULES)}, null", key=key)
    key, settings = "train.scheduler_kwargs", dict(kwargs or {})
    lowest = settings.get("min_lr", 0.0)
    if isinstance(lowest, bool) or not isinstance(lowest, (int, float)) or not 0 <= lowest < math.inf:
        raise ConfigError(f"{key}: min_lr must be a rate of at least 0, got {lowest!r}", key=key)
    whole = {n: settings[n] for n in ("warmup_steps", "decay_steps", "last_step") if settings.get(n) is not None}
    if set(settings) - set(SCHEDULES[name]) or any(type(value) is not int or value < 0 for value in whole.values()):
        raise ConfigError(
            f"{key}: {name} takes {', '.join(SCHEDULES[name])}, steps as whole numbers, got {settings}", key=key
        )
    warm, last = whole.get("warmup_steps", 0), whole.get("last_step", last_step)
    if name == "LinearWarmup":
        if warm < 1:
            raise ConfigError(f"{key}: LinearWarmup takes warmup_steps of at least 1, got {settings}", key=key)
        last = None
    elif last is None:
        raise ConfigError(f"{key}: {name} needs last_step, or train.max_steps", key=key)
    elif last - warm < max(1, whole.get("decay_steps", 1)):
        raise ConfigError(f"{key}: {name} has no room for {settings} between warm-up and its last step {last}", key=key)
    fall = whole.get("decay_steps") or (0 if last is None else last - warm)
    targets = [group["lr"] for group in optimiser.param_groups]

    def share(step: int) -> float:
        """Return 0 for min_lr and 1 for the optimiser's own rates."""
        up = min(1.0, step / warm) if warm else 1.0
        if last is None:
            return up
        left = min(1.0, max(0.0, (last - step) / fall))
        return up * (left if name == "LinearDecay" else 0.5 - 0.5 * math.cos(math.pi * left))

    def set_rates(step: int) -> None:
        for group, target in zip(optimiser.param_groups, targets, strict=True):
            group["lr"] = lowest + (target - lowest) * share(step)

    return set_rates
