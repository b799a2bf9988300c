"""Weights in and out of files: decided by looking at the keys, never by trying and catching.

Why it exists: upstream reads checkpoints with full pickle, tries one layout after another under a bare `except`, and
knows neither training checkpoints nor the prefixes that EMA, torch.compile and DDP leave behind. Every way in which a
file can be wrong ends here in one CheckpointError that says which.

Usage:
    state = read_state_dict("step_100000.pt")                     # EMA preferred, prefixes gone
    load_weights(module, select_part(state, "decoder"), path)     # strict; names the first mismatch
    save_weights(module, "decoder.safetensors", dtype=torch.bfloat16)
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from owl_wms.errors import CheckpointError
from owl_wms.vae.dcae import Variant

# Left behind by torch.compile and DDP, which wrap parts as well as whole models: they go, wherever they stand.
WRAPPERS = ("_orig_mod", "module")
# ema-pytorch stores the averaged weights, a copy of the trained ones, and two scalars: those go.
EMA = "ema_model"
ONLINE = "online_model"
EMA_STATE = ("initted", "step")
# Names of parts (a world model's core, the halves of an autoencoder), which stay until somebody asks for the part.
CORE = "core"
PARTS = ("decoder", "encoder")
_LEADING = {EMA, ONLINE, CORE, *PARTS}
# How torch.load(weights_only=True) words a refusal to run code, as opposed to bytes it cannot parse.
_FORBIDDEN = re.compile(r"[Uu]nsupported (global|GLOBAL|class)|unrecognized function|Can only build|not allowed")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_CONV_IN = "conv_in.parametrizations.weight.original1"
_CONV_OUT = "conv_out.parametrizations.weight.original1"
LATER_KEY = "residuals.0.proj.bias"


def read_state_dict(path: Path | str, *, prefer_ema: bool = True) -> dict[str, Tensor]:
    """Flat weights of a `.pt`/`.pth`/`.ckpt` or `.safetensors` file, on the CPU, without wrapper prefixes.

    Understands bare weights, `{"model", "ema", ...}` training checkpoints and the prefixes `ema_model.`, `_orig_mod.`
    and `module.` in any combination and order, also between or behind `core.`, `decoder.` and `encoder.`. Those are
    names of parts and are kept: see `select_part` and `strip_prefix`. A key that is unlike most others keeps its name,
    so that loading can report it.

    Args:
        prefer_ema: take the averaged weights where the file has both.

    Raises:
        CheckpointError: the file is missing, a folder, empty, truncated, not a checkpoint, or would run code when
            unpickled.
    """
    path = Path(path)
    _check_file(path)
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _flatten(raw, path, prefer_ema)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file", path=path)
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file; give the checkpoint file itself", path=path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes); copy or download it again", path=path)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as err:
        raise CheckpointError(f"{path}: truncated or not a safetensors file: {err}", path=path) from err


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # damaged bytes lead torch.load to raise almost anything
        reason = not_from_torch(path) or str(err).strip() or type(err).__name__
        if isinstance(err, pickle.UnpicklingError) and _FORBIDDEN.search(reason):
            named = _GLOBAL.search(reason)
            what = f" ({named[1]})" if named else ""
            text = (
                f"holds Python objects{what} that would run code when unpickled, which is refused; save plain tensors"
            )
            raise CheckpointError(f"{path}: {text}", path=path) from err
        reason = reason.split("WeightsUnpickler error:")[-1].strip().splitlines()[0][:200]
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
    if not head:
        return "it is empty"
    if head.startswith((b"PK", b"\x80")):
        return None
    words = " ".join(head.decode("ascii", errors="replace").split())
    begins = f" and begins with {words!r}" if words.isprintable() and words.isascii() else ""
    return f"torch.save did not write this file: it is neither a zip archive nor a pickle{begins}"


def _flatten(raw: Any, path: Path, prefer_ema: bool) -> dict[str, Tensor]:
    """The mapping of weights inside `raw`, prefixes stripped."""
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}, not a mapping of weights", path=path)
    candidates = (_tensors(raw.get(name)) for name in (("ema", "model") if prefer_ema else ("model", "ema")))
    weights = next((found for found in candidates if found), None) or _tensors(raw)
    if not weights:
        keys = ", ".join(sorted(map(str, raw))[:5]) or "none"
        raise CheckpointError(f"{path}: holds no weights; its keys are: {keys}", path=path)
    pairs = _averaged([(without_wrappers(key), value) for key, value in weights.items()], prefer_ema)
    flat: dict[str, Tensor] = {}
    for key, value in pairs:
        if key in flat:
            gone = ", ".join((*WRAPPERS, EMA))
            raise CheckpointError(f"{path}: two keys become one, {key}, once the prefixes {gone} are gone", path=path)
        flat[key] = value
    return flat


def _averaged(pairs: list[tuple[str, Tensor]], prefer_ema: bool) -> list[tuple[str, Tensor]]:
    """The averaged weights (or the trained ones beside them) without the average's prefix, part by part.

    A decoder may have been averaged while its encoder was frozen, so every part decides for itself.
    """
    leads = [_lead(key)[0] for key, _ in pairs]
    present = [name for name in (EMA, ONLINE) if any(name in lead for lead in leads)]
    if not present:
        return pairs
    wanted = present[0 if prefer_ema else -1]
    of_part = {part: [lead for lead in leads if _part(lead) == part] for part in map(_part, leads)}
    averaged = {part for part, own in of_part.items() if _mostly([EMA in lead or ONLINE in lead for lead in own])}
    kept = []
    for (key, value), lead in zip(pairs, leads, strict=True):
        if averaged and value.numel() == 1 and _lead(key)[1] in EMA_STATE:
            continue
        if _part(lead) in averaged and (EMA in lead or ONLINE in lead):
            if wanted not in lead:
                continue
            key = _drop(key, wanted)
        kept.append((key, value))
    return kept


def _tensors(source: Any) -> dict[str, Tensor]:
    if not isinstance(source, Mapping):
        return {}
    return {str(key): value for key, value in source.items() if isinstance(value, Tensor)}


def without_wrappers(key: str) -> str:
    """A key without the names that `WRAPPERS` put between its own."""
    return ".".join(piece for piece in key.split(".") if piece not in WRAPPERS)


def _lead(key: str) -> tuple[tuple[str, ...], str]:
    """The prefixes that a key begins with, in whatever order, and the rest of it, never empty."""
    pieces = key.split(".")
    count = next((i for i, piece in enumerate(pieces) if piece not in _LEADING), len(pieces) - 1)
    return tuple(pieces[:count]), ".".join(pieces[count:])


def _part(lead: tuple[str, ...]) -> str | None:
    return next((name for name in lead if name in PARTS), None)


def _drop(key: str, prefix: str) -> str:
    lead, rest = _lead(key)
    return ".".join((*(name for name in lead if name != prefix), rest))


def _mostly(answers: list[bool]) -> bool:
    return 2 * sum(answers) > len(answers)


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`state` without `prefix` (`core`, `decoder` or `encoder`) if most keys have it among their prefixes, else a copy.

    A key without it, and one whose shorter name is taken, stay as they are: loading reports them.
    """
    if not _mostly([prefix in _lead(key)[0] for key in state]):
        return dict(state)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        short = _drop(key, prefix)
        out[key if short in state or short in out else short] = value
    return out


