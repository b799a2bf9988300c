"""Reference implementations of `linear_attention` and `multiscale_attention` in plain PyTorch, as diffusers'
SanaMultiscaleLinearAttention computes them, and the layout of a scale's weights.

Usage:
    y = reference(qkv, 32, 1e-15)     # [B, H, W, 3 * heads * 32] -> [B, H, W, heads * 32]
    taps, point = pack_scale(proj_in.weight, proj_out.weight)
    y = multiscale_reference(qkv, taps, point, 32, 1e-15)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_scale(proj_in: Tensor, proj_out: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of one scale's two convolutions: depthwise `[3C, 1, k, k]` to `[k k, 3C]` fp32, a tap per row; grouped
    1x1 `[3C, D, 1, 1]` to `[3C / D, D out, D in]` in its dtype.

    Raises:
        ValueError: other shapes, or an even k.
    """
    channels, size = proj_in.shape[0], proj_in.shape[-1]
    depth = proj_out.shape[1]
    if proj_in.shape != (channels, 1, size, size) or size % 2 == 0 or proj_out.shape != (channels, depth, 1, 1):
        raise ValueError(f"no scale has weights {list(proj_in.shape)} and {list(proj_out.shape)}")
    taps = proj_in.flatten(1).t().float().contiguous()
    return taps, proj_out.reshape(channels // depth, depth, depth).contiguous()


def reference(qkv: Tensor, head: int, eps: float) -> Tensor:
    """Head h owns channels 3 h d to 3 (h + 1) d: query, key and value, d = `head` each; query and key pass a ReLU.

    `(v k^T) q / (sum(k) q + eps)` in fp32 where there are more pixels than `head`; else the quadratic form, whose sums
    diffusers normalises before it rounds.
    """
    batch, height, width, channels = qkv.shape
    heads = qkv.reshape(batch, height * width, channels // (3 * head), 3, head).permute(3, 0, 2, 4, 1)
    if height * width > head:
        query, key, value = heads.float()
        query, key = query.relu(), key.relu()
        total = (value @ key.transpose(-1, -2)) @ query
        weight = key.sum(-1, keepdim=True).transpose(-1, -2) @ query
        mixed = (total / (weight + eps)).to(qkv.dtype)
    else:
        query, key, value = heads
        scores = (key.relu().transpose(-1, -2) @ query.relu()).float()
        scores = scores / (scores.sum(2, keepdim=True) + eps)
        mixed = value @ scores.to(value.dtype)
    rows: Tensor = mixed.permute(0, 3, 1, 2).reshape(batch, height, width, channels // 3).contiguous()
    return rows


def multiscale_reference(qkv: Tensor, taps: Tensor, point: Tensor, head: int, eps: float) -> Tensor:
    """The heads of `qkv`, then as many whose q, k and v are `qkv` after both convolutions; zero padding."""
    channels, size = qkv.shape[-1], round(taps.shape[0] ** 0.5)
    depthwise = taps.t().reshape(channels, 1, size, size).to(qkv.dtype)
    grouped = point.reshape(channels, head, 1, 1).to(qkv.dtype)
    near = F.conv2d(qkv.permute(0, 3, 1, 2), depthwise, padding=size // 2, groups=channels)
    near = F.conv2d(near, grouped, groups=channels // head).permute(0, 2, 3, 1)
    return reference(torch.cat([qkv, near], dim=-1), head, eps)
