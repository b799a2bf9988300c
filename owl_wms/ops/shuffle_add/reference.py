"""References of `shuffle_add` and `shuffle_frames` in plain PyTorch, and the channel order they expect.

Usage:
    weight = phases_first(conv.weight)               # so that a pixel's four phases lie side by side
    y = reference(conv(x), x)                        # [B, H, W, 4 O], [B, H, W, C] -> [B, 2H, 2W, O]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def phases_first(weight: Tensor) -> Tensor:
    """Output channels `4 c + phase` reordered to `phase * O + c`; for weights and biases alike (first axis)."""
    result: Tensor = weight.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1).contiguous()
    return result


def reference(y: Tensor, x: Tensor | None) -> Tensor:
    """Pixel shuffle by 2 of `y` (phases first), plus the same of `x` with channels repeated to 4 O."""
    batch, height, width, wide = y.shape
    out = y.reshape(batch, height, width, 2, 2, wide // 4)
    if x is not None:
        repeated = x.repeat_interleave(wide // x.shape[-1], dim=-1).unflatten(-1, (-1, 2, 2))
        out = out + repeated.permute(0, 1, 2, 4, 5, 3)
    return out.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, wide // 4).contiguous()


def frames_reference(y: Tensor, channels: int) -> Tensor:
    """Pixel shuffle by 2 of the first `4 channels` of `y [B, H, W, .]` (`4 c + phase`), to NCHW."""
    return F.pixel_shuffle(y[..., : 4 * channels].permute(0, 3, 1, 2), 2).contiguous()
