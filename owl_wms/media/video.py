"""Clips in and out, frame by frame, through PyAV.

Why frame by frame: ten seconds at 60 frames per second are 1.6 GB as float tensors. PyAV is imported when a clip is
opened, so that machines without it (a training node) can import everything else.

Usage:
    with VideoWriter("clip.mp4", fps=60) as clip:
        clip.write(frames)                       # uint8 [N, H, W, C]
    for frame in read_video("clip.mp4"): ...     # uint8 [H, W, 3]
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from owl_wms.errors import ConfigError, DataError
from owl_wms.media.facts import Facts
from owl_wms.media.watch import BT709, LARGE, LIMITED, VIDEO_SUFFIXES, pyav, read_video
from owl_wms.timing import Spent
from owl_wms.whole import why_unwritten, written_whole

__all__ = ["VIDEO_SUFFIXES", "VideoWriter", "Y4mWriter", "choose_encoder", "read_video", "said"]

STDOUT = Path("-")
X264, NVENC = "libx264", "h264_nvenc"
ENCODERS = {
    X264: ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"),
    NVENC: ("p1", "p2", "p3", "p4", "p5", "p6", "p7"),
}
"""Encoders of H.264 and their presets, fastest first. NVENC is the encoder of an NVIDIA GPU that has one."""
PRESETS = {X264: "veryfast", NVENC: "p4"}
CRF = 16
"""Constant rate factor: 0 is lossless for x264, 18 looks so, 51 is the worst. NVENC takes it as its constant `qp`."""
MOST_FPS = 1000
"""Frames per second of the fastest clip that is written."""
_CONVERTERS = 4  # threads that make YUV of RGB: one alone keeps up with 1,000 to 2,000 frames per second at 640x360

_PIXELS = "yuv420p"
_AT_ONCE = 32  # pictures that may be converted before the first of them is encoded


def said(path: Path) -> str:
    """Returns the name of an output for messages."""
    return "standard output" if path == STDOUT else str(path)


def choose_encoder(name: str, preset: str | None = None) -> tuple[str, str]:
    """Returns the encoder and its preset: those given, or for `auto` the GPU's encoder if it can be opened here, else
    x264; and for no preset the encoder's default.

    Raises:
        ConfigError: an unknown encoder, one that cannot be opened here, or a preset that is not the encoder's.
    """
    if name == "auto":
        name = NVENC if preset not in ENCODERS[X264] and _opens(NVENC) else X264
    elif name not in ENCODERS:
        raise ConfigError(f"--encoder must be auto, {' or '.join(ENCODERS)}, got {name!r}", key="encoder")
    elif name != X264 and not _opens(name):
        raise ConfigError(f"--encoder {name}: cannot be opened on this machine; use {X264}", key="encoder")
    preset = preset or PRESETS[name]
    if preset not in ENCODERS[name]:
        raise ConfigError(
            f"--preset of {name} must be one of {', '.join(ENCODERS[name])}, got {preset!r}", key="preset"
        )
    return name, preset


def _opens(name: str) -> bool:
    """Returns whether the encoder exists and opens for a small picture, which finds a missing driver or chip."""
    av = pyav(name)
    try:
        context = av.CodecContext.create(name, "w")
        context.width, context.height, context.pix_fmt, context.framerate = 256, 256, "yuv420p", 30
        context.open()
    except (av.FFmpegError, ValueError, OSError):
        return False
    return True


class _FrameWriter:
    """Frames to a container of PyAV's, made at the first frame, whose size every later frame must have."""

    def __init__(self, path: Path | str, fps: float, spent: Spent | None) -> None:
        self.path = Path(path)
        # A smaller rate would be rounded to 0, for which the encoder takes 24. MP4 states a clip's length in
        # milliseconds: of a faster one readers leave frames out, up to all of them.
        if not 1 / 1001 <= fps <= MOST_FPS:
            raise ValueError(f"fps must be at least 1/1001 and at most {MOST_FPS}, got {fps}")
        self._av, self._fps = pyav(path), Fraction(float(fps)).limit_denominator(1001)
        self._spent = Spent() if spent is None else spent
        self._pool = ThreadPoolExecutor(_CONVERTERS, "owl-wms-convert")  # its threads start with the first frame
        self._local = threading.local()
        self._stack = ExitStack()
        self._container: Any = None
        self._stream: Any = None
        self.frames = 0

    def __enter__(self) -> _FrameWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        with self._naming_the_clip():  # also after an error: what is still buffered may not fit either
            try:
                if self._container is not None and kind is None:
                    with self._spent.on("encode"):
                        rest = self._stream.encode()
                    with self._spent.on("write"):
                        self._container.mux(rest)
                        self._container.close()
                elif self._container is not None:
                    with suppress(OSError, self._av.FFmpegError):  # the body's own error says more
                        self._container.close()
            except BaseException as failed:
                self._stack.__exit__(type(failed), failed, failed.__traceback__)
                raise
            self._stack.__exit__(kind, error, trace)

    def _open(self, height: int, width: int) -> tuple[Any, Any]:
        """Returns the container and its stream; what is entered in `self._stack` is left after the last frame."""
        raise NotImplementedError

    def write(self, frames: Tensor) -> None:
        """Append uint8 [N, H, W, C] frames, C at least 3: red, green and blue come first, the rest is left out.

        Raises:
            DataError: another shape or dtype, sides that the form cannot hold, an unwritable path, or a full disk.
        """
        if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] < 3:
            got = f"{frames.dtype} {list(frames.shape)}"
            raise DataError(f"{said(self.path)}: frames must be uint8 [N, H, W, C >= 3], got {got}", path=self.path)
        height, width = frames.shape[1:3]
        if 0 in frames.shape:
            if not len(frames):
                return
            text = f"frames of {height}x{width} have no pixels; give frames with sides of at least 2"
            raise DataError(f"{said(self.path)}: {text}", path=self.path)
        if self._container is None:
            with self._naming_the_clip():
                self._container, self._stream = self._open(height, width)
        if (self._stream.height, self._stream.width) != (height, width):
            size = f"{self._stream.height}x{self._stream.width}"
            raise DataError(f"{said(self.path)}: the clip is {size}, got a frame of {height}x{width}", path=self.path)
        for some in frames.cpu().split(_AT_ONCE):
            with self._naming_the_clip():
                pictures = iter(self._pool.map(self._converted, some.numpy()))
                for _ in range(len(some)):
                    with self._spent.on("encode"):
                        packets = self._stream.encode(next(pictures))
                    with self._spent.on("write"):
                        self._container.mux(packets)
                    self.frames += 1

    def _converted(self, frame: np.ndarray[Any, Any]) -> Any:
        """The frame in the encoder's pixel format. Each thread has a converter of its own, since making one takes five
        times as long as using it."""
        if not hasattr(self._local, "converter"):
            self._local.converter = self._av.video.reformatter.VideoReformatter()
        if frame.shape[2] == 4:  # to cut the fourth channel off would take longer than everything else here
            picture = self._av.VideoFrame.from_ndarray(frame, format="rgba")
        else:
            picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[..., :3]), format="rgb24")
        return self._coloured(self._local.converter, picture)

    def _coloured(self, converter: Any, picture: Any) -> Any:
        raise NotImplementedError

    @contextmanager
    def _naming_the_clip(self) -> Iterator[None]:
        try:
            yield
        except (OSError, self._av.FFmpegError) as error:
            raise DataError(f"{said(self.path)}: cannot be written: {why_unwritten(error)}", path=self.path) from error


