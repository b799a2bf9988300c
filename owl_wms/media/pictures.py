"""Makes pictures of frames: bytes for files, depth and differences made visible, labels, contact sheets.

Usage:
    sheet = contact_sheet({"source": to_bytes(x[:, :3]), "depth": depth_bytes(x[:, 3])}, times=["0.0 s", "0.5 s"])
    save_picture("sheet.png", sheet)
    clip = side_by_side({"source": to_bytes(x[:, :3]), "decoded": to_bytes(y[:, :3])})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from owl_wms.errors import DataError
from owl_wms.ops.frame_bytes import frame_bytes
from owl_wms.whole import why_unwritten, written_whole

_MARGIN = 8
_LETTERS = 15  # pixels: the least height of a sheet's text, and an 18th of a picture's width where that is more
_INK = (230, 232, 236)
_PAPER = (24, 26, 30)
_DEPTH_RAMP = ((0.10, 0.12, 0.32), (0.24, 0.42, 0.72), (0.60, 0.78, 0.70), (0.98, 0.82, 0.42), (0.96, 0.38, 0.24))


def to_bytes(frames: Tensor) -> Tensor:
    """Returns frames for a file: float [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C] on the CPU, see `frame_bytes`."""
    return frame_bytes(frames).cpu()


def depth_bytes(depth: Tensor) -> Tensor:
    """Depth as colour, near warm and far cold: float [N, H, W] in [-1, 1] -> uint8 [N, H, W, 3]."""
    nearness = (1 - depth.float().clamp(-1, 1)) / 2
    ramp = torch.tensor(_DEPTH_RAMP, dtype=torch.float32, device="cpu")
    place = nearness.cpu() * (len(ramp) - 1)
    low = place.floor().long().clamp(max=len(ramp) - 2)
    mix = (place - low)[..., None]
    return ((ramp[low] * (1 - mix) + ramp[low + 1] * mix) * 255).round().to(torch.uint8)


def difference_bytes(a: Tensor, b: Tensor, gain: float = 4.0) -> Tensor:
    """Absolute difference, times `gain`: float [N, 3, H, W] twice in [-1, 1] -> uint8 [N, H, W, 3]."""
    difference = (a.float() - b.float()).abs() * gain / 2
    return (difference.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def side_by_side(parts: Mapping[str, Tensor]) -> Tensor:
    """Puts frames next to each other, each with its label in the upper left corner.

    Args:
        parts: label -> uint8 [N, H, W, 3], the same N and H for all, from left to right. A label is cut off where
            its frame ends.

    Returns:
        uint8 [N, H, the sum of all W, 3]; the parts themselves stay as they are.
    """
    whole = torch.cat(list(parts.values()), dim=2)
    left = 0
    for label, frames in parts.items():
        width = frames.shape[2]
        tag = _tag(label, size=max(10, frames.shape[1] // 16))[: frames.shape[1], :width]
        whole[:, : tag.shape[0], left : left + tag.shape[1]] = tag.to(whole.device)
        left += width
    return whole


def _tag(text: str, size: int) -> Tensor:
    """Returns a line of text of `size` pixels on a dark ground, uint8 [h, w, 3]."""
    font, rim = ImageFont.load_default(size=size), size // 2
    across, down = font.getbbox(text)[2:]
    picture = Image.new("RGB", (round(across) + 2 * rim, round(down) + rim), _PAPER)
    ImageDraw.Draw(picture).text((rim, rim // 2), text, fill=_INK, font=font)
    return torch.from_numpy(np.array(picture))


def contact_sheet(rows: Mapping[str, Tensor], times: Sequence[str] = (), width: int = 320) -> Image.Image:
    """Draws one labelled row of pictures per entry, one column per frame.

    Args:
        rows: label -> uint8 [N, H, W, 3], the same N for all.
        times: label of each column, written once above the first row; none when empty.
        width: of a picture in pixels; its height follows.

    Raises:
        ValueError: no rows, or rows of different length.
    """
    counts = {label: len(frames) for label, frames in rows.items()}
    if not rows or len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"a sheet needs rows of one common length above 0, got {counts}")
    columns = next(iter(counts.values()))
    first = next(iter(rows.values()))
    height = round(width * first.shape[1] / first.shape[2])
    letters = max(_LETTERS, width // 18)
    band = letters + 11  # the text above a row
    sheet = Image.new(
        "RGB", (_MARGIN + columns * (width + _MARGIN), _MARGIN + len(rows) * (height + band + _MARGIN)), _PAPER
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=letters)
    for r, (label, frames) in enumerate(rows.items()):
        top = _MARGIN + r * (height + band + _MARGIN)
        for c, frame in enumerate(frames):
            left = _MARGIN + c * (width + _MARGIN)
            texts = [label] if c == 0 else []
            texts += times[c : c + 1] if r == 0 else []
            draw.text((left + 2, top + 3), "   ".join(texts), fill=_INK, font=font)
            picture = Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, top + band))
    return sheet


def save_picture(path: Path | str, picture: Image.Image) -> None:
    """Write a picture in the form that the path's ending says; folders are made.

    Raises:
        DataError: the path cannot be written; what stood there stays as it was.
    """
    path = Path(path)
    try:
        with written_whole(path) as draft:
            picture.save(draft)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {why_unwritten(error)}", path=path) from error
