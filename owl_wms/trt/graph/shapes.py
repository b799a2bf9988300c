"""Which shape reaches which module, found without computing anything.

Why it exists: a program is static, so a rewrite may bake sizes in (a resize becomes two constant matrices), and
isolation wants to build one module alone. Both need the shapes inside the decoder; running it on the meta device gives
them in milliseconds and copies no weight.

Usage:
    twin = meta_copy(decoder)
    inputs = record_shapes(decoder, (8, 128, 8, 8))      # {"blocks.0.up": (8, 1536, 8, 8), ...}
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.trt.graph.meta import QuickShapes
from owl_wms.vae.fold import shared_hooks


def copy_with(module: nn.Module, convert: Any) -> nn.Module:
    """A structural copy whose parameters and buffers are `convert(tensor)`; the originals are neither copied nor
    touched.

    Tensors kept as plain attributes are converted too, so that the copy lives on one device.
    """
    memo = shared_hooks(module)
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(convert(parameter.detach()), requires_grad=False)
        plain = [value for value in vars(child).values() if isinstance(value, Tensor)]
        for tensor in [*child._buffers.values(), *plain]:
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = convert(tensor.detach())
    return copy.deepcopy(module, memo)


def meta_copy(module: nn.Module) -> nn.Module:
    """The module with weightless tensors on the meta device; for shapes and graphs only."""
    return copy_with(module, lambda tensor: torch.empty_like(tensor, device="meta"))


def module_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the first floating-point parameter; float32 for a module without one."""
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, buffer and plain tensor attribute of `module` and its submodules."""
    for name, child in module.named_modules():
        for key, value in (*child._parameters.items(), *child._buffers.items(), *vars(child).items()):
            if isinstance(value, Tensor):
                yield f"{name}.{key}", value


def record_shapes(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Input shape of every submodule that is called with one tensor, by dotted name, for a latent batch of
    `input_shape`.
    """
    twin = meta_copy(module)
    names = {child: name for name, child in twin.named_modules()}
    found: dict[str, tuple[int, ...]] = {}

    def note(child: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            found.setdefault(names[child], tuple(args[0].shape))

    handles = [child.register_forward_pre_hook(note) for child in names]
    try:
        with torch.no_grad(), QuickShapes():
            twin(torch.empty(input_shape, dtype=module_dtype(module), device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return found
