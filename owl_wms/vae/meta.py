"""Builds modules on the meta device without the price of weight norm there.

PyTorch computes the norm of a meta tensor by its reference implementations in Python, whose first call imports
torch._dynamo and sympy: three seconds of a start on a slow machine, for nothing but a shape. Here the shapes are given.

Usage:
    with torch.device("meta"), WeightNormShapes():
        decoder = build_decoder(config)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WeightNormShapes(TorchFunctionMode):
    """Inside the block, weight norm of meta tensors allocates its result and computes nothing. Holds for one thread."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.norm_except_dim and args[0].is_meta:
            return _norm(*args, **(kwargs or {}))
        if func is torch._weight_norm and args[0].is_meta:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _norm(v: Tensor, pow: int = 2, dim: int = 0) -> Tensor:
    """The shape of `torch.norm_except_dim`: 1 in every dimension but `dim`; in none, for -1, a scalar."""
    if dim == -1:
        return v.new_empty(())
    return v.new_empty([size if place == dim % v.dim() else 1 for place, size in enumerate(v.shape)])
