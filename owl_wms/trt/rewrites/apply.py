"""Rewrites a decoder before it is exported. Each rewrite in the list is exact or states its error.

Why it exists: TensorRT is only as good as the graph it is given. Every rewrite here replaces a module by one that
computes the same thing in operators TensorRT runs well, and each has an equivalence test against the module it
replaces. "Exact" means equal in exact arithmetic: what remains is the rounding of a different order of operations.

Usage:
    names = apply_rewrites(module, recording.shapes, ("replace_bicubic", "replace_landscape_operations"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from owl_wms.errors import FastPathError
from owl_wms.trt.graph.shapes import module_dtype
from owl_wms.trt.rewrites.resize import MatmulResize
from owl_wms.vae import autoencoder_dc
from owl_wms.vae.blocks import Upsample
from owl_wms.vae.landscape import SquareToLandscape, nearest_landscape

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewrite:
    """One replacement.

    Attributes:
        name: what reports and the manifest call it.
        error: "exact", or what differs and by how much.
        apply: `(module, shapes, dtype) -> number of places`; changes `module` in place. `shapes` are its submodules'
            input shapes.
    """

    name: str
    error: str
    apply: Callable[[nn.Module, Shapes, torch.dtype], int]


def apply_rewrites(module: nn.Module, shapes: Shapes, names: tuple[str, ...]) -> dict[str, int]:
    """Apply the named rewrites in order, in place; `{name: places changed}`.

    Args:
        module: a folded decoder, already in the dtype it will run in (constants are made to fit it).
        shapes: input shapes of its submodules before the first rewrite (`Recording.shapes`); no rewrite changes one
            that a later rewrite asks for.

    Raises:
        FastPathError: stage "export" for a name that is not in `REWRITES`.
    """
    done: dict[str, int] = {}
    for name in names:
        if name not in REWRITES:
            raise FastPathError("export", f"no rewrite is called {name!r}", f"known: {', '.join(REWRITES)}")
        done[name] = REWRITES[name].apply(module, shapes, module_dtype(module))
    # Constants are computed on the CPU in float64; they belong where the weights are.
    device = next((parameter.device for parameter in module.parameters()), None)
    if device is not None:
        module.to(device)
    return done


def replace_bicubic(module: nn.Module, shapes: Shapes, dtype: torch.dtype) -> int:
    """Every x2 (or x4) enlargement of a DCAE stage becomes its projection and two constant matrices."""

    def enlarge(name: str, child: nn.Module) -> nn.Module | None:
        if type(child) is not Upsample or name not in shapes:
            return None
        height, width = shapes[name][-2:]
        size = (height * child.stride, width * child.stride)
        return nn.Sequential(child.proj, MatmulResize((height, width), size, dtype=dtype))

    return replace(module, enlarge)


def replace_landscape_operations(module: nn.Module, shapes: Shapes, dtype: torch.dtype) -> int:
    """The final stretch from the square grid to wide frames becomes its projection and two constant matrices."""

    def stretch(name: str, child: nn.Module) -> nn.Module | None:
        if type(child) is not SquareToLandscape or name not in shapes:
            return None
        height, width = shapes[name][-2:]
        size = child.size or nearest_landscape(height, width)
        return nn.Sequential(child.proj, MatmulResize((height, width), size, dtype=dtype))

    return replace(module, stretch)


def replace_sana_operations(module: nn.Module, shapes: Shapes, dtype: torch.dtype) -> int:
    """diffusers' AutoencoderDC: channel norms without transposes, the up-block's shortcut as one reshape."""
    return replace(module, lambda name, child: autoencoder_dc.plain_block(child))


def replace_attention_operations(module: nn.Module, shapes: Shapes, dtype: torch.dtype) -> int:
    """diffusers' multiscale linear attention: one 1x1 convolution for q, k and v, no padded value row, one fixed
    branch.
    """

    def attention(name: str, child: nn.Module) -> nn.Module | None:
        if not autoencoder_dc.is_attention(child) or name not in shapes:
            return None
        return autoencoder_dc.FixedLinearAttention(child, shapes[name])

    return replace(module, attention)


def replace(module: nn.Module, choose: Callable[[str, nn.Module], nn.Module | None]) -> int:
    """Put `choose(name, child)` in the place of every child for which it is not None; how many there were.

    Children of a replaced module are not visited again.
    """
    count = 0

    def walk(parent: nn.Module, prefix: str) -> None:
        nonlocal count
        for key, child in list(parent.named_children()):
            name = f"{prefix}{key}"
            new = choose(name, child)
            if new is None:
                walk(child, f"{name}.")
            else:
                setattr(parent, key, new)
                count += 1

    walk(module, "")
    return count


_ROUNDING = "exact; rounding of one intermediate more in the module's dtype"
REWRITES = {
    rewrite.name: rewrite
    for rewrite in (
        Rewrite(name="replace_bicubic", error=_ROUNDING, apply=replace_bicubic),
        Rewrite(name="replace_landscape_operations", error=_ROUNDING, apply=replace_landscape_operations),
        Rewrite(name="replace_attention_operations", error=_ROUNDING, apply=replace_attention_operations),
        Rewrite(name="replace_sana_operations", error="exact", apply=replace_sana_operations),
    )
}
"""Name -> rewrite, in the order in which they are applied."""
