"""The one definition of how a decoded frame becomes bytes, in plain PyTorch.

Usage:
    reference(x)      # x [B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C]
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(x: Tensor) -> Tensor:
    """`round((clamp(x, -1, 1) + 1) * 127.5)` in fp32, channels last; half rounds to even, not-a-number is 0 (black).

    Args:
        x: `[B, C, H, W]`, any floating dtype, strides and device.

    Returns:
        uint8 `[B, H, W, C]`, contiguous, on the same device.
    """
    scaled = x.float().nan_to_num(-1.0, 1.0, -1.0).clamp_(-1, 1).add_(1).mul_(127.5).round_()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
