"""Weights into and out of modules: every key, shape and value of a file is accounted for before a module is changed.

Why it exists: upstream reads checkpoints with full pickle, tries one layout after another under a bare `except`, and
knows neither training checkpoints nor the prefixes that EMA, torch.compile and DDP leave behind. Every way in which a
file can be wrong ends here in one CheckpointError that says which. `weight_files` reads the bytes, `layouts` knows the
containers and prefixes, `spellings` the names that older and other programs give to the same weights.

Usage:
    state = read_state_dict("step_100000.pt")                     # EMA preferred, prefixes gone
    load_weights(module, select_part(state, "decoder"), path)     # strict; names the first mismatch
    save_weights(module, "decoder.safetensors", dtype=torch.bfloat16)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from owl_wms.errors import CheckpointError
from owl_wms.files import at_home
from owl_wms.vae.dcae import Variant
from owl_wms.vae.eight_bits import unpacked
from owl_wms.vae.layouts import flat_weights
from owl_wms.vae.spellings import direction, respelled
from owl_wms.vae.weight_files import read_content
from owl_wms.whole import why_unwritten, written_whole

LATER_KEY = "residuals.0.proj.bias"


def read_state_dict(path: Path | str, *, prefer_ema: bool = True) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint by flat names, on the CPU, without wrapper prefixes; 8 bits become fp32.

    Args:
        path: any file or folder that `weight_files.read_content` reads.
        prefer_ema: take the averaged weights where there are both.

    Raises:
        CheckpointError: the file is missing, empty, truncated, not a checkpoint, or would run code when unpickled; or
            it holds no weights, or several sets between which nothing decides.
    """
    return unpacked(flat_weights(read_content(path), path, prefer_ema=prefer_ema), path)


def detect_variant(part: Mapping[str, Tensor], *, skip_residuals: bool = False) -> Variant:
    """Detects which revision a dcae half was saved by, "learned" or "tiled", from its keys.

    The later revision has `residuals.0.proj.bias`. Where its shortcuts are switched off, the kernel that faces the
    latents tells: 3x3 there, 1x1 in the tiled variant.
    """
    if LATER_KEY in part:
        return "learned"
    is_encoder = any(key.startswith("blocks.0.down.") for key in part)
    facing = direction(part, "conv_out" if is_encoder else "conv_in")
    return "learned" if skip_residuals and facing is not None and facing.shape[-1] == 3 else "tiled"


def load_weights(module: nn.Module, state: Mapping[str, Tensor], path: Path | str, *, assign: bool = False) -> None:
    """Strictly load `state` into `module`, after comparing every key, shape and kind of value.

    Weights under another spelling of the same name are taken (`spellings.respelled`), as are weights whose norm was
    folded for a module that has it live, and the other way round. Of weights that several layers share, one name is
    enough.

    Args:
        path: the file the weights came from, for messages.
        assign: let the module take the tensors themselves; needed for a module built on the meta device.

    Raises:
        CheckpointError: with `.mismatch` naming the first key that is missing, unexpected, of another shape (both
            shapes), sparse, quantised, complex, without values, not finite, or given twice with different values.
    """
    own = module.state_dict()
    require_plain(state, path)
    state = respelled(state, own)
    shared = _shared_names(module)
    for names in shared:  # of which a writer may keep one, as safetensors' `save_model` does
        given = next((name for name in names if name in state), None)
        state |= {name: state[given] for name in names if given is not None and name not in state}
    problem = first_mismatch(own, state)
    if problem is not None:
        count = len(own.keys() ^ state.keys()) + sum(
            1 for k in own.keys() & state.keys() if own[k].shape != state[k].shape
        )
        found = f"{path}: does not belong to this {type(module).__name__}: {problem}"
        found += f" (the first of {count} mismatches)" if count > 1 else ""
        remedy = "these weights need the configuration that they were trained with"
        raise CheckpointError(f"{found}; {remedy}", path=path, mismatch=problem)
    problem = next((text for key, value in state.items() if (text := _unlike(key, value, own[key]))), None)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}", path=path, mismatch=problem)
    for first, *others in shared:
        other = next((name for name in others if (state[name] != state[first]).any()), None)
        if other is not None:
            text = f"{first} and {other} are one weight in the configured model, and differ in the file"
            raise CheckpointError(f"{path}: {text}; give the file of this model", path=path, mismatch=other)
    if assign:
        state = separate({key: value.to(own[key].dtype) for key, value in state.items()})
    module.load_state_dict(state, strict=True, assign=assign)


