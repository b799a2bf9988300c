"""Latents of a file, read piece by piece, so that a file larger than memory can be decoded.

Usage:
    latents = LatentFile("clip.npy", channels=128)
    for frames in decode_stream(decode, latents): ...
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from owl_wms.errors import DataError
from owl_wms.files import at_home
from owl_wms.media.arrays import as_clips, check_finite, load_array


class LatentFile:
    """The latents of a `.pt`, `.npy` or `.safetensors` file, mapped into memory and read when they are asked for.

    A file that changes meanwhile is refused; one that another takes the place of stays open. A `.pt` file of torch
    1.5 or older cannot be mapped and is read whole.

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
        self._latents = as_clips(load_array(path, mapped=True), path, channels)
        self.shape = tuple(self._latents.shape)
        self._file, self._version = _look(self.path)

    def _require_unchanged(self) -> None:
        file, version = _look(self.path)
        if file == self._file and version != self._version:  # another file under the name leaves the mapped one alone
            raise DataError(f"{self.path}: the file was changed while it was read; start again", path=self.path)

    def read(self, start: int, stop: int) -> Tensor:
        """Returns a copy of frames `start` to `stop`, counted through all clips, as `[stop - start, c, h, w]`.

        Raises:
            DataError: values that are not finite, `index` is then the frame; or the file was changed since it was
                opened.
        """
        self._require_unchanged()  # of a file that is shorter now, a missing page would end the process
        length, parts, place = self.shape[1], [], start
        while place < stop:
            clip, at = divmod(place, length)
            taken = min(stop - place, length - at)
            parts.append(self._latents[clip, at : at + taken])
            place += taken
        frames = torch.cat(parts)
        self._require_unchanged()
        check_finite(frames, self.path, start)
        return frames


def _look(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which file stands under a name, and what changes when it is written to; both empty where there is none."""
    try:
        found = at_home(path).stat()
    except OSError:
        return (), ()
    return (found.st_dev, found.st_ino), (found.st_size, found.st_mtime_ns)
