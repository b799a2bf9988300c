"""Reference of `channel_norm` in plain PyTorch.

Usage:
    y = reference(x, weight, bias, residual, 1e-5, relu=False)     # [..., C]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, relu: bool) -> Tensor:
    """RMS norm over the last axis, scale and shift, ReLU if asked for, residual; computed in fp32 and rounded once."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float() + bias.float()
    y = F.relu(y) if relu else y
    return (y if residual is None else y + residual.float()).to(x.dtype)
