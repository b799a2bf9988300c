"""Makes pictures of frames: bytes for files, depth and differences made visible, labelled contact sheets.

Usage:
    sheet = contact_sheet({"source": to_bytes(x[:, :3]), "depth": depth_bytes(x[:, 3])}, times=["0.0 s", "0.5 s"])
    save_picture("sheet.png", sheet)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from owl_wms.errors import DataError
from owl_wms.media.whole import why_unwritten, written_whole
from owl_wms.ops.frame_bytes import frame_bytes

_MARGIN = 8
_BAND = 26  # height of the text above a row
_INK = (230, 232, 236)
_PAPER = (24, 26, 30)
_DEPTH_RAMP = ((0.10, 0.12, 0.32), (0.24, 0.42, 0.72), (0.60, 0.78, 0.70), (0.98, 0.82, 0.42), (0.96, 0.38, 0.24))


def to_bytes(frames: Tensor) -> Tensor:
    """Returns frames for a file: float [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C] on the CPU, see `frame_bytes`."""
    return frame_bytes(frames).cpu()


def depth_bytes(depth: Tensor) -> Tensor:
    """Depth as colour, near warm and far cold: float [N, H, W] in [-1, 1] -> uint8 [N, H, W, 3]."""
    nearness = (1 - depth.float().clamp(-1, 1)) / 2
    ramp = torch.tensor(_DEPTH_RAMP)
    place = nearness.cpu() * (len(ramp) - 1)
    low = place.floor().long().clamp(max=len(ramp) - 2)
    mix = (place - low)[..., None]
    return ((ramp[low] * (1 - mix) + ramp[low + 1] * mix) * 255).round().to(torch.uint8)


def difference_bytes(a: Tensor, b: Tensor, gain: float = 4.0) -> Tensor:
    """Absolute difference, times `gain`: float [N, 3, H, W] twice in [-1, 1] -> uint8 [N, H, W, 3]."""
    difference = (a.float() - b.float()).abs() * gain / 2
    return (difference.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def contact_sheet(rows: Mapping[str, Tensor], times: Sequence[str] = (), width: int = 320) -> Image.Image:
    """One labelled row of pictures per entry, one column per frame.

    Args:
        rows: label -> uint8 [N, H, W, 3], the same N for all.
        times: label of each column; none when empty.
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
    sheet = Image.new(
        "RGB", (_MARGIN + columns * (width + _MARGIN), _MARGIN + len(rows) * (height + _BAND + _MARGIN)), _PAPER
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for r, (label, frames) in enumerate(rows.items()):
        top = _MARGIN + r * (height + _BAND + _MARGIN)
        for c, frame in enumerate(frames):
            left = _MARGIN + c * (width + _MARGIN)
            text = label if c == 0 else ""
            if c < len(times):
                text = f"{text}   {times[c]}" if text else times[c]
            draw.text((left + 2, top + 3), text, fill=_INK, font=font)
            picture = Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, top + _BAND))
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
