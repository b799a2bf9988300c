"""Other names for the same weights: both weight norms of torch, a folded norm, and this package's older audio names.

Usage:
    state = respelled(state, module.state_dict())       # keys as the module has them, wherever that is possible
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from owl_wms.vae.fold import weight_norm_product

# torch.nn.utils.parametrizations.weight_norm and the older torch.nn.utils.weight_norm: gain, then direction.
GAIN, DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"
OLD_GAIN, OLD_DIRECTION = "weight_g", "weight_v"
FOLDED = "weight"
_RENAMES = (
    (re.compile(rf"\b{OLD_GAIN}$"), GAIN),
    (re.compile(rf"\b{OLD_DIRECTION}$"), DIRECTION),
    # Releases of this package before 2026-11 numbered the residual blocks of the audio decoder.
    (re.compile(r"^(blocks\.\d+)\.blocks\.([012])\."), lambda m: f"{m[1]}.block{int(m[2]) + 1}."),
    (re.compile(r"^act_out\."), "final."),
)


def respelled(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state` with the keys of `own` where a key is only another spelling, and other keys as they are.

    Where `own` has a weight norm and `state` its folded product, the product becomes the direction and its norm the
    gain; a row of zeros gets the gain 0. Where it is the other way round, the product is computed in float32.

    Args:
        state: dense tensors by name.
        own: tensors of a module by name; only names and shapes are used, so they may be on the meta device.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in _RENAMES:
            if not _is_known(name, own):
                name = pattern.sub(replacement, name)
        taken = name in state or name in out
        out[name if _is_known(name, own) and not taken else key] = value
    for key in list(out):
        if key not in own:
            _refold(key, out, own)
    return out


def _is_known(name: str, own: Mapping[str, Tensor]) -> bool:
    """Returns whether `own` has the weight `name`, with its norm live or folded."""
    live = name.removesuffix(FOLDED) + DIRECTION
    return name in own or _beside(name, own) is not None or (name.split(".")[-1] == FOLDED and live in own)


def _beside(name: str, own: Mapping[str, Tensor]) -> str | None:
    """Returns the folded weight of which `name` is the gain or direction, if `own` has that."""
    for half in (GAIN, DIRECTION):
        folded = name.removesuffix(half) + FOLDED
        if name.endswith(half) and folded in own:
            return folded
    return None


def _refold(key: str, out: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Changes the folded or live norm under `key` to the form that `own` has; leaves it if the shapes do not fit."""
    if key.split(".")[-1] == FOLDED:
        stem = key.removesuffix(FOLDED)
        gain, way = stem + GAIN, stem + DIRECTION
        if way in own and gain in own and not {gain, way} & out.keys():
            value = out.pop(key)
            out[way] = value
            if value.shape == own[way].shape:
                out[gain], out[way] = _split(value)
        return
    folded = _beside(key, own)
    if folded is None or folded in out:
        return
    stem = folded.removesuffix(FOLDED)
    gain, way = stem + GAIN, stem + DIRECTION
    if {gain, way} <= out.keys() and out[way].shape == own[folded].shape and out[gain].numel() == len(out[way]):
        out[folded] = weight_norm_product(out.pop(gain), out.pop(way))


def _split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a gain `[n, 1, ...]` and a direction whose normed product is `weight`.

    The gain is the very norm by which weight norm will divide, so on this device the product is equal bit for bit.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
    _, gain = torch._weight_norm_interface(wide, wide.new_ones(len(wide), *[1] * (wide.dim() - 1)), 0)
    return gain, torch.where(gain > 0, wide, torch.ones_like(wide))


def direction(state: Mapping[str, Tensor], layer: str) -> Tensor | None:
    """Returns the tensor that has the shape of a layer's weight, under whichever of its spellings `state` has."""
    names = (DIRECTION, OLD_DIRECTION, FOLDED)
    return next((state[f"{layer}.{name}"] for name in names if f"{layer}.{name}" in state), None)