def select_part(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The weights of one half of an autoencoder: from a full model by prefix, from a bare half as they are.

    Most keys decide which of the two it is. What belongs to neither half of a full model is left out.

    Args:
        part: "decoder" or "encoder".
    """
    if _mostly([_part(_lead(key)[0]) is not None for key in state]):
        state = strip_prefix({key: value for key, value in state.items() if _part(_lead(key)[0]) == part}, part)
    return strip_prefix(state, CORE)


def detect_variant(part: Mapping[str, Tensor], *, skip_residuals: bool = False) -> Variant:
    """Which revision a dcae half was saved by, "learned" or "tiled", from its keys.

    The later revision has `residuals.0.proj.bias`. Where its shortcuts are switched off, the kernel that faces the
    latents tells: 3x3 there, 1x1 in the tiled variant.
    """
    if LATER_KEY in part:
        return "learned"
    is_encoder = any(key.startswith("blocks.0.down.") for key in part)
    facing = part.get(_CONV_OUT if is_encoder else _CONV_IN)
    return "learned" if skip_residuals and facing is not None and facing.shape[-1] == 3 else "tiled"


def load_weights(module: nn.Module, state: Mapping[str, Tensor], path: Path | str, *, assign: bool = False) -> None:
    """Strictly load `state` into `module`, after comparing every key and shape.

    Args:
        path: the file the weights came from, for messages.
        assign: let the module take the tensors themselves; needed for a module built on the meta device.

    Raises:
        CheckpointError: with `.mismatch` naming the first key that is missing, unexpected, or of another shape (both
            shapes).
    """
    own = module.state_dict()
    problem = first_mismatch(own, state)
    if problem is not None:
        count = len(own.keys() ^ state.keys()) + sum(
            1 for k in own.keys() & state.keys() if own[k].shape != state[k].shape
        )
        text = f"{path}: does not belong to this {type(module).__name__}: {problem}"
        raise CheckpointError(
            text + (f" (the first of {count} mismatches)" if count > 1 else ""), path=path, mismatch=problem
        )
    if assign:
        state = {key: value.to(own[key].dtype) for key, value in state.items()}
    module.load_state_dict(state, strict=True, assign=assign)


def first_mismatch(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """First disagreement in the module's own key order, or None.

    A wrong shape, then a foreign key, then a missing one: a name that nothing was made of explains why the names that
    it should have had are missing.
    """
    for key, value in own.items():
        if key in given and given[key].shape != value.shape:
            return f"{key} is {list(given[key].shape)} in the file and {list(value.shape)} in the configured model"
    for key, value in given.items():
        if key not in own:
            return f"{key} {list(value.shape)} is in the file and not in the configured model"
    for key, value in own.items():
        if key not in given:
            return f"{key} {list(value.shape)} is missing from the file"
    return None


def save_weights(
    module: nn.Module,
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `module.state_dict()` as safetensors, floating-point tensors in `dtype`; returns the path.

    Args:
        metadata: strings kept in the file's header.

    Raises:
        CheckpointError: the suffix is not `.safetensors`, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: weights are written as .safetensors; give the file that suffix", path=path)
    state = {
        key: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in module.state_dict().items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path, metadata=dict(metadata or {}))
    except (OSError, safetensors.SafetensorError) as err:
        raise CheckpointError(f"{path}: cannot be written: {err}", path=path) from err
    return path
