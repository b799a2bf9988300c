"""Copies of a decoder: without weights on the meta device, in another dtype, in fp32; and the shapes inside it.

Why shapes: a program is static, so a rewrite may bake sizes in (a resize becomes two constant matrices), and isolation
builds one module alone. A forward on the meta device gives the shapes in milliseconds and copies no weight.

Usage:
    twin = meta_copy(decoder)
    inputs = record_shapes(decoder, (8, 128, 8, 8))      # {"blocks.0.up": (8, 1536, 8, 8), ...}
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from owl_wms.trt.graph.meta import QuickShapes
from owl_wms.vae.fold import folded, shared_hooks


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


def fp32_copy(decoder: nn.Module, device: torch.device | str) -> nn.Module:
    """A copy on `device` in float32, weight norm folded in float32: the decoder everything is measured against.

    Live weight norm is folded on the CPU, so that the weights have the same bits whatever the device.
    """
    live = any(parametrize.is_parametrized(module) for module in decoder.modules())
    where = "cpu" if live else device
    wide = copy_with(decoder, lambda t: t.to(where, torch.float32 if t.dtype.is_floating_point else t.dtype, copy=True))
    return folded(wide).to(device).eval().requires_grad_(False)


def module_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the first floating-point parameter; float32 for a module without one."""
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, buffer and plain tensor attribute of `module` and its submodules."""
    for name, child in module.named_modules():
        for key, value in (*child._parameters.items(), *child._buffers.items(), *vars(child).items()):
            if isinstance(value, Tensor):
                yield f"{name}.{key}", value


@contextlib.contextmanager
def noted_shapes(module: nn.Module) -> Iterator[dict[str, tuple[int, ...]]]:
    """Fill the dict during the block: input shape of every submodule that is called with one tensor, by dotted name; of
    the first call.
    """
    names = {child: name for name, child in module.named_modules()}
    found: dict[str, tuple[int, ...]] = {}

    def note(child: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            found.setdefault(names[child], tuple(args[0].shape))

    handles = [child.register_forward_pre_hook(note) for child in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def record_shapes(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Notes the input shapes of every submodule in one forward on the meta device, for latents of `input_shape`."""
    twin = meta_copy(module)
    with torch.no_grad(), QuickShapes(), noted_shapes(twin) as found:
        twin(torch.empty(input_shape, dtype=module_dtype(module), device="meta"))
    return found
