"""Files and folders that hold weights, read without running code from them and without mapping them.

Why no mapping: a tensor over a mapped file changes when somebody copies a newer checkpoint over that file, and reading
it kills the process when the file has become shorter.

Usage:
    content = read_content("step_100000.pt")                      # whatever torch.save wrote
    content = read_content("model.safetensors.index.json")        # shards, named by their index, by a part or a folder
    content = read_content("checkpoints/step_100")                # a folder of torch.distributed.checkpoint
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from owl_wms.errors import CheckpointError
from owl_wms.files import POINTER, at_home, false_claims, foreign_to_torch, is_pointer
from owl_wms.interrupts import raise_interrupt
from owl_wms.memory import is_out_of_memory
from owl_wms.vae.layouts import is_training_state
from owl_wms.vae.pieces import read_pieces, safetensors_places
from owl_wms.vae.torch_files import FORBIDDEN, load_torch

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
INDEX = ".index.json"
DISTRIBUTED = ".metadata"
MAX_INDEX_BYTES = 1 << 26
# Names that diffusers, transformers and accelerate give to the weights in a folder of theirs.
USUAL_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
# Either may name a variant: `model-00001-of-00002.fp16.safetensors`, `model.safetensors.index.fp16.json`.
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>(\.\w+)+)")
_INDEX = re.compile(r".+\.index(\.\w+)?\.json")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_FRAMED = "Unsupported operand 149"  # the FRAME of pickle's protocols from 4 on


def read_content(path: Path | str) -> Any:
    """Returns the content of a weight file or folder, tensors on the CPU, as it was written.

    Args:
        path: `.safetensors`, or anything that `torch.save` wrote; the index of shards, one shard or the folder with
            them; a folder of torch.distributed.checkpoint; a folder with a single weight file. `~` is expanded.

    Raises:
        CheckpointError: missing, empty, truncated, no checkpoint, a shard that is absent, a pipe or device, or Python
            objects that would run code.
    """
    path = at_home(path)
    try:
        return _read(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}", path=path) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: its weights do not fit into memory; free some of it", path=path) from error


def _read(path: Path) -> Any:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file", path=path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file; give the checkpoint file itself", path=path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes); copy or download it again", path=path)
    if _INDEX.fullmatch(path.name):
        return _read_index(path)
    shard = _SHARD.fullmatch(path.name)
    if shard is not None:
        return _read_numbered(path, shard)
    return _read_file(path)


def _read_file(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
    # By content too: a safetensors file begins with the length of its header, which is JSON.
    if path.suffix.lower() == ".safetensors" or (head[8:] == b"{" and not any(head[5:8])):
        return _read_safetensors(path)
    return _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            places = safetensors_places(file)
            if places is not None:
                return read_pieces(file, places)
        return dict(safetensors.torch.load(path.read_bytes()))  # where something is wrong, it says what
    except (safetensors.SafetensorError, ValueError, KeyError, AssertionError, TypeError, AttributeError) as err:
        with path.open("rb") as file:
            reason = POINTER if is_pointer(file.read(16)) else err
        raise CheckpointError(f"{path}: truncated or not a safetensors file: {reason}", path=path) from err


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        claims = false_claims(file)
    if claims is not None:
        raise CheckpointError(f"{path}: truncated or not a PyTorch checkpoint: {claims}", path=path)
    try:
        return load_torch(path)
    except Exception as err:  # damaged bytes lead torch.load to raise almost anything
        raise_interrupt(err)
        if is_out_of_memory(err):
            raise
        reason = not_from_torch(path) or str(err).strip() or type(err).__name__
        if isinstance(err, pickle.UnpicklingError) and FORBIDDEN.search(reason):
            named = _GLOBAL.search(reason)
            what = f" ({named[1]})" if named else ""
            text = (
                f"holds Python objects{what} that would run code when unpickled, which is refused; save plain tensors"
            )
            raise CheckpointError(f"{path}: {text}", path=path) from err
        reason = reason.split("WeightsUnpickler error:")[-1].strip().splitlines()[0][:200]
        if reason == _FRAMED:
            text = "was saved with pickle_protocol 4 or 5, which is not read here; save it again without that argument"
            raise CheckpointError(f"{path}: {text}", path=path) from err
        raise CheckpointError(f"{path}: truncated or not a PyTorch checkpoint: {reason}", path=path) from err


def not_from_torch(path: Path) -> str | None:
    """Why a file cannot be one that `torch.save` wrote (a zip archive, formerly a pickle), or None when it may be.

    By its first bytes: torch.load takes any other for a pickle, and reports `101` for a text.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:  # torch.load has said so
        return None
    return foreign_to_torch(head)


# ---- several files


