"""Keeps the last seconds that a player saw, and writes them as a clip.

Usage:
    recent = Recent(); recent.add(jpeg, time.monotonic())
    data = to_mp4(recent.snapshot())
"""

from __future__ import annotations

import io
from collections import deque

import numpy as np
from PIL import Image

from owl_wms.errors import DataError
from owl_wms.temporary import temporary_folder

SECONDS = 15.0
MAX_BYTES = 96 << 20
# Seconds. A longer gap between two pictures was a pause, and counts as this much in the clip.
_LONGEST_GAP = 2.0


class Recent:
    """Compressed pictures of the last `SECONDS` of play, `MAX_BYTES` in all at most."""

    def __init__(self) -> None:
        self._pictures: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._clock, self._last = 0.0, 0.0

    def __len__(self) -> int:
        """Returns how many pictures are held."""
        return len(self._pictures)

    def add(self, picture: bytes, now: float) -> None:
        """Keeps a picture shown at `now`, in seconds of a clock that never goes back."""
        self._clock += min(_LONGEST_GAP, max(0.0, now - self._last)) if self._pictures else 0.0
        self._last = now
        self._pictures.append((self._clock, picture))
        self._bytes += len(picture)
        while self._bytes > MAX_BYTES or self._clock - self._pictures[0][0] > SECONDS:
            self._bytes -= len(self._pictures.popleft()[1])

    def snapshot(self) -> list[tuple[float, bytes]]:
        """Returns what is held now: times of play in seconds, and pictures."""
        return list(self._pictures)


def to_mp4(pictures: list[tuple[float, bytes]]) -> bytes:
    """Returns an H.264 clip of these pictures at their mean rate.

    Raises:
        DataError: no picture yet, pictures of several sizes, or PyAV is missing.
    """
    import torch  # the page is there before torch is

    from owl_wms.media.video import VideoWriter

    if not pictures:
        raise DataError("nothing was played yet, so there is nothing to record")
    seconds = pictures[-1][0] - pictures[0][0]
    rate = (len(pictures) - 1) / seconds if seconds > 0 else 20.0
    with temporary_folder("clip") as folder:
        path = folder / "clip.mp4"
        with VideoWriter(path, min(240.0, max(0.1, rate))) as clip:
            for _, picture in pictures:
                image = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
                even = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]  # H.264 stores pairs of pixels
                clip.write(torch.from_numpy(even.copy())[None])
        return path.read_bytes()