def _shared_names(module: nn.Module) -> list[list[str]]:
    """Returns the names of each weight that several layers share."""
    names: dict[int, list[str]] = {}
    for name, held in module.state_dict(keep_vars=True).items():
        names.setdefault(id(held), []).append(name)
    return [shared for shared in names.values() if len(shared) > 1]


def require_plain(state: Mapping[str, Tensor], path: Path | str) -> None:
    """Raise CheckpointError naming the first tensor that cannot be a weight: sparse, nested, quantised, complex, or
    without values.
    """
    problem = next((text for key, value in state.items() if (text := _unfit(key, value))), None)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}", path=path, mismatch=problem)


def _unfit(key: str, value: Tensor) -> str | None:
    """Returns why a tensor cannot be a weight of any module here, or None."""
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"{key} is a {type(value).__name__}, and a plain tensor is needed"
    if value.is_nested or value.layout != torch.strided:
        return f"{key} is {'nested' if value.is_nested else value.layout}, and a dense tensor is needed"
    if value.is_meta:
        return f"{key} has a shape and no values (meta device); save the weights themselves"
    if value.is_quantized or value.is_complex():
        return f"{key} is {value.dtype}, and real numbers are needed; save the weights before they are quantised"
    return None


def check_values(module: nn.Module, path: Path | str) -> None:
    """Raise CheckpointError naming the first weight of `module` that has NaN or infinity in it.

    Weights that were finite in their file are so no longer if they were cast to a dtype that does not reach so far.
    """
    _require_finite(module.state_dict(), path)


def _require_finite(state: Mapping[str, Tensor], path: Path | str) -> None:
    wrong = next((key for key, value in state.items() if not _is_finite(value)), None)
    if wrong is not None:
        dtype = state[wrong].dtype
        text = f"{wrong} has values that are not finite (NaN or infinite) in {str(dtype).removeprefix('torch.')}"
        remedy = "; use bf16 or fp32" if dtype == torch.float16 else ""
        raise CheckpointError(f"{path}: {text}{remedy}", path=path, mismatch=wrong)


def _unlike(key: str, value: Tensor, own: Tensor) -> str | None:
    """Returns why the values of a weight of the right shape cannot be those of `own`, or None."""
    if value.is_floating_point() != own.is_floating_point():
        # An integer for a float is a quantised weight whose scale is not applied.
        return f"{key} is {value.dtype} in the file and {own.dtype} in the configured model"
    if _is_finite(value):
        return None
    return f"{key} has values that are not finite (NaN or infinite); use a checkpoint from before the run diverged"


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    low, high = torch.aminmax(value if value.itemsize > 1 else value.float())  # NaN passes through both
    return bool(low.isfinite() & high.isfinite())


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

    Weights that share memory (tied layers) are written under each of their names. A file that stood there stays whole
    until the new one is.

    Args:
        metadata: strings stored in the file's header.

    Raises:
        CheckpointError: the suffix is not `.safetensors`, a weight is sparse, quantised, complex, on the meta device or
            not finite in `dtype`, or the file cannot be written.
    """
    path = at_home(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: weights are written as .safetensors; give the file that suffix", path=path)
    weights = module.state_dict()
    require_plain(weights, path)
    state = separate(
        {
            key: (value.to(dtype) if value.is_floating_point() else value).detach().cpu()
            for key, value in weights.items()
        }
    )
    _require_finite(state, path)
    try:
        with written_whole(path) as draft:
            save_file(state, draft, metadata=dict(metadata or {}))
    except (OSError, safetensors.SafetensorError) as err:
        raise CheckpointError(f"{path}: cannot be written: {why_unwritten(err)}", path=path) from err
    return path


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors contiguous and each with memory of its own, copied only where it is not so already."""
    taken: set[int] = set()
    out = {}
    for key, value in state.items():
        storage = value.untyped_storage()
        alone = value.is_contiguous() and storage.nbytes() == value.nbytes and storage.data_ptr() not in taken
        out[key] = value if alone else value.clone(memory_format=torch.contiguous_format)
        taken.add(out[key].untyped_storage().data_ptr())
    return out
