"""`owl_wms::linear_attention`: ReLU linear attention over the pixels of an image, NHWC, from one q/k/v projection.

Why it exists: written out, q, k and v are widened to fp32, transposed and copied before two tiny products each; here
they are read as they lie, twice, and everything between stays on the chip.

Usage:
    y = linear_attention(qkv, head=32, eps=1e-15)     # [B, H, W, 3 * heads * 32] -> [B, H, W, heads * 32]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.register import define, has_kernel
from owl_wms.ops.linear_attention.reference import reference

__all__ = ["linear_attention", "reference"]


def _run(qkv: Tensor, head: int, eps: float) -> Tensor:
    many_pixels = qkv.shape[1] * qkv.shape[2] > head
    if not has_kernel(qkv) or not many_pixels or head < 16 or head & (head - 1):
        return reference(qkv, head, eps)
    from owl_wms.ops.linear_attention.kernel import launch

    return launch(qkv.contiguous(), head, eps)


def _fake(qkv: Tensor, head: int, eps: float) -> Tensor:
    channels = qkv.shape[-1]
    torch._check(channels % (3 * head) == 0, lambda: f"{channels} channels are no multiple of 3 x {head}")
    return qkv.new_empty(*qkv.shape[:-1], channels // 3)


linear_attention = define("linear_attention(Tensor qkv, int head, float eps) -> Tensor", run=_run, fake=_fake)