def files_of(path: Path | str) -> list[Path]:
    """Returns the files that the weights in one file come from: that file alone, or an index and all of its shards.

    Args:
        path: a file. An index may stand for its shards, and a shard for all of them.

    Raises:
        CheckpointError: an index that cannot be used.
        OSError: it cannot be read.
    """
    path = at_home(path)
    shard = _SHARD.fullmatch(path.name)
    index = path if shard is None else _index_of(path, shard)
    if _INDEX.fullmatch(index.name) and index.is_file():
        return [index, *(index.with_name(name) for name in sorted(set(_places(index).values())))]
    return [path] if shard is None else [path.with_name(name) for name in _numbered(shard)]


def _index_of(path: Path, shard: re.Match[str]) -> Path:
    return path.with_name(f"{shard['stem']}{shard['suffix']}{INDEX}")


def _numbered(shard: re.Match[str]) -> list[str]:
    stem, count, suffix = shard["stem"], shard["count"], shard["suffix"]
    return [f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1)]


def _places(path: Path) -> dict[str, str]:
    """Returns the file of each weight that an index names."""
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"it is larger than {MAX_INDEX_BYTES} bytes")
        index = json.loads(path.read_bytes())
        places = index["weight_map"]
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError("weight_map must map names to files")
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        reason = f"no {err}" if isinstance(err, KeyError) else err
        raise CheckpointError(f"{path}: not an index of weight files: {reason}", path=path) from err
    return places


def _read_index(path: Path) -> dict[str, Any]:
    """Reads the shards that an index names, and checks that they hold what it says and nothing else."""
    places = _places(path)
    state: dict[str, Any] = {}
    for name in sorted(set(places.values())):
        shard = _read_shard(path, name)
        named = {key for key, place in places.items() if place == name}
        odd = next(iter(sorted(named ^ shard.keys(), key=str)), None)
        if odd is not None:
            where = "is not in that file" if odd in named else "is in that file and not in the index"
            raise CheckpointError(f"{path}: does not belong to {name}: {odd} {where}", path=path, mismatch=str(odd))
        state |= shard
    return state


def _read_numbered(path: Path, shard: re.Match[str]) -> dict[str, Any]:
    """Reads all the shards of which `path` is one, by the index beside it if there is one, else by their numbers."""
    index = _index_of(path, shard)
    if index.is_file():
        return _read_index(index)
    state: dict[str, Any] = {}
    for name in _numbered(shard):
        content = _read_shard(path, name)
        twice = next(iter(state.keys() & content.keys()), None)
        if twice is not None:
            raise CheckpointError(f"{path}: {twice} is in two of its {shard['count']} parts", path=path)
        state |= content
    return state


def _read_shard(path: Path, name: str) -> dict[str, Any]:
    """Reads one part that stands beside `path`."""
    if not name or Path(name).name != name:
        raise CheckpointError(f"{path}: a part must be a file beside it, not {name!r}", path=path)
    part = path.with_name(name)
    if not part.is_file() or part.stat().st_size == 0:
        raise CheckpointError(f"{path}: its part {name} is missing or empty; copy or download it", path=path)
    content = _read_file(part)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{part}: holds a {type(content).__name__}, not a mapping of weights", path=part)
    return dict(content)


def _read_folder(path: Path) -> Any:
    # Hidden files are those of systems (`._model.safetensors`).
    names = sorted(entry.name for entry in os.scandir(path) if entry.name[0] != "." or entry.name == DISTRIBUTED)
    if DISTRIBUTED in names:
        return _read_distributed(path)
    indices = [name for name in names if name.endswith(INDEX)]
    variants = [name for name in names if _INDEX.fullmatch(name)]  # `fp16` beside the weights in full is not meant
    files = [name for name in names if name.endswith(SUFFIXES) and not _SHARD.fullmatch(name)]
    files = [name for name in files if not is_training_state(Path(name).stem)] or files
    usual = [name for name in USUAL_NAMES if name in files]
    chosen = indices or usual[:1] or files or variants
    if not chosen:
        shards = [name for name in names if _SHARD.fullmatch(name)]
        chosen = shards[:1]
    if len(chosen) == 1:
        return _read(path / chosen[0])
    found = f"it has {', '.join(chosen[:4])}" if chosen else "it has no weights that are known by name"
    raise CheckpointError(f"{path}: is not a file, and {found}; give the checkpoint file itself", path=path)


def _read_distributed(path: Path) -> dict[str, Any]:
    """Reads the tensors of a folder that torch.distributed.checkpoint wrote, in this process alone."""
    from owl_wms.vae.distributed_files import read_distributed  # imports torch.distributed.checkpoint, a second

    return read_distributed(path)
