"""Triton kernels of `linear_attention`: one sums `k v^T` and `k` over a head's pixels, one applies them to queries.

16-bit products are exact in fp32, so only the small d x d sums are ever split (three TF32 products); their scale is
1 / pixels, which cancels.

Usage:
    y = launch(qkv, 32, 1e-15)     # contiguous [B, H, W, 3 * heads * 32]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 64


@triton.jit
def sums_kernel(kv_ptr, k_ptr, qkv_ptr, pixels, heads, D: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr):
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    base = qkv_ptr + batch * pixels * heads * 3 * D + head * 3 * D
    kv = tl.zeros((D, D), tl.float32)
    total = tl.zeros((D,), tl.float32)
    for step in range(STEPS):
        pixel = step * PIXELS + tl.arange(0, PIXELS)
        place = pixel[:, None] * (heads * 3 * D) + channel[None, :]
        inside = (pixel < pixels)[:, None]
        k = tl.load(base + place + D, inside, other=0.0)
        v = tl.load(base + place + 2 * D, inside, other=0.0)
        k = tl.maximum(k, 0.0).to(v.dtype)
        kv = tl.dot(k.T, v, kv)
        total += tl.sum(k.to(tl.float32), axis=0)
    index = batch * heads + head
    tl.store(kv_ptr + index * D * D + channel[:, None] * D + channel[None, :], kv / pixels)
    tl.store(k_ptr + index * D + channel, total / pixels)


@triton.jit
def apply_kernel(out_ptr, qkv_ptr, kv_ptr, k_ptr, pixels, heads, eps, D: tl.constexpr, PIXELS: tl.constexpr):
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, D)
    index = batch * heads + head
    kv = tl.load(kv_ptr + index * D * D + channel[:, None] * D + channel[None, :])
    total = tl.load(k_ptr + index * D + channel)
    pixel = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    inside = (pixel < pixels)[:, None]
    row = batch * pixels + pixel
    q = tl.load(qkv_ptr + (row * heads + head)[:, None] * (3 * D) + channel[None, :], inside, other=0.0)
    q = tl.maximum(q.to(tl.float32), 0.0)
    mixed = tl.dot(q, kv, input_precision="tf32x3")
    weight = tl.sum(q * total[None, :], axis=1)
    mixed = mixed / (weight + eps / pixels)[:, None]
    tl.store(out_ptr + (row * heads + head)[:, None] * D + channel[None, :], mixed.to(out_ptr.dtype.element_ty), inside)


def launch(qkv: Tensor, head: int, eps: float) -> Tensor:
    """The linear form for contiguous `qkv`; `head` a power of two, at least 16."""
    batch, height, width, channels = qkv.shape
    heads, pixels = channels // (3 * head), height * width
    kv = torch.empty(batch, heads, head, head, device=qkv.device, dtype=torch.float32)
    total = torch.empty(batch, heads, head, device=qkv.device, dtype=torch.float32)
    out = qkv.new_empty(batch, height, width, channels // 3)
    steps = triton.cdiv(pixels, PIXELS)
    sums_kernel[(batch, heads)](
        kv, total, qkv, pixels, heads, D=head, PIXELS=PIXELS, STEPS=steps, num_warps=4, num_stages=4
    )
    apply_kernel[(batch, heads, steps)](out, qkv, kv, total, pixels, heads, eps, D=head, PIXELS=PIXELS, num_warps=4)
    return out
