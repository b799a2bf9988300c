"""Triton kernels behind `conv3x3`: an implicit matrix product with the epilogue inside, and that epilogue alone.

Why it exists: the tensor copy engine fetches a shifted rectangle of an NHWC image, zeros past the border included, as one
tile of a matrix product. So a 3x3 convolution is a product over 9 C with nothing unrolled in memory, and bias, ReLU and
residual are applied to the fp32 sums where the library would need another pass over the largest tensors of the decoder.

Usage:
    y = launch(x, weight, bias, residual, True, TILES[0])     # CUDA, 16-bit, `fits(x, weight, TILES[0])`
    finish_(y, bias, residual, False)                         # y += bias + residual, in place
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `pixels x channels` outputs, `depth` input channels of one tap at a time."""

    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int
    persistent: bool


# The widest tile Hopper's registers hold, twice with programs that stay to overlap a store with the next loads, and two
# narrower ones of which two share a multiprocessor.
TILES = (
    Tile(128, 256, 64, 8, 4, False),
    Tile(128, 256, 64, 8, 3, True),
    Tile(128, 128, 64, 4, 3, False),
    Tile(128, 128, 64, 8, 3, False),
)
GROUP = 16


def fits(x: Tensor, weight: Tensor, tile: Tile) -> bool:
    """Whether the tile divides rows and channels.

    A tile is a piece of one row: a rectangle of several rows would pass through registers on its way to the tensor cores.
    """
    width, channels = x.shape[2:]
    return width % tile.pixels == 0 and channels % tile.depth == 0 and weight.shape[0] % tile.channels == 0


@triton.jit
def _conv_tile(
    index, x_desc, w_desc, out_desc, residual_desc, residual_ptr, bias_ptr, height, width, channels, out_channels, column_tiles, pixel_tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    RELU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    # GROUP pixel tiles run over all channel tiles together, so that the weights and the rows they share stay in the L2.
    group_size = GROUP * column_tiles
    first = index // group_size * GROUP
    size = min(pixel_tiles - first, GROUP)
    inside = index % group_size
    pixel_tile = first + inside % size
    n = inside // size * BN
    across = width // BM
    row = pixel_tile // across
    batch = row // height
    y = row % height
    x = pixel_tile % across * BM

    chunks = channels // BK
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(9 * chunks):
        tap = step // chunks
        k = step % chunks * BK
        a = x_desc.load([batch, y + tap // 3 - 1, x + tap % 3 - 1, k]).reshape(BM, BK)
        w = w_desc.load([n, tap * channels + k])
        acc = tl.dot(a, w.T, acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n + tl.arange(0, BN)).to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0)
    if HAS_RESIDUAL:
        if PERSISTENT:  # beside the next tile's inputs there is no shared memory left for it
            pixels = pixel_tile.to(tl.int64) * BM + tl.arange(0, BM)
            places = pixels[:, None] * out_channels + n + tl.arange(0, BN)[None, :]
            acc += tl.load(residual_ptr + places).to(tl.float32)
        else:
            acc += residual_desc.load([batch, y, x, n]).reshape(BM, BN).to(tl.float32)
    out_desc.store([batch, y, x, n], acc.to(out_desc.dtype).reshape(1, BM, BN))


@triton.jit
def conv_kernel(
    x_desc, w_desc, out_desc, residual_desc, residual_ptr, bias_ptr, height, width, channels, out_channels, column_tiles, pixel_tiles, tiles,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    RELU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _conv_tile(
                index, x_desc, w_desc, out_desc, residual_desc, residual_ptr, bias_ptr, height, width, channels,
                out_channels, column_tiles, pixel_tiles, BM, BN, BK, GROUP, RELU, HAS_BIAS, HAS_RESIDUAL, PERSISTENT,
            )  # fmt: skip
    else:
        _conv_tile(
            tl.program_id(0), x_desc, w_desc, out_desc, residual_desc, bias_ptr, height, width, channels,
            column_tiles, pixel_tiles, BM, BN, BK, GROUP, RELU, HAS_BIAS, HAS_RESIDUAL, PERSISTENT,
        )  # fmt: skip


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, tile: Tile, programs: int = 0
) -> Tensor:
    """The convolution of contiguous `x [B, H, W, C]`; `programs` limits a persistent grid (default: multiprocessors)."""
    batch, height, width, channels = x.shape
    out_channels = weight.shape[0]
    out = x.new_empty(batch, height, width, out_channels)
    image_block, out_block = [1, 1, tile.pixels, tile.depth], [1, 1, tile.pixels, tile.channels]
    pixel_tiles = batch * height * width // tile.pixels
    column_tiles = out_channels // tile.channels
    tiles = pixel_tiles * column_tiles
    if tile.persistent:
        grid = min(tiles, programs or torch.cuda.get_device_properties(x.device).multi_processor_count)
    else:
        grid = tiles
    out_desc = TensorDescriptor.from_tensor(out, out_block)
    conv_kernel[(grid,)](
        TensorDescriptor.from_tensor(x, image_block),
        TensorDescriptor.from_tensor(weight.view(out_channels, 9 * channels), [tile.channels, tile.depth]),
        out_desc,
        out_desc if residual is None else TensorDescriptor.from_tensor(residual, out_block),
        out if residual is None else residual,
        out if bias is None else bias,
        height, width, channels, out_channels, column_tiles, pixel_tiles, tiles,
        BM=tile.pixels, BN=tile.channels, BK=tile.depth, GROUP=GROUP,
        RELU=relu, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, PERSISTENT=tile.persistent,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def finish_kernel(
    y_ptr, bias_ptr, residual_ptr, total, channels,
    RELU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < total
    y = tl.load(y_ptr + place, mask).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + place % channels, mask).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + place, mask).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask)


def finish_(y: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """`y = relu(y + bias) + residual` in place on contiguous `y [..., C]`, summed in fp32."""
    block = 4096
    finish_kernel[(triton.cdiv(y.numel(), block),)](
        y, y if bias is None else bias, y if residual is None else residual, y.numel(), y.shape[-1],
        RELU=relu, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return y
