"""Reference of `up_residual` in plain PyTorch.

Usage:
    y = reference(low, shortcut)      # low [B, h, w, C], shortcut [B, h, w, Cs] or None -> [B, 2h, 2w, C]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops.grouped_conv.reference import enlarge


def shuffle(shortcut: Tensor, channels: int) -> Tensor:
    """Pixel-shuffle by 2 and tile to `channels`: `[B, h, w, Cs] -> [B, 2h, 2w, channels]`."""
    image = F.pixel_shuffle(shortcut.permute(0, 3, 1, 2), 2)
    return image.repeat(1, channels // image.shape[1], 1, 1).permute(0, 2, 3, 1).contiguous()


def reference(low: Tensor, shortcut: Tensor | None) -> Tensor:
    """Bicubic x2 of `low`, plus the shuffled shortcut where there is one."""
    out = enlarge(low)
    return out if shortcut is None else out + shuffle(shortcut, low.shape[-1])