class VideoWriter(_FrameWriter):
    """An H.264 clip, made at the first frame, whose size every later frame must have.

    Used as a context manager; leaving it writes the end of the file and gives it its name. When the body raises, what
    stood under that name stays as it was.
    """

    def __init__(
        self,
        path: Path | str,
        fps: float = 60,
        *,
        encoder: str = X264,
        crf: int = CRF,
        preset: str | None = None,
        spent: Spent | None = None,
        facts: Facts | None = None,
    ) -> None:
        """Check the destination; nothing is written yet.

        Args:
            path: ends in `.mp4`.
            fps: frames per second.
            encoder, preset: of ENCODERS, as `choose_encoder` returns them.
            crf: see CRF.
            spent: receives seconds of the stages `encode` and `write`.
            facts: stored in the clip's comment (`owl_wms.media.facts`).

        Raises:
            DataError: the name does not end in `.mp4`, or PyAV is missing.
            ValueError: fps that is not a number, or outside of what is written, 1/1001 to `MOST_FPS`.
        """
        if Path(path).suffix.lower() != ".mp4":
            raise DataError(f"{path}: clips are written as .mp4, got the ending {Path(path).suffix!r}", path=path)
        super().__init__(path, fps, spent)
        quality = {"crf": str(crf)} if encoder == X264 else {"rc": "constqp", "qp": str(crf)}
        self._facts = facts or Facts()
        self._encoder, self._options = encoder, {"preset": preset or PRESETS[encoder], **quality}

    def _open(self, height: int, width: int) -> tuple[Any, Any]:
        if height % 2 or width % 2:  # it stores colour for pairs of pixels
            raise DataError(f"{self.path}: H.264 needs even sides, got {height}x{width}", path=self.path)
        draft = self._stack.enter_context(written_whole(self.path))
        container = self._av.open(str(draft), mode="w")
        if self._facts.to_dict():
            container.metadata["comment"] = self._facts.to_text()
        stream = container.add_stream(self._encoder, rate=self._fps)
        stream.height, stream.width, stream.pix_fmt, stream.options = height, width, _PIXELS, self._options
        # PyAV's default divides each frame among the threads, which for small frames leaves most cores idle.
        stream.codec_context.thread_type = "FRAME"
        self._tag(stream.codec_context)
        return container, stream

    def _coloured(self, converter: Any, picture: Any) -> Any:
        spaces = self._av.video.reformatter.Colorspace
        return self._tag(converter.reformat(picture, format=_PIXELS, dst_colorspace=spaces.ITU709))

    @staticmethod
    def _tag(what: Any) -> Any:
        """Says how the colours are to be read. Without it players take large clips for BT.709 and small ones for
        BT.601, and reds and greens shift."""
        what.colorspace = what.color_primaries = what.color_trc = BT709
        what.color_range = LIMITED
        return what


