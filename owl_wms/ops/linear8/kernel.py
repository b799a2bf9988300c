"""Triton kernels behind `linear8`: 8-bit matrix products with everything that follows them in a residual block.

Why Triton: both operands come through the tensor copy engine, the product is one `wgmma` (s8 or e4m3, sm_90), and the
epilogue is what a library does not have: LeakyReLU and codes behind one product, the residual and two results behind
the other. Rows are pixels; a program computes tiles of pixels x channels, channels fastest, so that the programs that
share rows of x run together. Programs of the first product go on from tile to tile, as many as run at once, and the
next tile's operands arrive while the results of this one are finished; that made the second product slower, which has a
residual to load as well (docs/log.md).

Usage:
    y = launch(x, weight, scale, bias, gain, pixels, tile)                  # x [M, K] codes -> [M, N] codes
    codes = launch_add_(u, x, weight, scale, gain, inverse, pixels, tile)   # u [M, N] 16-bit, changed in place
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from owl_wms.ops.codes import LARGEST
from owl_wms.ops.common.gpu import processors
from owl_wms.ops.grouped_conv.reference import SLOPE

ROUNDER = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, halves to even


@dataclass(frozen=True, slots=True)
class Tile:
    """The tile that one Triton program computes: `pixels x channels` outputs, `depth` codes of a row at a time."""

    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int


TILES = (Tile(128, 128, 128, 4, 3), Tile(128, 64, 64, 4, 4))


@triton.jit
def _encode(y, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    if INTEGER:
        y = (y + ROUNDER) - ROUNDER
    return y


@triton.jit
def linear_kernel(
    x_desc, w_desc, out_desc, scale_ptr, bias_ptr, gain_ptr, depth, channels, pixels, rows, column_tiles, tiles,
    INTEGER: tl.constexpr, LARGEST: tl.constexpr, SLOPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = tile // column_tiles * BM, tile % column_tiles * BN
        sums = tl.zeros((BM, BN), SUM)
        for k in range(0, depth, BK):
            sums = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, sums, out_dtype=SUM)
        row, column = m + tl.arange(0, BM), n + tl.arange(0, BN)
        inverse_gain = tl.load(gain_ptr + row // pixels * 2 + 1, row < rows, 0.0)
        scale = tl.load(scale_ptr + column, column < channels, 0.0)
        bias = tl.load(bias_ptr + column, column < channels, 0.0)
        y = sums.to(tl.float32) * scale[None, :] + bias[None, :] * inverse_gain[:, None]
        y = tl.maximum(y, SLOPE * y)
        out_desc.store([m, n], _encode(y, LARGEST, INTEGER).to(out_desc.dtype))


@triton.jit
def add_kernel(
    x_desc, w_desc, u_desc, codes_desc, scale_ptr, inverse_ptr, gain_ptr, depth, channels, pixels, rows, column_tiles,
    INTEGER: tl.constexpr, LARGEST: tl.constexpr, CODES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    m, n = tl.program_id(0) // column_tiles * BM, tl.program_id(0) % column_tiles * BN
    sums = tl.zeros((BM, BN), SUM)
    for k in range(0, depth, BK):
        sums = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, sums, out_dtype=SUM)
    row, column = m + tl.arange(0, BM), n + tl.arange(0, BN)
    gain = tl.load(gain_ptr + row // pixels * 2, row < rows, 0.0)
    scale = tl.load(scale_ptr + column, column < channels, 0.0)
    y = sums.to(tl.float32) * scale[None, :] * gain[:, None] + u_desc.load([m, n]).to(tl.float32)
    u_desc.store([m, n], y.to(u_desc.dtype))
    if CODES:
        inverse_gain = tl.load(gain_ptr + row // pixels * 2 + 1, row < rows, 0.0)
        inverse = tl.load(inverse_ptr + column, column < channels, 0.0)
        codes = _encode(y * inverse[None, :] * inverse_gain[:, None], LARGEST, INTEGER)
        codes_desc.store([m, n], codes.to(codes_desc.dtype))


def _descriptors(x: Tensor, weight: Tensor, tile: Tile) -> tuple[TensorDescriptor, TensorDescriptor]:
    return (
        TensorDescriptor.from_tensor(x, [tile.pixels, tile.depth]),
        TensorDescriptor.from_tensor(weight, [tile.channels, tile.depth]),
    )


def _numbers(x: Tensor, weight: Tensor, pixels: int, tile: Tile) -> tuple[int, tuple[int, ...]]:
    """Number of tiles, and the numbers that both kernels take."""
    rows, depth, channels = x.shape[0], x.shape[1], weight.shape[0]
    column_tiles = triton.cdiv(channels, tile.channels)
    return triton.cdiv(rows, tile.pixels) * column_tiles, (depth, channels, pixels, rows, column_tiles)


def _format(x: Tensor, tile: Tile) -> dict[str, object]:
    integer = x.dtype == torch.int8
    return {
        "INTEGER": integer, "LARGEST": LARGEST[x.dtype], "BM": tile.pixels, "BN": tile.channels, "BK": tile.depth,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def launch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gain: Tensor, pixels: int, tile: Tile) -> Tensor:
    """Codes `[M, N]` of `leaky(x weight^T scale + bias / gain)`; x `[M, K]` codes, `pixels` rows an image."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    tiles, numbers = _numbers(x, weight, pixels, tile)
    # Two programs fit a multiprocessor; the interpreter gets a few, so that they loop there too.
    at_once = 2 * processors(x.device) if x.is_cuda else 3
    out_desc = TensorDescriptor.from_tensor(out, [tile.pixels, tile.channels])
    linear_kernel[(min(tiles, at_once),)](
        *_descriptors(x, weight, tile), out_desc, scale, bias, gain, *numbers, tiles, SLOPE=SLOPE, **_format(x, tile)
    )
    return out


def launch_add_(
    u: Tensor, x: Tensor, weight: Tensor, scale: Tensor, gain: Tensor, inverse: Tensor | None, pixels: int, tile: Tile
) -> Tensor | None:
    """`u += gain scale x weight^T` in place on `u [M, N]`; its codes in steps of `gain / inverse` where given."""
    codes = None if inverse is None else x.new_empty(u.shape)
    tiles, numbers = _numbers(x, weight, pixels, tile)
    block = [tile.pixels, tile.channels]
    u_desc = TensorDescriptor.from_tensor(u, block)
    codes_desc = u_desc if codes is None else TensorDescriptor.from_tensor(codes, block)
    add_kernel[(tiles,)](
        *_descriptors(x, weight, tile), u_desc, codes_desc, scale, scale if inverse is None else inverse, gain,
        *numbers, CODES=codes is not None, **_format(x, tile),
    )  # fmt: skip
    return codes
