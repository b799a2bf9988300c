"""Reference of `resize` in plain PyTorch.

Usage:
    reference(x, 3, 360, 640, torch.bfloat16)      # x [B, h, w, 4] fp32 -> [B, 3, 360, 640]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Bicubic resize of the first `channels` channels, to NCHW."""
    image = x[..., :channels].permute(0, 3, 1, 2).contiguous()
    if image.shape[-2:] != (height, width):
        image = F.interpolate(image, size=(height, width), mode="bicubic")
    return image.to(dtype)
