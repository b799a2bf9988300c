"""Launches the variants of conv3x3/kernel.cu that decode consecutive frames.

Why beside `conv3x3.resident`: these read a second tensor, write an enlarged image or finish the frames, and take any
height and width, since a tile may reach over the border.

Usage:
    y = launch_frame(x, past, weight, bias, residual, columns=64)       # sm_90, 16-bit
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.ops.common.gpu import processors
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import aligned, dtype_defines
from owl_wms.ops.common.tensor_maps import TensorMap, tensor_map
from owl_wms.ops.conv3x3.resident import DEPTH, HEADERS, PIECE, ROWS, THREADS, W_SLOTS, WIDTH, X_PIECE, X_SLOTS
from owl_wms.ops.frame_conv.reference import COLOURS

BARRIER_BYTES = 256  # at least: 8 for each slot of pixels and of weights, twice, and for six more
X_BYTES = X_SLOTS * (ROWS + 2) * (WIDTH + 2) * DEPTH * 2
PLANES, BYTES = 1, 2  # FRAMES of kernel.cu


def kernel_of(
    dtype: torch.dtype,
    *,
    columns: int,
    taps: int = 9,
    bias: bool = False,
    relu: int = 0,
    residual: bool = False,
    hold: bool = False,
    frames: int = 0,
    patch: int = 1,
    past: bool = False,
) -> Kernel:
    """The variant; arguments are the symbols of kernel.cu, where they are explained."""
    named = {
        **{"BIAS": bias, "RELU": relu, "RESIDUAL": residual, "COLUMNS": columns, "PAST": past, "ENLARGE": taps == 4},
        **{"HOLD": hold, "FRAMES": frames, "PATCH": patch},
    }
    slots = taps if hold else W_SLOTS
    shared = X_BYTES + slots * columns * DEPTH * 2 + (0 if frames else ROWS * WIDTH * columns * 2) + BARRIER_BYTES
    defines = (*(f"{name}={value:d}" for name, value in named.items()), *dtype_defines(dtype))
    return Kernel("conv3x3", "conv3x3", defines, shared, HEADERS, "a")


def fits_frame(x: Tensor, past: Tensor | None, weight: Tensor, columns: int) -> bool:
    """Returns whether `launch_frame` takes these with tiles of `columns` output channels."""
    inputs = x.shape[-1] * (1 if past is None else 2)
    return x.shape[-1] % DEPTH == 0 and weight.shape[1:] == (3, 3, inputs) and weight.shape[0] % columns == 0


def fits_enlarge(x: Tensor, weight: Tensor, frames: int, columns: int) -> bool:
    """Returns whether `launch_enlarge` takes these: a tile lies in one phase, and 64 of its channels in one frame."""
    each = weight.shape[0] // (4 * frames)
    exact = weight.shape[0] == 4 * frames * each and each % DEPTH == 0 and (frames * each) % columns == 0
    return x.shape[-1] % DEPTH == 0 and weight.shape[1:] == (2, 2, x.shape[-1]) and exact


def fits_picture(x: Tensor, weight: Tensor, patch: int) -> bool:
    """Returns whether `launch_picture` takes these: one chunk of input channels."""
    return x.shape[-1] == DEPTH and weight.shape[1:] == (3, 3, DEPTH) and weight.shape[0] >= COLOURS * patch**2


def launch_frame(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None, columns: int
) -> Tensor:
    """`frame_conv` of 16-bit tensors on a GPU of compute capability 9.0.

    Raises:
        ValueError: shapes or dtypes that the kernel would misread.
        KernelError: compilation, loading or launching failed.
    """
    batch, height, width, _ = x.shape
    out = x.new_empty(batch, height, width, weight.shape[0])
    shapes = [
        (past, (x if past is None else past).shape[:1] + x.shape[1:]),
        (residual, out.shape),
        (weight, weight.shape),
    ]
    alike = all(t is None or (t.shape == shape and t.dtype == x.dtype) for t, shape in shapes)
    frames = 1 if past is None else batch // max(len(past), 1)
    whole = past is None or frames * len(past) == batch
    if not alike or not whole or not fits_frame(x, past, weight, columns):
        raise _misread("frame_conv", x, past, weight, residual)
    if not out.numel():
        return out
    kernel = kernel_of(
        x.dtype, columns=columns, bias=bias is not None, relu=1 if residual is None else 2,
        residual=residual is not None, past=past is not None,
        hold=weight.shape[0] == columns == weight.shape[-1] == DEPTH,
    )  # fmt: skip
    # Named, so that a copy lives until the launch is queued; after that the allocator's order of streams keeps it.
    x, weight = aligned(x), aligned(weight)
    past = x if past is None else aligned(past)
    residual = out if residual is None else aligned(residual)
    maps = (_image(x), _weight(weight, columns), tensor_map(out, PIECE), tensor_map(residual, PIECE))
    _launch(kernel, x, weight, maps, bias, _image(past), None, columns, frames, weight.shape[0])
    return out


def launch_enlarge(x: Tensor, weight: Tensor, frames: int, relu: bool, columns: int) -> Tensor:
    """`enlarge_conv` of 16-bit tensors on a GPU of compute capability 9.0; errors as `launch_frame`."""
    if weight.dtype != x.dtype or not fits_enlarge(x, weight, frames, columns):
        raise _misread("enlarge_conv", x, weight)
    batch, height, width, _ = x.shape
    channels = weight.shape[0] // (4 * frames)
    out = x.new_empty(batch * frames, 2 * height, 2 * width, channels)
    if not out.numel():
        return out
    x, weight = aligned(x), aligned(weight)
    pairs = out.view(batch * frames, height, 2, width, 2 * channels)
    stored = tensor_map(pairs, (1, ROWS // 2, 1, WIDTH, DEPTH))
    image = _image(x)
    kernel = kernel_of(x.dtype, columns=columns, taps=4, relu=int(relu))
    _launch(
        kernel,
        x,
        weight,
        (image, _weight(weight, columns), stored, stored),
        None,
        image,
        None,
        columns,
        frames,
        channels,
    )
    return out


def launch_picture(x: Tensor, weight: Tensor, bias: Tensor, patch: int, as_bytes: bool) -> Tensor:
    """`picture_conv` of 16-bit tensors on a GPU of compute capability 9.0; errors as `launch_frame`."""
    if weight.dtype != x.dtype or bias.shape != weight.shape[:1] or not fits_picture(x, weight, patch):
        raise _misread("picture_conv", x, weight, bias)
    batch, height, width, _ = x.shape
    columns = weight.shape[0]
    if as_bytes:
        out = x.new_empty(batch, patch * height, patch * width, COLOURS, dtype=torch.uint8)
    else:
        out = x.new_empty(batch, COLOURS, patch * height, patch * width)
    if not out.numel():
        return out
    x, weight = aligned(x), aligned(weight)
    image = _image(x)
    kernel = kernel_of(
        x.dtype, columns=columns, bias=True, hold=True, frames=BYTES if as_bytes else PLANES, patch=patch
    )
    _launch(kernel, x, weight, (image, _weight(weight, columns), image, image), bias, image, out, columns, 1, columns)
    return out


def _launch(
    kernel: Kernel, x: Tensor, weight: Tensor, maps: tuple[TensorMap, ...], bias: Tensor | None, past: TensorMap,
    pictures: Tensor | None, columns: int, frames: int, channels: int,
) -> None:  # fmt: skip
    batch, height, width, _ = x.shape
    down, across = -(-height // ROWS), -(-width // WIDTH)
    column_tiles = weight.shape[0] // columns
    tiles = batch * down * across * column_tiles
    chunks = weight.shape[-1] // DEPTH
    bias = None if bias is None else aligned(bias.float())
    kernel.launch(
        x.device,
        grid=min(tiles, processors(x.device)),
        block=THREADS,
        arguments=(
            *maps,
            bias,
            down,
            across,
            column_tiles,
            tiles,
            chunks,
            past,
            pictures,
            frames,
            channels,
            height,
            width,
        ),
    )


def _image(x: Tensor) -> TensorMap:
    return tensor_map(x, X_PIECE)


def _weight(weight: Tensor, columns: int) -> TensorMap:
    return tensor_map(weight.view(weight.shape[0], -1), (columns, DEPTH))


def _misread(name: str, *tensors: Tensor | None) -> ValueError:
    got = ", ".join("None" if t is None else f"{list(t.shape)} {t.dtype}" for t in tensors)
    return ValueError(f"no kernel of {name} for {got}: use how=LIBRARY")
