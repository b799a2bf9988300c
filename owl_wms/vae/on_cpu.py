"""A decoder laid out for a CPU: channels last, and bicubic enlargement as a convolution.

Why it exists: PyTorch enlarges on a CPU value by value, which takes a third of a small decoder's time. By exactly two,
every value is one of four fixed sums over 5x5 neighbours, so the enlargement is a depthwise convolution with four
results per channel and a pixel shuffle. Measured on one core (AVX-512), 16 channels from 256x256: 46 ms become 13 in
bf16, 37 become 12 in fp32. The values are those of `F.interpolate` to the rounding of the dtype.

Usage:
    decoder = quick_on_cpu(decoder)             # changed in place: for a decoder that nobody else holds
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl_wms.vae.blocks import Upsample

_NEAREST, _NEXT = (-27.0, 225.0, 67.0, -9.0), (-9.0, 67.0, 225.0, -27.0)
"""Bicubic weights (a = -0.75) in 1/256 for a place a quarter behind the second of four neighbours, and a quarter before
the third."""
_REACH = 2


def quick_on_cpu(module: nn.Module) -> nn.Module:
    """Lays a decoder or encoder on the CPU out so that it runs faster there; returns it.

    On a CPU its convolutions run two to three times faster channels last.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is Upsample and child.stride == 2:
                setattr(parent, name, ConvolvedUpsample(child).train(child.training))
    laid_out: nn.Module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return laid_out


class ConvolvedUpsample(nn.Module):
    """Stands for an `Upsample` by two: `[B, c_in, H, W] -> [B, c_out, 2 H, 2 W]`."""

    def __init__(self, original: Upsample) -> None:
        super().__init__()
        self.proj = original.proj

    def forward(self, x: Tensor) -> Tensor:
        return enlarged(self.proj(x))


def enlarged(x: Tensor) -> Tensor:
    """Returns `F.interpolate(x, scale_factor=2, mode="bicubic")`: `[B, C, H, W] -> [B, C, 2 H, 2 W]`."""
    row = torch.tensor([[*_NEXT, 0.0], [0.0, *_NEAREST]]) / 256  # of the even and of the odd results
    kernel = torch.einsum("ai,bj->abij", row, row).reshape(4, 1, 5, 5).to(x)
    channels = x.shape[1]
    padded = F.pad(x, (_REACH,) * 4, mode="replicate")
    return F.pixel_shuffle(F.conv2d(padded, kernel.repeat(channels, 1, 1, 1), groups=channels), 2)
