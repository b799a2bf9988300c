"""Checkpoints on disk: written whole or not at all, read without running code, keys without wrappers' prefixes.

Usage:
    save_checkpoint(folder / "step_100.pt", {"model": model.state_dict(), "steps": 100})
    state = load_checkpoint(latest_checkpoint(folder))
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import re
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from owl_wms.errors import CheckpointError
from owl_wms.files import at_home
from owl_wms.interrupts import raise_interrupt
from owl_wms.memory import is_out_of_memory
from owl_wms.vae import load_weights, read_state_dict, select_core
from owl_wms.vae.layouts import without_wrappers
from owl_wms.vae.torch_files import load_torch
from owl_wms.whole import written_whole

LOG = "log.jsonl"
"""File beside the checkpoints, with a line per step."""
DRAFT_SECONDS = 3600
_NOT_IN_OLDER_WEIGHTS = ("transformer.sink_mark", "limits.middle", "limits.reach")
_NAME = re.compile(r"step_(\d+)\.pt")


def checkpoint_path(folder: Path | str, step: int) -> Path:
    """`{folder}/step_{step}.pt`."""
    return Path(folder) / f"step_{step}.pt"


def _checkpoints(folder: Path | str) -> dict[int, Path]:
    return {int(match[1]): path for path in at_home(folder).glob("step_*.pt") if (match := _NAME.fullmatch(path.name))}


def latest_checkpoint(folder: Path | str) -> Path | None:
    """Return the checkpoint of the highest step in `folder`, or None."""
    found = _checkpoints(folder)
    return found[max(found)] if found else None


def set_aside(folder: Path, step: int) -> Path | None:
    """Move checkpoints of later steps than `step` to `{folder}/set_aside_{n}`, and the log too if this run starts at 0.

    A run that is at `step` did not write them, and the next `--resume` would take the latest one for its own.

    Returns:
        Where they are now; None when there were none.
    """
    others = [path for number, path in sorted(_checkpoints(folder).items()) if number > step]
    if not others:
        return None
    place = next(place for n in itertools.count(1) if not (place := folder / f"set_aside_{n}").exists())
    place.mkdir()
    for path in [*others, *([folder / LOG] if step == 0 and (folder / LOG).exists() else [])]:
        path.rename(place / path.name)
    return place


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` beside `path`, flush it and rename it: a kill at any moment leaves the old file or the new one, and
    a draft that a later save removes.
    """
    _remove_dead_drafts(path.parent)
    with written_whole(path) as draft, draft.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())


def save_output(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights alone, whole or not at all: as safetensors where the suffix says so, else as `save_checkpoint`."""
    if path.suffix != ".safetensors":
        save_checkpoint(path, weights)
        return
    # A copy each: safetensors refuses names that share memory, as tied parameters do.
    state = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
    with written_whole(path) as draft:
        save_file(state, draft)


def _remove_dead_drafts(folder: Path) -> None:
    """Drafts of killed processes, each as large as a checkpoint. Whoever still writes one has touched it lately."""
    for draft in folder.glob(".step_*.tmp*"):
        with contextlib.suppress(OSError):
            if time.time() - draft.stat().st_mtime > DRAFT_SECONDS:
                draft.unlink()


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a training checkpoint to the CPU, without running code from it.

    Raises:
        CheckpointError: no such file, not readable, or not a dictionary.
    """
    path = at_home(path)
    try:
        there = path.is_file()
    except OSError as error:  # a name that is too long, a folder that nobody may look into
        raise CheckpointError(f"{path}: cannot read this checkpoint: {error.strerror}", path=path) from error
    if not there:
        reason = "no such file"
        if path.is_dir():
            reason = "it is a folder; name one of its step_N.pt, or set train.resume_ckpt to latest"
        raise CheckpointError(f"{path}: cannot read this checkpoint: {reason}", path=path)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: cannot read this checkpoint: .safetensors holds weights alone, and a run continues from a "
            "step_N.pt with its optimiser and position",
            path=path,
        )
    try:
        state = load_torch(path)
    except Exception as error:  # a damaged file raises whatever zip, pickle or torch trip over
        raise_interrupt(error)
        # torch's own text is not repeated: it advises to switch off the protection that refused the file.
        reason = "it is truncated, or no PyTorch checkpoint; use an earlier one"
        if isinstance(error, pickle.UnpicklingError) and _is_archive(path):
            reason = "it holds Python objects that would run code when unpickled, which is refused"
        elif is_out_of_memory(error):
            reason = f"its {path.stat().st_size / 2**30:.1f} GiB do not fit into memory; free some and start again"
        raise CheckpointError(f"{path}: cannot read this checkpoint: {reason}", path=path) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: a checkpoint must hold a dictionary, found {type(state).__name__}", path=path)
    return state


def _is_archive(path: Path) -> bool:
    """Return whether the file is a whole zip archive, as torch writes; is_zipfile may raise for a damaged directory."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def strip_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keys without the parts that torch.compile (`_orig_mod`) and data parallelism (`module`) put between names."""
    return {without_wrappers(key): value for key, value in state.items()}


def load_part(model: nn.Module, state: Mapping[str, Any], path: Path | str) -> None:
    """Load a network of a training checkpoint, whatever wrappers it was saved under.

    Raises:
        CheckpointError: weights of another architecture; one line with the first mismatch and their number.
    """
    load_weights(model, strip_wrappers(state), path)


def differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value before, value now) of the settings that both configurations have and that differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = [name for name in now if name in before]
        return [found for name in names for found in differences(before[name], now[name], f"{key}{name}.")]
    return [] if not key or before == now else [(key.rstrip("."), before, now)]


def averaged_weights(ema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the averaged model's weights, by the model's own keys, from the state of an `EMA`."""
    return {k.removeprefix("ema_model."): v for k, v in strip_wrappers(ema).items() if k.startswith("ema_model.")}


def load_core_weights(core: nn.Module, path: Path | str) -> None:
    """Load a core from any file that `owl_wms.models.load.load_model` reads: `.pt` or `.safetensors`, of a core or its
    wrapper.

    Weights of a model without sinks or limits of frames may begin one with them: its mark of sinks and its limits then
    stay as they are.

    Raises:
        CheckpointError: unreadable, or weights of another architecture; names the first key that disagrees.
    """
    own = {name: value for name, value in core.state_dict().items() if name in _NOT_IN_OLDER_WEIGHTS}
    load_weights(core, own | dict(select_core(read_state_dict(path), path)), path)
