"""Measures how near two pictures are: PSNR, SSIM and depth error, one number per frame.

Why own code: both are a few tensor operations, and they must run where the frames are without a further dependency.

Usage: `psnr(decoded[:, :3], source[:, :3]).mean()`; inputs float [B, C, H, W] in [-1, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PEAK = 2.0  # the range of [-1, 1]
_WINDOW = 11
_SIGMA = 1.5


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per frame: [B, C, H, W] twice -> float32 [B]; equal frames give inf."""
    error = (a.float() - b.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(_PEAK**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity per frame: [B, C, H, W] twice -> float32 [B], 1 for equal frames.

    Wang, Bovik, Sheikh, Simoncelli 2004: Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03; only positions
    whose window lies inside the frame count.
    """
    a, b = a.float(), b.float()
    channels = a.shape[1]
    axis = torch.arange(_WINDOW, dtype=torch.float32, device=a.device) - _WINDOW // 2
    line = torch.exp(-(axis**2) / (2 * _SIGMA**2))
    line = line / line.sum()

    def mean(x: Tensor) -> Tensor:
        kernel = line.expand(channels, 1, 1, _WINDOW)
        return F.conv2d(F.conv2d(x, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(dim=1)


def depth_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the depth channel per frame: [B, H, W] twice in [-1, 1] -> float32 [B]."""
    return (a.float() - b.float()).abs().flatten(1).mean(dim=1)
