"""The CUDA kernel behind `conv3x3`: pixels stay in shared memory for all nine taps (kernel.cu says how).

Why CUDA C++: a product's operand that starts anywhere in a box of pixels is what Triton cannot say.

Usage:
    if fits(x, weight):
        y = launch(x, weight, bias, residual, relu=True)      # sm_90, 16-bit
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.gpu import processors
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, dtype_defines
from owl_wms.ops.common.tensor_maps import tensor_map

HEADERS = ("common/hopper.cuh", "common/tensor_copies.cuh")
THREADS = 384
# As in kernel.cu: a tile, the pieces that are copied of it, and its rings in shared memory.
ROWS, WIDTH, COLUMNS, DEPTH = 16, 16, 128, 64
X_PIECE, PIECE = (1, 6, WIDTH + 2, DEPTH), (1, ROWS // 2, WIDTH, DEPTH)
X_SLOTS, W_SLOTS = 2, 4
PHASE_COLUMNS = 32  # of one phase that are copied at a time, see SHUFFLE in kernel.cu
SHARED_BYTES = (
    X_SLOTS * (ROWS + 2) * (WIDTH + 2) * 128
    + W_SLOTS * COLUMNS * 128
    + ROWS * WIDTH * COLUMNS * 2
    + 8 * (2 * X_SLOTS + 2 * W_SLOTS + 3 * 2)
)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Returns whether tiles divide `x [B, H, W, C]` and the channels of `weight [O, 3, 3, C]`."""
    height, width, channels = x.shape[1:]
    return height % ROWS == 0 and width % WIDTH == 0 and channels % DEPTH == 0 and weight.shape[0] % COLUMNS == 0


def holds_all_channels(weight: Tensor) -> bool:
    """Returns whether one tile has every output channel of `weight [O, 3, 3, C]`, as a norm in the kernel needs."""
    return weight.shape[0] == COLUMNS


def kernel_of(
    dtype: torch.dtype, bias: bool, relu: bool, residual: bool, silu: bool = False, norm_eps: float | None = None
) -> Kernel:
    """The variant for what follows the sums."""
    defines = [f"BIAS={bias:d}", f"RELU={relu:d}", f"RESIDUAL={residual:d}"]
    defines += ["SILU"] if silu else []
    defines += [] if norm_eps is None else ["NORM", f"EPS={norm_eps!r}f"]
    return Kernel("conv3x3", "conv3x3", (*defines, *dtype_defines(dtype)), SHARED_BYTES, HEADERS, "a")


def fits_shuffled(x: Tensor, weight: Tensor) -> bool:
    """Returns whether `launch_shuffled` takes these: 64 columns then lie side by side in a row of the result."""
    return fits(x, weight) and weight.shape[0] % (4 * PHASE_COLUMNS) == 0


