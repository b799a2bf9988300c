"""`owl_wms::linear8`: the 1x1 convolutions of a residual block as 8-bit matrix products, NHWC.

Why it exists: they are nine tenths of the wide decoders' work, and Hopper multiplies 8-bit numbers twice as fast as
16-bit ones. Quantising as a pass of its own would give half of that back, so codes are made where the values are: in
the epilogue of the product (or convolution) that computes them.

Usage:
    codes = linear8(codes, weight, scale, bias, gain)           # first 1x1: LeakyReLU and codes again
    codes = add_linear8_(u, codes, weight, scale, gain, inverse)    # second: u += ..., and the codes of the new u
    # codes [B, H, W, K] int8 or float8_e4m3fn; weight [N, K] of the same dtype; scale, bias, inverse fp32 [N];
    # gain fp32 [B, 2]; u [B, H, W, N] 16-bit
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.codes import LARGEST
from owl_wms.ops.linear8.reference import add_reference, reference
from owl_wms.ops.register import define, has_kernel

__all__ = ["add_linear8_", "add_reference", "linear8", "reference", "tile_of"]

# The tensor copy engine wants rows of a multiple of 16 bytes.
ALIGNMENT = 16


def tile_of(channels: int) -> int:
    """Index into `kernel.TILES` of the tile that measured best (docs/log.md) for a product of that width."""
    return 1 if channels <= 64 else 0


def _run(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    _check(x, weight, scale, gain)
    if not x.is_cuda:
        return reference(x, weight, scale, bias, gain)
    from owl_wms.ops.linear8 import kernel

    rows, pixels = x.contiguous().view(-1, x.shape[-1]), x.shape[1] * x.shape[2]
    tile = kernel.TILES[tile_of(weight.shape[0])]
    return kernel.launch(rows, weight, scale, bias, gain, pixels, tile).view(*x.shape[:-1], weight.shape[0])


def add_linear8_(
    u: Tensor, x: Tensor, weight: Tensor, scale: Tensor, gain: Tensor, inverse: Tensor | None
) -> Tensor | None:
    """`u += gain scale x weight^T` in place on contiguous `u`; its codes in steps of `gain / inverse` where given."""
    _check(x, weight, scale, gain)
    if not has_kernel(u):
        total, codes = add_reference(u, x, weight, scale, gain, inverse)
        u.copy_(total)
        return codes
    from owl_wms.ops.linear8 import kernel

    rows, pixels = x.contiguous().view(-1, x.shape[-1]), x.shape[1] * x.shape[2]
    tile = kernel.TILES[tile_of(weight.shape[0])]
    codes = kernel.launch_add_(u.view(-1, u.shape[-1]), rows, weight, scale, gain, inverse, pixels, tile)
    return None if codes is None else codes.view(u.shape)


def _check(x: Tensor, weight: Tensor, scale: Tensor, gain: Tensor) -> None:
    depth, channels = x.shape[-1], weight.shape[0]
    fits = x.dtype in LARGEST and weight.dtype == x.dtype and weight.shape[1] == depth and scale.shape == (channels,)
    torch._check(fits, lambda: f"linear8: {x.dtype} {list(x.shape)} does not fit {weight.dtype} {list(weight.shape)}")
    even = depth % ALIGNMENT == 0 and channels % ALIGNMENT == 0
    torch._check(even, lambda: f"linear8 wants multiples of {ALIGNMENT} channels, got {depth} and {channels}")
    torch._check(gain.shape == (x.shape[0], 2), lambda: f"linear8: gain {list(gain.shape)} for {x.shape[0]} images")


def _fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    _check(x, weight, scale, gain)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


linear8 = define(
    "linear8(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor gain) -> Tensor", run=_run, fake=_fake
)
