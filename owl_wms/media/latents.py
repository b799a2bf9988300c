"""Latents of a file, read piece by piece, so that a file larger than memory can be decoded.

Usage:
    latents = LatentFile("clip.npy", channels=128)
    for frames in decode_stream(decode, latents): ...
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from owl_wms.errors import DataError
from owl_wms.files import open_regular
from owl_wms.interrupts import raise_interrupt
from owl_wms.media.arrays import ARRAY_SUFFIXES, KEY, as_numbers, check_finite, clip_shape, load_array
from owl_wms.media.npy import NpyFile
from owl_wms.media.stored import find_tensor

_PAGE_BYTES = 4096
"""Where less than this of a frame lies together in the file, it would take thousands of reads."""


class LatentFile:
    """The latents of a `.pt`, `.npy` or `.safetensors` file, read when they are asked for.

    A file that changes meanwhile is refused; one that another takes the place of stays open. Read at once and whole are
    a `.pt` file of torch 1.5 or older, and values that do not lie frame by frame (`.npy` in Fortran's order).

    Attributes:
        path: the file.
        shape: `(b, n, c, h, w)`; a file of rank 4 is one clip, one of rank 3 one frame.
    """

    def __init__(self, path: Path | str, channels: int | None = None) -> None:
        """Opens the file and reads its header.

        Args:
            path: the file.
            channels: what the decoder takes, if that is known.

        Raises:
            DataError: as `load_latents`, but for values that are not finite.
        """
        self.path = Path(path)
        self._frames = _open(self.path)
        if self._frames.file is not None:
            weakref.finalize(self, self._frames.file.close)
        self.shape = clip_shape(self._frames.shape, self._frames.dtype, path, channels)
        as_numbers(torch.empty(1, dtype=self._frames.dtype), path)

    def read(self, start: int, stop: int) -> Tensor:
        """Returns a copy of frames `start` to `stop`, counted through all clips, as `[stop - start, c, h, w]`.

        Raises:
            DataError: values that are not finite, `index` is then the frame; or the file was changed since it was
                opened.
        """
        changed = DataError(f"{self.path}: the file was changed while it was read; start again", path=self.path)
        try:
            frames = self._frames.read(start, stop)
        except OSError as error:  # it is shorter now
            raise changed from error
        if self._frames.file is not None and _version(self._frames.file) != self._frames.version:
            raise changed
        frames = as_numbers(frames, self.path)
        check_finite(frames, self.path, start)
        return frames


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frames:
    """Frames of a file.

    Attributes:
        shape: with the first axes that the file has.
        read: returns a copy of frames `start` to `stop`; raises OSError for a file that has become shorter.
        file: is read from, and `version` is what it was when it was opened; None where all is in memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    file: BufferedReader | None = None
    version: tuple[int, int] | None = None


def _open(path: Path) -> _Frames:
    """Raises DataError as `load_array`."""
    try:
        file = open_regular(path)
        try:
            found = _in_file(file, path.suffix.lower())
        except BaseException:
            file.close()
            raise
        if found is not None:
            return found
        file.close()
    except Exception as error:  # whatever a damaged file leads to: who reads it whole says what is wrong
        raise_interrupt(error)
    held = load_array(path)
    frames = held.reshape(-1, *held.shape[-3:]) if held.dim() >= 3 and held.numel() else held
    return _Frames(shape=tuple(held.shape), dtype=held.dtype, read=lambda start, stop: frames[start:stop].clone())


def _in_file(file: BufferedReader, suffix: str) -> _Frames | None:
    """Returns frames that are read where they lie; None for a file that has to be read whole."""
    version = _version(file)
    if suffix == ".npy":
        array = NpyFile.of_file(file)
        if not array.by_rows or len(array.shape) < 3:
            return None
        axes = len(array.shape) - 3
        dtype = torch.from_numpy(array.read(0, 0)).dtype

        def read_rows(start: int, stop: int) -> Tensor:
            rows = array.read(start, stop, axes=axes) if axes else array.read()[None]
            return torch.from_numpy(rows)

        return _Frames(shape=array.shape, dtype=dtype, read=read_rows, file=file, version=version)
    stored = find_tensor(file, suffix, KEY) if suffix in ARRAY_SUFFIXES else None
    if stored is None or not 3 <= len(stored.shape) <= 5 or 0 in stored.shape:
        return None
    clips = stored.of_rank(5)
    gaps, dense = clips.part(0, 0, 1).part(1, 0, 1).runs()
    if gaps and stored.dtype.itemsize * math.prod(clips.shape[axis] for axis in dense) < _PAGE_BYTES:
        return None

    def read_parts(start: int, stop: int) -> Tensor:
        length, parts = clips.shape[1], []
        while start < stop:
            clip, at = divmod(start, length)
            taken = min(stop - start, length - at)
            parts.append(clips.part(0, clip, clip + 1).part(1, at, at + taken).read(file)[0])
            start += taken
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return _Frames(shape=stored.shape, dtype=stored.dtype, read=read_parts, file=file, version=version)


def _version(file: BufferedReader) -> tuple[int, int]:
    """Return what changes when a file is written to."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
