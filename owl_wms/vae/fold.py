"""Weight norm folded into plain convolutions, once and in float32.

Why it exists: with the parametrization in place, `g * v / ||v||` is recomputed for every convolution of every call, in
whatever precision the module has; a compiler cannot fold it away either. Folding first and casting afterwards is both
faster and nearer to the float32 decoder than upstream's order.

Usage:
    plain = fold_weight_norm(decoder)       # new module, conv.weight are ordinary parameters; decoder is untouched
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm


def fold_weight_norm(module: nn.Module) -> nn.Module:
    """A copy of `module` without weight-norm parametrizations.

    The weights are computed in float32 (bit-identical to the live ones for a float32 module) and then take the dtype
    the module has. Works for Conv1d and Conv2d normed over all but the first dimension, on any device including meta;
    whatever else the module has is copied, its hooks shared.

    Raises:
        Exception: whatever `copy.deepcopy` raises for a module that cannot be copied (one that holds a lock, say).
    """
    memo = shared_hooks(module)
    for child in module.modules():
        if _is_weight_normed(child):
            memo[id(child)] = _plain(cast(Any, child), memo)
    # deepcopy takes the prepared convolutions from its memo, so the unfolded ones are never copied.
    return copy.deepcopy(module, memo)


def folded(module: nn.Module) -> nn.Module:
    """`fold_weight_norm(module)`, or `module` itself where nothing is parametrized, so nothing could be folded."""
    live = any(parametrize.is_parametrized(child) for child in module.modules())
    return fold_weight_norm(module) if live else module


def shared_hooks(module: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy` with which a copy calls the very hooks of the original, and has its own list of them.

    A hook may belong to anything: an object that cannot be copied, or one that is to see what the copy does.
    """
    return {
        id(value): value.copy()
        for child in module.modules()
        for name, value in vars(child).items()
        if isinstance(value, dict) and name.startswith("_") and "hooks" in name
    }


def _is_weight_normed(conv: nn.Module) -> bool:
    # Only plain weight norm is folded. A convolution stays as it is if it is a subclass, if its bias is parametrized
    # too, or if its weight has a second parametrization.
    if type(conv).__bases__ not in ((nn.Conv1d,), (nn.Conv2d,)) or not parametrize.is_parametrized(conv, "weight"):
        return False
    if any(callable(value) for value in vars(conv).values()):  # a forward of its own, say, which a new one would lack
        return False
    alone = len(cast(Any, conv).parametrizations) == 1 and len(_parametrization(conv)) == 1
    return alone and isinstance(_parametrization(conv)[0], _WeightNorm) and _parametrization(conv)[0].dim == 0


def _parametrization(conv: nn.Module) -> Any:
    """The parametrization list of the weight.

    Its tensors `original0` and `original1` are not known to type checkers.
    """
    return cast(Any, conv).parametrizations.weight


class _Bare1d(nn.Conv1d):
    def reset_parameters(self) -> None:
        """Nothing: weights follow, and drawing random ones on the meta device would import sympy (half a second)."""


class _Bare2d(nn.Conv2d):
    def reset_parameters(self) -> None:
        """Nothing, as above."""


@torch.no_grad()
def _plain(conv: nn.Conv1d | nn.Conv2d, hooks: dict[int, Any]) -> nn.Conv1d | nn.Conv2d:
    bare = _Bare1d if isinstance(conv, nn.Conv1d) else _Bare2d
    with torch.device("meta"):
        plain = bare(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )
    plain.__class__ = bare.__base__  # type: ignore[assignment]
    weights = _parametrization(conv)
    gain, direction = weights.original0, weights.original1
    plain.weight = _parameter(weight_norm_product(gain, direction), direction.requires_grad)
    if conv.bias is not None:
        plain.bias = _parameter(conv.bias.detach().clone(), conv.bias.requires_grad)
    # Those of the forward: weight norm itself hangs one onto the loading of checkpoints, which nobody needs here.
    forward = {name: value for name, value in vars(conv).items() if id(value) in hooks and "forward" in name}
    vars(plain).update({name: hooks[id(value)] for name, value in forward.items()})
    return plain.train(conv.training)


def weight_norm_product(gain: Tensor, direction: Tensor) -> Tensor:
    """`g * v / ||v||`, norm over all dimensions but 0, computed in at least float32, in the dtype of `direction`."""
    if direction.is_meta:  # a shape is all there is, and torch's rule for it imports torch._dynamo (a second)
        return torch.empty(direction.shape, dtype=direction.dtype, device="meta")
    wide = torch.promote_types(direction.dtype, torch.float32)
    return torch._weight_norm(direction.to(wide), gain.to(wide), 0).to(direction.dtype)


def _parameter(value: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=requires_grad)
