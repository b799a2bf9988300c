"""Triton kernels of `linear_attention` and `multiscale_attention`: one sums `k v^T` and `k` over a head's pixels, one
applies them to queries.

A head's pixels are shared out among `splits` programs, whose sums are added in a fixed order: one image has too few
heads to fill a GPU, and atomic additions would give other bits in every run. 16-bit products are exact in fp32, so only
the small d x d sums are ever split (three TF32 products); their scale is 1 / pixels, which cancels.

Usage:
    y = launch(qkv, None, None, 32, 1e-15)         # contiguous [B, H, W, 3 * heads * 32]
    y = launch(qkv, taps, point, 32, 1e-15)        # with the second set of heads: [B, H, W, 2 * heads * 32]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 64
PROGRAMS = 1024  # as many as keep every multiprocessor of a large GPU busy
MOST_STEPS = 16


@triton.jit
def sums_kernel(
    kv_ptr, k_ptr, q_ptr, qkv_ptr, taps_ptr, point_ptr, height, width, heads, splits,
    D: tl.constexpr, SIZE: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # Set 0 of the sums is that of qkv itself, set 1, where SIZE is the side of a neighbourhood, that of its average.
    batch, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    channel = tl.arange(0, D)
    pixels = height * width
    channels = heads * 3 * D
    image = qkv_ptr + batch * pixels * channels
    sets: tl.constexpr = 2 if SIZE else 1
    index = ((split * tl.num_programs(0) + batch) * sets) * heads + head
    square = channel[:, None] * D + channel[None, :]

    kv = tl.zeros((D, D), tl.float32)
    total = tl.zeros((D,), tl.float32)
    for step in range(STEPS):
        pixel = (split * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
        place = pixel[:, None] * channels + head * 3 * D + channel[None, :]
        inside = (pixel < pixels)[:, None]
        k = tl.load(image + place + D, inside, other=0.0)
        v = tl.load(image + place + 2 * D, inside, other=0.0)
        k = tl.maximum(k, 0.0).to(v.dtype)
        kv = tl.dot(k.T, v, kv)
        total += tl.sum(k.to(tl.float32), axis=0)
    tl.store(kv_ptr + index * D * D + square, kv / pixels)
    tl.store(k_ptr + index * D + channel, total / pixels)

    if SIZE:
        near_kv = tl.zeros((D, D), tl.float32)
        near_total = tl.zeros((D,), tl.float32)
        for step in range(STEPS):
            pixel = (split * STEPS + step) * PIXELS + tl.arange(0, PIXELS)
            y, x = pixel // width, pixel % width
            inside = (pixel < pixels)[:, None]
            q = tl.zeros((PIXELS, D), tl.float32)
            k = tl.zeros((PIXELS, D), tl.float32)
            v = tl.zeros((PIXELS, D), tl.float32)
            first = head * 3 * D + channel[None, :]
            for tap in range(SIZE * SIZE):
                ty = y + tap // SIZE - SIZE // 2
                tx = x + tap % SIZE - SIZE // 2
                valid = ((pixel < pixels) & (ty >= 0) & (ty < height) & (tx >= 0) & (tx < width))[:, None]
                source = image + (ty * width + tx)[:, None] * channels + first
                weight = taps_ptr + tap * channels + first
                q += tl.load(source, valid, other=0.0).to(tl.float32) * tl.load(weight)
                k += tl.load(source + D, valid, other=0.0).to(tl.float32) * tl.load(weight + D)
                v += tl.load(source + 2 * D, valid, other=0.0).to(tl.float32) * tl.load(weight + 2 * D)
            # 1x1 within each of the three groups: rows of `point` are outputs.
            matrix = point_ptr + head * 3 * D * D + square
            narrow = qkv_ptr.dtype.element_ty
            q = tl.dot(q.to(narrow), tl.load(matrix).T).to(narrow)
            k = tl.maximum(tl.dot(k.to(narrow), tl.load(matrix + D * D).T), 0.0).to(narrow)
            v = tl.dot(v.to(narrow), tl.load(matrix + 2 * D * D).T).to(narrow)
            near_kv = tl.dot(k.T, v, near_kv)
            near_total += tl.sum(k.to(tl.float32), axis=0)
            row = batch * pixels + pixel
            tl.store(q_ptr + (row * heads + head)[:, None] * D + channel[None, :], q, inside)
        tl.store(kv_ptr + (index + heads) * D * D + square, near_kv / pixels)
        tl.store(k_ptr + (index + heads) * D + channel, near_total / pixels)


@triton.jit
def apply_kernel(
    out_ptr, qkv_ptr, q_ptr, kv_ptr, k_ptr, pixels, heads, sets, eps, D: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    batch, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, head = place // heads, place % heads
    channel = tl.arange(0, D)
    index = batch * sets * heads + place
    kv = tl.load(kv_ptr + index * D * D + channel[:, None] * D + channel[None, :])
    total = tl.load(k_ptr + index * D + channel)
    pixel = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    inside = (pixel < pixels)[:, None]
    row = batch * pixels + pixel
    if group == 0:
        q = tl.load(qkv_ptr + (row * heads + head)[:, None] * (3 * D) + channel[None, :], inside, other=0.0)
    else:
        q = tl.load(q_ptr + (row * heads + head)[:, None] * D + channel[None, :], inside, other=0.0)
    q = tl.maximum(q.to(tl.float32), 0.0)
    mixed = tl.dot(q, kv, input_precision="tf32x3")
    weight = tl.sum(q * total[None, :], axis=1)
    mixed = mixed / (weight + eps / pixels)[:, None]
    target = out_ptr + (row * sets * heads + place)[:, None] * D + channel[None, :]
    tl.store(target, mixed.to(out_ptr.dtype.element_ty), inside)


def launch(qkv: Tensor, taps: Tensor | None, point: Tensor | None, head: int, eps: float) -> Tensor:
    """The linear form for contiguous `qkv`; `head` a power of two, at least 16.

    Args:
        taps, point: weights of the second set of heads as `pack_scale` lays them out, both or neither.
    """
    batch, height, width, channels = qkv.shape
    heads, pixels = channels // (3 * head), height * width
    sets = 1 if taps is None else 2
    blocks = triton.cdiv(pixels, PIXELS)
    steps = max(1, min(MOST_STEPS, blocks, triton.cdiv(blocks * batch * heads, PROGRAMS)))
    splits = triton.cdiv(blocks, steps)
    kv = torch.empty(splits, batch, sets * heads, head, head, device=qkv.device, dtype=torch.float32)
    total = torch.empty(splits, batch, sets * heads, head, device=qkv.device, dtype=torch.float32)
    near = qkv if taps is None else qkv.new_empty(batch, height, width, heads * head)
    sums_kernel[(batch, heads, splits)](
        kv, total, near, qkv, qkv if taps is None else taps, qkv if point is None else point,
        height, width, heads, splits,
        D=head, SIZE=0 if taps is None else round(taps.shape[0] ** 0.5), PIXELS=PIXELS, STEPS=steps,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    out = qkv.new_empty(batch, height, width, sets * heads * head)
    apply_kernel[(batch, sets * heads, blocks)](
        out, qkv, near, kv.sum(0), total.sum(0), pixels, heads, sets, eps, D=head, PIXELS=PIXELS, num_warps=4
    )
    return out
