"""References of `conv3x3`, `conv3x3_shuffled` and `latent_conv` in plain PyTorch, and the layout of their weights.

Usage:
    y = reference(x, pack(conv.weight), conv.bias, residual, relu=False)     # x [B, H, W, C] -> [B, H, W, O]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops.up_residual.reference import shuffle


def pack(weight: Tensor) -> Tensor:
    """`[O, C, 3, 3]` to `[O, 3, 3, C]`, contiguous: what channels_last stores, so a library reads it without a copy.

    Raises:
        ValueError: the weights are not those of a dense 3x3 convolution.
    """
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"conv3x3 wants weights [O, C, 3, 3], got {list(weight.shape)}")
    return weight.permute(0, 2, 3, 1).contiguous()


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, silu: bool = False
) -> Tensor:
    """Convolution with zero padding of 1, then bias, ReLU or SiLU if asked for, then the residual; NHWC in and out."""
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, padding=1).permute(0, 2, 3, 1)
    y = F.relu(y) if relu else F.silu(y) if silu else y
    return (y if residual is None else y + residual).contiguous()


def shuffled_reference(x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor) -> Tensor:
    """`base [B, 2H, 2W, O]` plus the pixel-shuffled convolution of `x [B, H, W, C]` to 4 O channels."""
    return (base + shuffle(reference(x, weight, bias, None, False), base.shape[-1])).contiguous()


def latent_rows(z: Tensor, weight: Tensor, repeats: int) -> tuple[Tensor, Tensor | None]:
    """Latents `[B, c, h, w]` as NHWC rows in the weights' dtype, and every channel `repeats` times, None for 0."""
    rows = z.to(weight.dtype).permute(0, 2, 3, 1).contiguous()
    return rows, rows.repeat_interleave(repeats, dim=-1) if repeats else None


def latent_reference(z: Tensor, weight: Tensor, bias: Tensor, repeats: int) -> Tensor:
    """`z [B, c, h, w]` to `[B, h, w, O]`: 3x3 convolution plus every latent channel `repeats` times."""
    rows, shortcut = latent_rows(z, weight, repeats)
    return reference(rows, weight, bias, shortcut, False)