def shuffled_kernel_of(dtype: torch.dtype, bias: bool) -> Kernel:
    """The variant of `launch_shuffled`."""
    defines = (f"BIAS={bias:d}", "RELU=0", "RESIDUAL=1", "SHUFFLE=1")
    return Kernel("conv3x3", "conv3x3", (*defines, *dtype_defines(dtype)), SHARED_BYTES, HEADERS, "a")


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    silu: bool = False,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """The convolution of contiguous `x [B, H, W, C]`; weight `[O, 3, 3, C]`, bias `[O]` fp32, residual like the result.

    Args:
        norm: the gain `[O]` fp32 and eps of an RMS norm over the channels of the sums; the bias is added after it. Only
            where `holds_all_channels`.

    Raises:
        ValueError: another shape or dtype; the kernel would read and write something else.
        KernelError: compilation, loading or launching failed.
    """
    batch, height, width, channels = x.shape
    out_channels = weight.shape[0]
    out = x.new_empty(batch, height, width, out_channels)
    alike = residual is None or (residual.shape == out.shape and residual.dtype == x.dtype)
    if norm is not None and not holds_all_channels(weight):
        raise ValueError(f"a norm in the kernel needs {COLUMNS} output channels, got {out_channels}: use how=RESIDENT")
    if not alike or not fits(x, weight) or weight.dtype != x.dtype or weight.shape[1:] != (3, 3, channels):
        shapes = [None if t is None else (list(t.shape), t.dtype) for t in (x, weight, residual)]
        raise ValueError(
            f"no resident 3x3 convolution of {shapes[0]} with {shapes[1]}, residual {shapes[2]}; it takes one 16-bit "
            f"dtype, H and W in multiples of {ROWS} and {WIDTH}, C and O of {DEPTH} and {COLUMNS}: use how=LIBRARY"
        )
    if not out.numel():
        return out
    # Named, so that a copy lives until the launch is queued; after that the allocator's order of streams keeps it.
    x, weight = aligned(x), aligned(weight)
    residual = None if residual is None else aligned(residual)
    bias = None if bias is None else aligned(bias.float())
    gain = None if norm is None else aligned(norm[0].float())
    across, column_tiles = width // WIDTH, out_channels // COLUMNS
    tiles = batch * (height // ROWS) * across * column_tiles
    eps = None if norm is None else norm[1]
    kernel_of(x.dtype, bias is not None, relu, residual is not None, silu, eps).launch(
        x.device,
        grid=min(tiles, processors(x.device)),
        block=THREADS,
        arguments=(
            tensor_map(x, X_PIECE),
            tensor_map(weight.view(out_channels, 9 * channels), (COLUMNS, DEPTH)),
            tensor_map(out, PIECE),
            tensor_map(out if residual is None else residual, PIECE),
            bias,
            height // ROWS, across, column_tiles, tiles, channels // DEPTH,
            *(() if gain is None else (gain,)),
        ),
    )  # fmt: skip
    return out


def launch_shuffled(x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor) -> Tensor:
    """`base + pixel_shuffle(conv(x) + bias)`, a tensor of its own, without a pass for the shuffle.

    Args:
        x: `[B, H, W, C]`, contiguous.
        weight, bias: `[4 O, 3, 3, C]` and `[4 O]` fp32, output channels in the order of a pixel shuffle.
        base: `[B, 2H, 2W, O]`.

    Raises:
        ValueError: another shape or dtype; the kernel would read and write something else.
        KernelError: compilation, loading or launching failed.
    """
    batch, height, width, channels = x.shape
    columns, out_channels = weight.shape[0], weight.shape[0] // 4
    alike = base.shape == (batch, 2 * height, 2 * width, out_channels) and x.dtype == weight.dtype == base.dtype
    if not alike or not fits_shuffled(x, weight) or weight.shape[1:] != (3, 3, channels):
        shapes = [(list(t.shape), t.dtype) for t in (x, weight, base)]
        raise ValueError(
            f"no shuffled 3x3 convolution of {shapes[0]} with {shapes[1]} onto {shapes[2]}; it takes one 16-bit dtype, "
            f"H and W in multiples of {ROWS} and {WIDTH}, C of {DEPTH} and 4 O of {COLUMNS}"
        )
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    # Named, so that a copy lives until the launch is queued; after that the allocator's order of streams keeps it.
    x, weight, base = aligned(x), aligned(weight), aligned(base)
    bias = None if bias is None else aligned(bias.float())
    # Rows and their parity apart, two neighbours of a row together: a phase of the shuffle is a box.
    enlarged = (batch, height, 2, width, 2 * out_channels)
    piece = (1, ROWS // 2, 1, WIDTH, DEPTH)
    across, column_tiles = width // WIDTH, columns // COLUMNS
    tiles = batch * (height // ROWS) * across * column_tiles
    shuffled_kernel_of(x.dtype, bias is not None).launch(
        x.device,
        grid=min(tiles, processors(x.device)),
        block=THREADS,
        arguments=(
            tensor_map(x, X_PIECE),
            tensor_map(weight.view(out_channels, 4, 9 * channels), (PHASE_COLUMNS, 1, DEPTH)),
            tensor_map(out.view(enlarged), piece),
            tensor_map(base.view(enlarged), piece),
            bias,
            height // ROWS, across, column_tiles, tiles, channels // DEPTH,
            out_channels,
        ),
    )  # fmt: skip
    return out
