"""Triton kernel of `channel_norm`: a program holds a few pixels with all their channels and writes them once.

Usage:
    y = launch(x, weight, bias, residual, 1e-5, relu=False)     # contiguous [..., C]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096


@triton.jit
def norm_kernel(
    out_ptr, x_ptr, weight_ptr, bias_ptr, residual_ptr, pixels, channels, eps,
    RELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (row < pixels)[:, None] & (column < channels)[None, :]
    place = row[:, None] * channels + column[None, :]
    x = tl.load(x_ptr + place, mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / channels + eps)
    weight = tl.load(weight_ptr + column, column < channels, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, column < channels, other=0.0).to(tl.float32)
    y = x * scale[:, None] * weight[None, :] + bias[None, :]
    if RELU:
        y = tl.maximum(y, 0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + place, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask)


def launch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu: bool) -> Tensor:
    """The norm of contiguous `x [..., C]`, any number of channels and pixels."""
    channels = x.shape[-1]
    pixels = x.numel() // channels
    width = triton.next_power_of_2(channels)
    rows = max(1, ELEMENTS // width)
    out = torch.empty_like(x)
    norm_kernel[(triton.cdiv(pixels, rows),)](
        out, x, weight, bias, x if residual is None else residual, pixels, channels, eps,
        RELU=relu, HAS_RESIDUAL=residual is not None, ROWS=rows, WIDTH=width, num_warps=4 if width <= 4096 else 8,
    )  # fmt: skip
    return out
