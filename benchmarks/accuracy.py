"""Measures how far an output is from the fp32 decoder's, in the three forms that image benchmarks use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Distance from the fp32 output.

    Attributes:
        relative_l2: ||x - ref|| / ||ref|| over all channels.
        psnr_db: of RGB against a range of 2, both clamped to [-1, 1] as a viewer does.
        max_uint8: largest difference of an RGB pixel after conversion to 8 bits.
        finite: whether every value is.
    """

    relative_l2: float
    psnr_db: float
    max_uint8: int
    finite: bool


def relative_l2(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference|| of two tensors of one shape and any real dtype, in float64."""
    wanted = reference.double()
    return float((x.double() - wanted).norm() / wanted.norm())


def accuracy(x_BCHW: Tensor, reference_BCHW: Tensor) -> Accuracy:
    """Compare an output [B, C, H, W] of any dtype with its fp32 reference of that shape; 3 channels first are RGB."""
    x, reference = x_BCHW.float(), reference_BCHW.float()
    rgb, rgb_reference = x[:, :3].clamp(-1, 1), reference[:, :3].clamp(-1, 1)
    mse = (rgb - rgb_reference).square().mean().item()
    as_uint8 = [((frame / 2 + 0.5) * 255).round() for frame in (rgb, rgb_reference)]
    return Accuracy(
        relative_l2=relative_l2(x, reference),
        psnr_db=float("inf") if mse == 0 else 10 * torch.log10(torch.tensor(4.0 / mse)).item(),
        max_uint8=int((as_uint8[0] - as_uint8[1]).abs().max().item()),
        finite=bool(torch.isfinite(x).all().item()),
    )
