"""Shapes through a decoder on the meta device in milliseconds.

Why it exists: torch computes the shapes of many operators in Python, the bicubic enlargement as a hundred operators of
its own (70 ms per call), and the first such operator imports sympy and torch._dynamo (1.5 s). A decoder is mostly
convolutions, enlargements and pointwise operators on plain contiguous tensors, for which shape, dtype and strides of
the answer follow at once. What is not plain goes to torch's own rule, so the answer never differs; tests compare them.

Usage:
    with torch.no_grad(), QuickShapes():
        x = meta_module(z_meta)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Rule = Callable[..., "Tensor | None"]


class QuickShapes(TorchDispatchMode):
    """Inside the block, plain cases of common operators on meta tensors follow the rules below."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise the first operator imports torch._dynamo, only to be told not to compile this method.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return result_of(func, args, kwargs or {})


def result_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns what `func` returns for meta tensors, by a rule where one fits, else by torch."""
    rule = RULES.get(func)
    if rule is not None and not kwargs:
        quick = rule(*args)
        if quick is not None:
            return quick
    return func(*args, **kwargs)


def plain(value: Any) -> bool:
    """A strided floating-point meta tensor in row-major order, and in no other order at the same time.

    With one channel or one pixel a tensor also counts as channels-last, and operators disagree on what follows. The
    stride of a dimension of size one means nothing and is handed on all the same, so it has to be the usual one.
    """
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.is_meta
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.numel() > 0
        and value.stride() == _row_major(value.shape)
        and not (value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last))
        and not (value.dim() == 5 and value.is_contiguous(memory_format=torch.channels_last_3d))
    )


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Tensor | None:  # fmt: skip
    one_pixel = weight.dim() == 4 and weight.shape[2:] == (1, 1)  # such weights count as channels-last as well
    fits = (
        plain(x)
        and x.dim() == weight.dim() == 4
        and weight.is_meta
        and weight.dtype == x.dtype
        and weight.is_contiguous()
        and (one_pixel or plain(weight))
        and (bias is None or (bias.is_meta and bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
        and not transposed
        and len(stride) == len(padding) == len(dilation) == 2
        and x.shape[1] == groups * weight.shape[1]
        and weight.shape[0] % groups == 0
    )
    if not fits:
        return None
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return _same_order(x, (x.shape[0], weight.shape[0], *sizes)) if min(sizes) > 0 else None


def _enlargement(x: Tensor, output_size: list[int], *_scales: Any) -> Tensor | None:
    if not plain(x) or x.dim() != 4 or len(output_size) != 2 or min(output_size) < 1:
        return None
    return _same_order(x, (*x.shape[:2], *output_size))


def _pointwise(x: Tensor, *_settings: Any) -> Tensor | None:
    return _same_order(x, x.shape) if plain(x) else None


def _pointwise_in_place(x: Tensor, *_settings: Any) -> Tensor | None:
    return x if plain(x) else None


def _clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor | None:
    return _pointwise(x) if low is not None or high is not None else None


def _two_alike(x: Any, y: Any) -> Tensor | None:
    if not plain(x) or isinstance(y, (bool, complex)):
        return None
    if isinstance(y, (int, float)) or (plain(y) and y.shape == x.shape and y.dtype == x.dtype):
        return _same_order(x, x.shape)
    return None


def _repeat(x: Tensor, repeats: list[int]) -> Tensor | None:
    if not plain(x) or len(repeats) != x.dim() or min(repeats) < 1:
        return None
    return _same_order(x, tuple(size * times for size, times in zip(x.shape, repeats, strict=True)))


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor | None:
    count = tensors[0].dim() if tensors else 0
    # The strides decide about the order of a tensor with one channel, whose order `plain` calls unknown.
    rows = all(
        type(x) is Tensor and x.is_meta and x.is_floating_point() and x.layout == torch.strided and x.numel() > 0
        and x.dim() == count and x.is_contiguous() and x.stride(1) > x.stride(-1)
        for x in tensors
    )  # fmt: skip
    if not rows or count not in (4, 5) or not -count <= dim < count:
        return None
    shape = list(tensors[0].shape)
    alike = all(
        x.dtype == tensors[0].dtype
        and [*x.shape[: dim % count], *x.shape[dim % count + 1 :]] == [*shape[: dim % count], *shape[dim % count + 1 :]]
        for x in tensors
    )
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return torch.empty(shape, dtype=tensors[0].dtype, device="meta") if alike else None


def _pixel_shuffle(x: Tensor, factor: int) -> Tensor | None:
    if not plain(x) or x.dim() != 4 or factor < 1 or x.shape[1] % factor**2:
        return None
    batch, channels, height, width = x.shape
    return _same_order(x, (batch, channels // factor**2, height * factor, width * factor))


def _same_order(x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    made = torch.empty(shape, dtype=x.dtype, device="meta")
    return made if plain(made) or made.dim() != 4 else None


RULES: dict[Any, Rule] = {
    aten.convolution.default: _convolution,
    aten.upsample_bicubic2d.default: _enlargement,
    aten.upsample_bilinear2d.default: _enlargement,
    aten.upsample_nearest2d.default: _enlargement,
    aten.leaky_relu.default: _pointwise,
    aten.relu.default: _pointwise,
    aten.silu.default: _pointwise,
    aten.tanh.default: _pointwise,
    aten.clamp.default: _clamp,
    aten.leaky_relu_.default: _pointwise_in_place,
    aten.relu_.default: _pointwise_in_place,
    aten.silu_.default: _pointwise_in_place,
    aten.add.Tensor: _two_alike,
    aten.sub.Tensor: _two_alike,
    aten.mul.Tensor: _two_alike,
    aten.div.Tensor: _two_alike,
    aten.repeat.default: _repeat,
    aten.cat.default: _cat,
    aten.pixel_shuffle.default: _pixel_shuffle,
}
"""Operator -> rule; a rule gets the positional arguments and answers None where it does not apply."""
