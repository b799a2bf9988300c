"""diffusers' AutoencoderDC decoder in less memory, exactly: its convolutional stages tile by tile.

Why it exists: attention is global and stands in the small first stages. The memory goes to the large last ones, which
are convolutions and norms of single pixels. A tile of theirs needs the pixels of its own place and a *halo* around it,
as wide as the convolutions reach. So the first stages run on the whole image, the last ones on tiles with their halo,
whose rim is thrown away. The frames are those of the whole decoder but for the rounding of other convolution
algorithms. diffusers' `enable_tiling()` cuts the latents instead, which changes what attention sees, and blends.

Usage:
    frames = decode_in_tiles(decoder, z, side=128)      # z [B, c, h, w] -> [B, C, H, W]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST = 16
"""Least side of a tile, in pixels of the last stage with attention: below it, halos outweigh tiles."""


def halo(tail: list[Any]) -> int:
    """Pixels around a tile that its frames depend on, on the grid of the tail's input.

    Args:
        tail: residual and up blocks in order; an output convolution follows them.
    """
    reach = 1  # of the output convolution; where it enlarges, one pixel of its input as well
    for block in reversed(tail):
        if type(block).__name__ != "DCUpBlock2d":
            reach += 2  # two 3x3 convolutions
        elif block.interpolate:
            reach = -(-(reach + 1) // 2)  # a 3x3 convolution on the large grid, then two pixels for each small one
        else:
            reach = -(-reach // 2) + 1
    return reach


def split(decoder: Any) -> tuple[list[Any], list[Any]]:
    """The blocks up to the last attention, and those after it."""
    blocks = [block for stage in reversed(decoder.up_blocks) for block in stage]
    attentive = [i for i, block in enumerate(blocks) if type(block).__name__ == "EfficientViTBlock"]
    first = attentive[-1] + 1 if attentive else 0
    return blocks[:first], blocks[first:]


def decode_in_tiles(decoder: Any, z: Tensor, side: int) -> Tensor:
    """Decodes latents `[B, c, h, w]` to `[B, C, H, W]`, in eval mode.

    Args:
        decoder: diffusers' AutoencoderDC decoder.
        side: of a tile without its halo, in pixels of the last stage with attention, >= 1. Memory beside the result and
            the first stages goes with `(side + 2 * halo) ** 2`.
    """
    x = decoder.conv_in(z)
    if decoder.in_shortcut:
        x = x + z.repeat_interleave(decoder.in_shortcut_repeats, dim=1)
    head, tail = split(decoder)
    for block in head:
        x = block(x)
    rim = halo(tail)
    height, width = x.shape[-2:]
    frames: Tensor | None = None
    for top in range(0, height, side):
        for left in range(0, width, side):
            first_row, first_column = max(0, top - rim), max(0, left - rim)
            tile = x[:, :, first_row : top + side + rim, first_column : left + side + rim]
            for block in tail:
                tile = block(tile)
            tile = decoder.norm_out(tile.movedim(1, -1)).movedim(-1, 1)
            tile = decoder.conv_out(decoder.conv_act(tile))
            factor = tile.shape[-1] // min(width - first_column, left + side + rim - first_column)
            if frames is None:
                shape = (len(z), tile.shape[1], height * factor, width * factor)
                frames = torch.empty(shape, dtype=tile.dtype, device=tile.device)
            row, column = (top - first_row) * factor, (left - first_column) * factor
            place = frames[:, :, top * factor : (top + side) * factor, left * factor : (left + side) * factor]
            place.copy_(tile[:, :, row : row + place.shape[-2], column : column + place.shape[-1]])
    assert frames is not None  # there is at least one tile
    return frames
