"""Checkpoints on disk: written whole or not at all, read without running code, keys without wrappers' prefixes.

Usage:
    save_checkpoint(folder / "step_100.pt", {"model": model.state_dict(), "steps": 100})
    state = load_checkpoint(latest_checkpoint(folder))
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from owl_wms.errors import CheckpointError

_WRAPPERS = {"_orig_mod", "module"}
_NAME = re.compile(r"step_(\d+)\.pt")


def checkpoint_path(folder: Path | str, step: int) -> Path:
    """`{folder}/step_{step}.pt`."""
    return Path(folder) / f"step_{step}.pt"


def latest_checkpoint(folder: Path | str) -> Path | None:
    """The checkpoint of the highest step in `folder`, or None."""
    found = {int(match[1]): path for path in Path(folder).glob("step_*.pt") if (match := _NAME.fullmatch(path.name))}
    return found[max(found)] if found else None


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` beside `path`, flush it and rename it: a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a training checkpoint to the CPU, with `weights_only=True`.

    Raises:
        CheckpointError: no such file, not readable, or not a dictionary.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever zip, pickle or torch trip over
        raise CheckpointError(f"{path}: cannot read this checkpoint: {error}", path=path) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: a checkpoint must hold a dictionary, found {type(state).__name__}", path=path)
    return state


def strip_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keys without the parts that torch.compile (`_orig_mod`) and data parallelism (`module`) put between names."""
    return {".".join(part for part in key.split(".") if part not in _WRAPPERS): value for key, value in state.items()}


def weights_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights to use out of a training checkpoint or a bare dictionary: the average if any, else the model."""
    if isinstance(ema := state.get("ema"), Mapping):
        return {k.removeprefix("ema_model."): v for k, v in strip_wrappers(ema).items() if k.startswith("ema_model.")}
    model = state.get("model")
    return strip_wrappers(model if isinstance(model, Mapping) else state)


def load_core_weights(core: nn.Module, path: Path | str) -> None:
    """Load a core from a checkpoint of a core or of its wrapper (`core.*`).

    Raises:
        CheckpointError: unreadable, or weights of another architecture; names the first key that disagrees.
    """
    weights = weights_of(load_checkpoint(path))
    if any(key.startswith("core.") for key in weights):
        weights = {key.removeprefix("core."): value for key, value in weights.items() if key.startswith("core.")}
    expected = core.state_dict()
    for key in sorted(set(expected) ^ set(weights)):
        side = "lacks" if key in expected else "has unexpected"
        raise CheckpointError(f"{path}: {side} weight {key!r} for this model configuration", path=path, mismatch=key)
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            shapes = f"{tuple(weights[key].shape)} where the configuration wants {tuple(value.shape)}"
            raise CheckpointError(f"{path}: weight {key!r} is {shapes}", path=path, mismatch=key)
    core.load_state_dict(weights)
