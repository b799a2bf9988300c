"""`owl_wms::pointwise`: a 1x1 convolution on NHWC as one matrix product at library speed, bias in its epilogue.

Why it exists: as an op of ours it stays a cuBLAS product inside a TensorRT program, next to the kernels it feeds; an
engine for each would cost a launch and a boundary. The reference is the op itself: there is nothing to fuse.

Usage:
    y = pointwise(x, weight, bias)     # x [B, H, W, C], weight [O, C], bias [O] or None -> [B, H, W, O]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops.common.register import define

__all__ = ["pointwise", "reference"]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` over the last axis."""
    return F.linear(x, weight, bias)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[-1], lambda: f"{x.shape[-1]} channels, weights for {weight.shape[-1]}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


pointwise = define("pointwise(Tensor x, Tensor weight, Tensor? bias) -> Tensor", run=_run, fake=_fake)
