"""Reference of `linear_attention` in plain PyTorch, as diffusers' SanaMultiscaleLinearAttention computes it.

Usage:
    y = reference(qkv, 32, 1e-15)     # [B, H, W, 3 * heads * 32] -> [B, H, W, heads * 32]
"""

from __future__ import annotations

from torch import Tensor


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
    result: Tensor = mixed.permute(0, 3, 1, 2).reshape(batch, height, width, channels // 3).contiguous()
    return result
