"""References of `frame_conv`, `enlarge_conv` and `picture_conv` in plain PyTorch, and the layout of their weights.

Usage:
    y = frame_reference(x, past, pack(conv.weight), conv.bias, None)
    y = enlarge_reference(x, pack_enlarging(grow.weight, conv.weight), frames=2, relu=False)
    weight, bias = pack_picture(conv.weight, conv.bias)
    frames = picture_reference(x, weight, bias, patch=2, as_bytes=False)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms.ops.conv3x3.reference import pack

COLOURS = 3
PICTURE_COLUMNS = (
    32,
    64,
)  # what the output channels of the last convolution are padded to, the smaller that holds them


def previous(x: Tensor, past: Tensor) -> Tensor:
    """Returns for every frame of `x [b * n, H, W, C]` the one before it.

    Args:
        x: n consecutive frames of each of b streams, stream by stream.
        past: `[b, H, W, C]`, the frame before the first one.
    """
    if len(x) == len(past):
        return past
    frames = x.unflatten(0, (len(past), -1))
    return torch.cat([past[:, None], frames[:, :-1]], 1).flatten(0, 1)


def frame_reference(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`relu(conv([x, past]) + bias + residual)` with zero padding of 1; `[B, H, W, C]` in and out."""
    rows = x if past is None else torch.cat([x, previous(x, past)], -1)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(rows.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, padding=1).permute(0, 2, 3, 1)
    return F.relu(y if residual is None else y + residual).contiguous()


def grown(grow: Tensor, weight: Tensor) -> Tensor:
    """Returns the weights `[frames * O, C, 3, 3]` of one convolution that makes several frames and convolves each.

    Args:
        grow: `[frames * C, C, 1, 1]`, a 1x1 convolution without bias whose output channels are frames of C channels.
        weight: `[O, C, 3, 3]` of the convolution behind it.
    """
    frames = grow.flatten(1).unflatten(0, (-1, weight.shape[1]))
    return torch.einsum("ochw,fcd->fodhw", weight, frames).flatten(0, 1)


def pack_enlarging(grow: Tensor, weight: Tensor) -> Tensor:
    """Returns `[4 * frames * O, 2, 2, C]`, what each phase of an output pixel sees of the pixels before enlargement.

    Row and column 2 y + p of the enlarged image read its rows 2 y + p - 1 to 2 y + p + 1. Before enlargement these are
    the rows y - 1, y, y for p = 0 and y, y, y + 1 for p = 1, so two of the three taps meet the same pixel and add up.

    Args:
        grow, weight: as in `grown`. Output channels are ordered by phase, then by frame.
    """
    merged = grown(grow, weight)

    def halves(taps: Tensor, axis: int, phase: int) -> Tensor:
        first, middle, last = taps.unbind(axis)
        pair = (first, middle + last) if phase == 0 else (first + middle, last)
        return torch.stack(pair, axis)

    phases = [halves(halves(merged, 2, p // 2), 3, p % 2) for p in range(4)]
    return torch.cat(phases).permute(0, 2, 3, 1).contiguous()


def enlarge_reference(x: Tensor, weight: Tensor, frames: int, relu: bool) -> Tensor:
    """Nearest enlargement by two, growth and 3x3 convolution: `[B, H, W, C] -> [B * frames, 2H, 2W, O]`."""
    batch, height, width, _ = x.shape
    image, phases = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2).chunk(4)
    made = [
        # Padding adds a row and a column too many; the phase says at which end.
        F.conv2d(image, taps, padding=1)[:, :, p // 2 : p // 2 + height, p % 2 : p % 2 + width]
        for p, taps in enumerate(phases)
    ]
    y = torch.stack(made, 1).unflatten(1, (2, 2)).unflatten(3, (frames, -1))  # [B, py, px, frames, O, H, W]
    y = y.permute(0, 3, 5, 1, 6, 2, 4).reshape(batch * frames, 2 * height, 2 * width, -1)
    return F.relu(y) if relu else y


def pack_picture(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns weights `[32 or 64, 3, 3, C]` and fp32 bias `[32 or 64]` of the last convolution, padded with zeros.

    Raises:
        ValueError: more than 64 output channels.
    """
    outputs = weight.shape[0]
    columns = next((count for count in PICTURE_COLUMNS if count >= outputs), None)
    if columns is None:
        raise ValueError(f"picture_conv makes at most {PICTURE_COLUMNS[-1]} channels, got {outputs}")
    padded = torch.zeros(columns, dtype=torch.float32, device=weight.device)
    if bias is not None:
        padded[:outputs] = bias.float()
    return F.pad(pack(weight), (0, 0, 0, 0, 0, 0, 0, columns - outputs)), padded


def picture_reference(x: Tensor, weight: Tensor, bias: Tensor, patch: int, as_bytes: bool) -> Tensor:
    """3x3 convolution, pixel shuffle by `patch` and clamp to [0, 1]: `[B, H, W, C] -> [B, 3, patch H, patch W]`.

    With `as_bytes`: uint8 `[B, patch H, patch W, 3]`, [0, 1] mapped to [0, 255].
    """
    outputs = COLOURS * patch * patch
    taps = weight[:outputs].permute(0, 3, 1, 2)
    y = F.conv2d(x.permute(0, 3, 1, 2), taps, padding=1).float() + bias[:outputs, None, None]
    frames = F.pixel_shuffle(y, patch).clamp(0, 1)
    if as_bytes:
        return frames.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return frames.to(x.dtype).contiguous()