class Y4mWriter(_FrameWriter):
    """Uncompressed YUV 4:2:0 with a header that says size and rate (YUV4MPEG2), which ffmpeg and players read."""

    def __init__(
        self,
        file: Callable[[], AbstractContextManager[BinaryIO]],
        path: Path | str,
        fps: float = 60,
        spent: Spent | None = None,
    ) -> None:
        """Nothing is opened yet.

        Args:
            file: opens what is written to.
            path: its name in messages.
            fps: frames per second.
            spent: receives seconds of the stages `encode` and `write`.

        Raises:
            DataError: PyAV is missing.
            ValueError: as VideoWriter.
        """
        super().__init__(path, fps, spent)
        self._make = file

    def _open(self, height: int, width: int) -> tuple[Any, Any]:
        container = self._av.open(self._stack.enter_context(self._make()), mode="w", format="yuv4mpegpipe")
        stream = container.add_stream("wrapped_avframe", rate=self._fps)
        stream.height, stream.width, stream.pix_fmt = height, width, _PIXELS
        return container, stream

    def _coloured(self, converter: Any, picture: Any) -> Any:
        """Converts by the matrix that readers suppose: the form has no place for its name."""
        spaces = self._av.video.reformatter.Colorspace
        matrix = spaces.ITU709 if picture.height >= LARGE else spaces.ITU601
        return converter.reformat(picture, format=_PIXELS, dst_colorspace=matrix)
