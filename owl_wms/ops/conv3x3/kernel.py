"""Triton kernels behind `conv3x3`: a product for few output channels with the epilogue inside, and that epilogue alone.

Why it exists: the tensor copy engine fetches a shifted rectangle of an NHWC image, zeros past the border included, as
one tile of a matrix product. So a 3x3 convolution is a product over 9 C with nothing unrolled in memory, and bias,
ReLU and residual are applied to the fp32 sums. For many channels kernel.cu does better.

Usage:
    y = launch(x, weight, bias, residual, True, NARROW)     # CUDA, 16-bit, `fits(x, weight, NARROW)`
    finish_(y, bias, residual, False)                         # y += bias + residual, in place
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, slots=True)
class Tile:
    """The tile of one Triton program: `pixels x channels` outputs, `depth` input channels of one tap at a time."""

    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int


NARROW = Tile(128, 16, 64, 4, 4)  # the output convolution's


def fits(x: Tensor, weight: Tensor, tile: Tile) -> bool:
    """Returns whether the tile divides rows and channels.

    A tile is a piece of one row: a rectangle of several rows would pass through registers on its way.
    """
    width, channels = x.shape[2:]
    return width % tile.pixels == 0 and channels % tile.depth == 0 and weight.shape[0] % tile.channels == 0


@triton.jit
def conv_kernel(
    x_desc, w_desc, out_desc, residual_desc, bias_ptr, height, width, column_tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr,
    RELU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    pixel_tile = tl.program_id(0) // column_tiles
    n = tl.program_id(0) % column_tiles * BN
    across = width // BM
    row = pixel_tile // across
    batch = row // height
    y = row % height
    x = pixel_tile % across * BM

    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(9 * CHUNKS):
        tap = step // CHUNKS
        k = step % CHUNKS * BK
        a = x_desc.load([batch, y + tap // 3 - 1, x + tap % 3 - 1, k]).reshape(BM, BK)
        w = w_desc.load([n, tap * CHUNKS * BK + k])
        acc = tl.dot(a, w.T, acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n + tl.arange(0, BN)).to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if HAS_RESIDUAL:
        acc += residual_desc.load([batch, y, x, n]).reshape(BM, BN).to(tl.float32)
    out_desc.store([batch, y, x, n], acc.to(out_desc.dtype).reshape(1, 1, BM, BN))


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, tile: Tile) -> Tensor:
    """The convolution of contiguous `x [B, H, W, C]`."""
    batch, height, width, channels = x.shape
    out_channels = weight.shape[0]
    out = x.new_empty(batch, height, width, out_channels)
    image_block, out_block = [1, 1, tile.pixels, tile.depth], [1, 1, tile.pixels, tile.channels]
    pixel_tiles = batch * height * width // tile.pixels
    column_tiles = out_channels // tile.channels
    out_desc = TensorDescriptor.from_tensor(out, out_block)
    conv_kernel[(pixel_tiles * column_tiles,)](
        TensorDescriptor.from_tensor(x, image_block),
        TensorDescriptor.from_tensor(weight.view(out_channels, 9 * channels), [tile.channels, tile.depth]),
        out_desc,
        out_desc if residual is None else TensorDescriptor.from_tensor(residual, out_block),
        out if bias is None else bias,
        height, width, column_tiles,
        BM=tile.pixels, BN=tile.channels, BK=tile.depth, CHUNKS=channels // tile.depth,
        RELU=relu, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def finish_kernel(
    y_ptr, bias_ptr, residual_ptr, total, channels,
    RELU: tl.constexpr, SILU: tl.constexpr, RELU_LAST: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < total
    y = tl.load(y_ptr + place, mask).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + place % channels, mask).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if SILU:
        y = y * tl.sigmoid(y)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + place, mask).to(tl.float32)
    if RELU_LAST:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask)


def finish_(
    y: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, silu: bool = False, *, relu_last: bool = False
) -> Tensor:
    """`y = relu(y + bias) + residual` in place on contiguous `y [..., C]`, summed in fp32.

    `silu` applies SiLU instead of ReLU; `relu_last` applies a ReLU to the whole sum.
    """
    block = 4096
    finish_kernel[(triton.cdiv(y.numel(), block),)](
        y, y if bias is None else bias, y if residual is None else residual, y.numel(), y.shape[-1],
        RELU=relu, SILU=silu, RELU_LAST=relu_last, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        BLOCK=block, num_warps=8,
    )  # fmt: skip
    return y
