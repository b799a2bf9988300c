"""Reads frames in the batches that an encoder takes: from clips, folders of pictures, array files.

Usage:
    for batch in frame_batches(Path("clip.mp4"), channels=4, size=(360, 640), batch_size=8,
    depth=Path("clip_depth.mp4")):
        ...                                       # float32 [<= 8, 4, 360, 640] in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms.errors import DataError
from owl_wms.files import at_home
from owl_wms.media.arrays import ARRAY_SUFFIXES, load_array
from owl_wms.media.stills import picture_files, read_picture
from owl_wms.media.watch import VIDEO_SUFFIXES, read_video

_MOST_CHANNELS = 4
_FAR_OUT = 8.0  # a decoder's frames pass 1 a little; numbers like these are bytes, or no frames


def frame_batches(
    source: Path,
    *,
    channels: int,
    size: tuple[int, int],
    batch_size: int,
    depth: Path | None = None,
    resize: bool = False,
) -> Iterator[Tensor]:
    """Yields batches of frames, float32 [<= batch_size, channels, H, W] in [-1, 1].

    Args:
        source: a clip, a folder of pictures in the order of the numbers in their names, or an array file of frames
            [n, C, H, W] (float in [-1, 1], or uint8), or uint8 [n, H, W, C] as a decode writes it.
        channels: what the encoder takes; 4 is colour and depth.
        size: (H, W) the encoder takes.
        batch_size: frames per batch; the last may have fewer.
        depth: clip or folder with the depth channel in grey, for a source that has colour alone.
        resize: bicubic to `size` where it differs, instead of refusing.

    Raises:
        DataError: nothing readable, other channels or sizes, colour and depth of different length, no frames.
    """
    frames = _frames(source)
    if depth is not None:
        frames = _with_depth(frames, _frames(depth), source, depth)
    index = 0
    while batch := [
        _fitted(frame, source, number, channels, size, resize)
        for number, frame in enumerate(islice(frames, batch_size), index)
    ]:
        index += len(batch)
        yield torch.stack(batch)
    if index == 0:
        raise DataError(f"{source}: has no frames: it is empty or breaks off; write or copy it again", path=source)


def _frames(source: Path) -> Iterator[Tensor]:
    """Single frames [C, H, W], float32 in [-1, 1]."""
    source = at_home(source)
    if source.is_dir():
        yield from map(read_picture, picture_files(source))
    elif source.suffix.lower() in ARRAY_SUFFIXES:
        array = load_array(source)
        if array.dim() != 4:
            raise DataError(f"{source}: frames must be [n, C, H, W], got {list(array.shape)}", path=source)
        if 0 in array.shape:
            text = f"has no frames, its shape is {list(array.shape)}; store at least one, with pixels"
            raise DataError(f"{source}: {text}", path=source)
        if array.dtype == torch.uint8:
            if array.shape[1] > _MOST_CHANNELS >= array.shape[3]:
                array = array.permute(0, 3, 1, 2)
            yield from (frame.float() / 127.5 - 1 for frame in array)
        elif array.is_floating_point():
            for index, frame in enumerate(array):
                values = frame.float()
                if not values.isfinite().all() or values.abs().max() > _FAR_OUT:
                    text = f"frame {index} is far from [-1, 1]; bytes from 0 to 255 are stored as uint8"
                    raise DataError(f"{source}: {text}", path=source, index=index)
                yield values
        else:
            raise DataError(f"{source}: frames must be float in [-1, 1] or uint8, got {array.dtype}", path=source)
    elif source.suffix.lower() in VIDEO_SUFFIXES:
        yield from map(_unit, read_video(source))
    else:
        known = ", ".join(VIDEO_SUFFIXES + ARRAY_SUFFIXES)
        raise DataError(f"{source}: must be a folder of pictures or a file ending in {known}", path=source)


def _unit(frame: Tensor) -> Tensor:
    return frame.permute(2, 0, 1).float() / 127.5 - 1


def _with_depth(colour: Iterator[Tensor], depth: Iterator[Tensor], source: Path, other: Path) -> Iterator[Tensor]:
    for index, (first, second) in enumerate(zip_longest(colour, depth)):
        if first is None or second is None:
            short = source if first is None else other
            raise DataError(f"{short}: ends at frame {index}, before its partner", path=short, index=index)
        if first.shape[1:] != second.shape[1:]:
            sizes = f"{list(second.shape[1:])} beside {list(first.shape[1:])}"
            raise DataError(f"{other}: depth and colour must have one size, got {sizes}", path=other, index=index)
        yield torch.cat([first[:3], second.mean(dim=0, keepdim=True)])


def _fitted(frame: Tensor, source: Path, index: int, channels: int, size: tuple[int, int], resize: bool) -> Tensor:
    if frame.shape[0] != channels:
        depth = "; give the depth clip with --depth (encode), or as NAME.depth.mp4 beside NAME.mp4 (data import)"
        hint = depth if (frame.shape[0], channels) == (3, 4) else ""
        text = f"the encoder takes {channels} channels, frame {index} has {frame.shape[0]}{hint}"
        raise DataError(f"{source}: {text}", path=source, index=index)
    if tuple(frame.shape[1:]) != size:
        if not resize:
            got = f"{frame.shape[1]}x{frame.shape[2]}"
            text = f"the encoder takes {size[0]}x{size[1]}, frame {index} is {got}; --resize scales it"
            raise DataError(f"{source}: {text}", path=source, index=index)
        frame = F.interpolate(frame[None], size=size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    return frame
