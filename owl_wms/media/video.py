"""Clips in and out, frame by frame, through PyAV.

Why frame by frame: ten seconds at 60 frames a second are 1.6 GB as float tensors. PyAV is imported when a clip is
opened, so that machines without it (a training node) can import everything else.

Usage:
    with VideoWriter("clip.mp4", fps=60) as clip:
        clip.write(frames)                       # uint8 [N, H, W, 3]
    for frame in read_video("clip.mp4"): ...     # uint8 [H, W, 3]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from owl_wms.errors import DataError
from owl_wms.media.whole import draft_beside, keep_draft, why_unwritten

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")
_QUALITY = "16"  # x264's constant rate factor: 0 is lossless, 18 looks so


def _av(path: Path | str) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise DataError(f"{path}: reading or writing video needs PyAV; pip install av", path=path) from error
    return av


class VideoWriter:
    """An H.264 clip, made at the first frame, whose size every later frame must have.

    Used as a context manager; leaving it writes the end of the file and gives it its name. When the body raises, what
    stood under that name stays as it was.
    """

    def __init__(self, path: Path | str, fps: float = 60) -> None:
        """Check the destination; nothing is written yet.

        Raises:
            DataError: the name does not end in `.mp4`, or PyAV is missing.
            ValueError: fps that is not a number, not finite, or below the smallest rate that is written, 1/1001.
        """
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise DataError(f"{path}: clips are written as .mp4, got the ending {self.path.suffix!r}", path=path)
        # A smaller rate would be rounded to 0, for which the encoder takes 24.
        if not 1 / 1001 <= fps < float("inf"):
            raise ValueError(f"fps must be finite and at least 1/1001, got {fps}")
        self._av, self._fps = _av(path), Fraction(fps).limit_denominator(1001)
        self._draft = draft_beside(self.path)
        self._container: Any = None
        self._stream: Any = None
        self.frames = 0

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._container is None:
            return
        try:
            if kind is None:
                with self._naming_the_clip():
                    self._container.mux(self._stream.encode())
                    self._container.close()
                    keep_draft(self._draft, self.path)
            else:
                with suppress(OSError, self._av.FFmpegError):  # the body's own error says more
                    self._container.close()
        finally:
            self._draft.unlink(missing_ok=True)

    def write(self, frames: Tensor) -> None:
        """Append uint8 [N, H, W, 3] frames.

        Raises:
            DataError: another shape or dtype, odd sides (H.264 stores colour for pixel pairs), an unwritable path, or
                a full disk.
        """
        if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3:
            got = f"{frames.dtype} {list(frames.shape)}"
            raise DataError(f"{self.path}: frames must be uint8 [N, H, W, 3], got {got}", path=self.path)
        height, width = frames.shape[1:3]
        if self._container is None:
            self._open(height, width)
        if (self._stream.height, self._stream.width) != (height, width):
            size = f"{self._stream.height}x{self._stream.width}"
            raise DataError(f"{self.path}: the clip is {size}, got a frame of {height}x{width}", path=self.path)
        for frame in frames.cpu().numpy():
            with self._naming_the_clip():
                self._container.mux(self._stream.encode(self._av.VideoFrame.from_ndarray(frame, format="rgb24")))
            self.frames += 1

    def _open(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise DataError(f"{self.path}: H.264 needs even sides, got {height}x{width}", path=self.path)
        with self._naming_the_clip():
            self._draft.parent.mkdir(parents=True, exist_ok=True)
            self._container = self._av.open(str(self._draft), mode="w")
        self._stream = self._container.add_stream("libx264", rate=self._fps)
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": _QUALITY, "preset": "veryfast"}

    @contextmanager
    def _naming_the_clip(self) -> Iterator[None]:
        try:
            yield
        except (OSError, self._av.FFmpegError) as error:
            raise DataError(f"{self.path}: cannot be written: {why_unwritten(error)}", path=self.path) from error


def read_video(path: Path | str) -> Iterator[Tensor]:
    """The frames of a clip's first video stream, uint8 [H, W, 3] each.

    Raises:
        DataError: no such file, not a video, or it breaks off; `index` is then the frame.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file", path=path)
    av = _av(path)
    index = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: has no video stream", path=path)
            for frame in container.decode(video=0):
                yield torch.from_numpy(frame.to_ndarray(format="rgb24"))
                index += 1
    except av.FFmpegError as error:
        reason = error.strerror or error
        raise DataError(
            f"{path}: cannot be read as video at frame {index}: {reason}", path=path, index=index
        ) from error
