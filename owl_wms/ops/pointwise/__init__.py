"""`owl_wms::pointwise` and its kin: a 1x1 convolution on NHWC as one matrix product, what follows in its epilogue.

Why it exists: as an op of ours it stays a cuBLAS product inside a TensorRT program, next to the kernels it feeds; an
engine for each would cost a launch and a boundary. The reference is the op itself: there is nothing to fuse.

Usage:
    y = pointwise(x, weight, bias)     # x [B, H, W, C], weight [O, C], bias [O] or None -> [B, H, W, O]
    y = pointwise_relu(x, weight, bias)
    y = pointwise_add(x, weight, residual)      # residual [B, H, W, O]
    y = pointwise_frames(x, weight, 2)          # weight [2 O, C] -> [2 B, H, W, O], two frames of each one
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops.common.register import define, require

__all__ = ["pointwise", "pointwise_add", "pointwise_frames", "pointwise_relu", "reference"]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` over the last axis."""
    return F.linear(x, weight, bias)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    require(x.shape[-1] == weight.shape[-1], lambda: f"{x.shape[-1]} channels, weights for {weight.shape[-1]}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


pointwise = define("pointwise(Tensor x, Tensor weight, Tensor? bias) -> Tensor", run=_run, fake=_fake)


def _run_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t()).view(*x.shape[:-1], weight.shape[0])


def _run_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    rows, added = x.reshape(-1, x.shape[-1]), residual.reshape(-1, weight.shape[0])
    return torch.addmm(added, rows, weight.t()).view(residual.shape)


def _run_frames(x: Tensor, weight: Tensor, frames: int) -> Tensor:
    out = _fake_frames(x, weight, frames)
    for image, made in zip(x, out.unflatten(0, (-1, frames)), strict=True):
        for taps, frame in zip(weight.chunk(frames), made, strict=True):
            torch.mm(image.reshape(-1, x.shape[-1]), taps.t(), out=frame.view(-1, taps.shape[0]))
    return out


def _fake_frames(x: Tensor, weight: Tensor, frames: int) -> Tensor:
    require(x.shape[-1] == weight.shape[-1], lambda: f"{x.shape[-1]} channels, weights for {weight.shape[-1]}")
    batch, height, width, _ = x.shape
    return x.new_empty(batch * frames, height, width, weight.shape[0] // frames)


pointwise_relu = define("pointwise_relu(Tensor x, Tensor weight, Tensor bias) -> Tensor", run=_run_relu, fake=_fake)
pointwise_add = define("pointwise_add(Tensor x, Tensor weight, Tensor residual) -> Tensor", run=_run_add, fake=_fake)
pointwise_frames = define(
    "pointwise_frames(Tensor x, Tensor weight, int frames) -> Tensor", run=_run_frames, fake=_fake_frames
)
