"""Reads clips as a player shows them, frame by frame, through PyAV.

Why frame by frame: ten seconds at 60 frames per second are 1.6 GB as float tensors. PyAV is imported when a clip is
opened, so that machines without it (a training node) can import everything else.

Usage:
    for frame in read_video("clip.mp4"): ...     # uint8 [H, W, 3]
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from owl_wms.errors import DataError
from owl_wms.files import at_home, one_line, open_regular, read_exactly, size_of
from owl_wms.interrupts import raise_interrupt
from owl_wms.media.stills import MAX_PIXELS

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi")
_FORMATS = {"mov", "mp4", "matroska", "webm", "avi"}  # as FFmpeg calls what `VIDEO_SUFFIXES` hold
# ITU-T H.273: matrix, primaries and transfer of BT.709; 2 is "unspecified", 3 reserved; transfers of PQ and HLG.
BT709, _UNSAID, _HDR = 1, (2, 3), (16, 18)
_OTHER_TRANSFERS = (8, 9, 10, 17)  # linear, two logarithmic ones, that of cinemas (SMPTE ST 428-1)
# BT.2020, XYZ, two of P3; the others lie so near to BT.709 that players take them for it.
_OTHER_PRIMARIES = (9, 10, 11, 12)
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
LIMITED = 1  # FFmpeg's AVCOL_RANGE_MPEG
LARGE = 720
"""Lines from which players take a clip without tags for BT.709, and below for BT.601."""


def pyav(path: Path | str) -> ModuleType:
    """Import PyAV; `path` is the clip, for the message.

    Raises:
        DataError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DataError(f"{path}: reading or writing video needs PyAV; pip install av", path=path) from error
    return av


def comment_of(path: Path) -> str | None:
    """Return a clip's comment, in which `VideoWriter` puts facts; None when it has none.

    Raises:
        DataError: not a readable clip, or PyAV is missing.
    """
    av = pyav(path)
    try:
        with _opened(av, path) as container:
            return container.metadata.get("comment")  # type: ignore[no-any-return]
    except Exception as error:  # see `read_video`
        raise_interrupt(error)
        raise DataError(f"{path}: cannot be read as video: {_why(error)}", path=path) from error


def rate_of(path: Path) -> float | None:
    """Return a clip's average frames per second, to 3 decimals; None when it does not say.

    Raises:
        DataError: not a readable clip, or PyAV is missing.
    """
    av = pyav(path)
    try:
        with _opened(av, path) as container:
            stream = container.streams.best("video")
            rate = stream.average_rate if stream is not None else None
            return round(float(rate), 3) if rate else None
    except Exception as error:  # see `read_video`
        raise_interrupt(error)
        raise DataError(f"{path}: cannot be read as video: {_why(error)}", path=path) from error


def read_video(path: Path | str) -> Iterator[Tensor]:
    """Yields the frames of a clip's video stream as a player shows them, uint8 [H, W, 3] each.

    Of several streams FFmpeg chooses, as its player does: a cover picture is none.

    Turned and mirrored as the clip's display matrix says, pixels made square, colours by the clip's tags (BT.709 from
    720 lines on where it has none, as players do).

    Raises:
        DataError: no such file, not a video, or it breaks off; a damaged frame, a turn by other than quarters, HDR,
            colours that are coded for another screen, more than `MAX_PIXELS`. `index` is then the frame.
    """
    path = at_home(path)
    av = pyav(path)
    index = 0
    try:
        with _opened(av, path) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise DataError(f"{path}: has no video stream", path=path)
            if stream.codec_context is None:
                raise ValueError("its codec is not known here")
            if stream.width * stream.height > MAX_PIXELS:
                raise ValueError(f"{stream.width}x{stream.height} are more than {MAX_PIXELS} pixels")
            for frame in _decoded(av, container, stream):
                yield torch.from_numpy(_as_shown(av, frame, stream.sample_aspect_ratio))
                index += 1
    except (OSError, ValueError, av.FFmpegError) as error:
        raise_interrupt(error)
        if isinstance(error, DataError):
            raise
        where = (
            ""
            if isinstance(error, (FileNotFoundError, IsADirectoryError))
            else f"cannot be read as video at frame {index}: "
        )
        raise DataError(f"{path}: {where}{_why(error)}", path=path, index=index) from error


def _decoded(av: ModuleType, container: Any, stream: Any) -> Iterator[Any]:
    """Yields the frames of a stream with their alpha: FFmpeg's own decoders of VP8 and VP9 leave it out, libvpx's do
    not.
    """
    if stream.metadata.get("alpha_mode") != "1":
        yield from container.decode(stream)
        return
    decoder = av.CodecContext.create("libvpx-vp9" if stream.codec_context.name == "vp9" else "libvpx", "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _opened(av: ModuleType, path: Path) -> Any:
    """Opens the container of a regular file; nothing else is opened for it.

    By descriptor and absolute name: FFmpeg takes `10:30.mp4` for a protocol, and some formats name further files.
    """
    path = at_home(path)
    with open_regular(path) as file:
        if _breaks_off(file):
            raise ValueError("the file is truncated: its header tells of more bytes")
    container = av.open(str(path.absolute()), options={"protocol_whitelist": "file"})
    if not _FORMATS & set(container.format.name.split(",")):
        name = container.format.name
        container.close()
        raise ValueError(f"it is {name}, not a clip ({', '.join(VIDEO_SUFFIXES)})")
    return container


def _breaks_off(file: BufferedReader) -> bool:
    """Return whether a clip's outermost parts claim more bytes than its file has.

    FFmpeg ends a clip that breaks off without a word. Looked at are the boxes of MP4 (ISO/IEC 14496-12, 4.2), the
    segment of Matroska and WebM (RFC 8794, 4 and 5) and the first chunk of AVI.
    """
    size = size_of(file)
    head = bytes(read_exactly(file, min(size, 64)))
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 > size
    if head.startswith(_EBML):
        length, at = _vint(head, len(_EBML))
        at += length or 0
        place = bytes(read_exactly(file, min(12, max(0, size - at)), at)) if at < size else b""
        length, after = _vint(place, len(_SEGMENT)) if place.startswith(_SEGMENT) else (None, 0)
        return length is not None and at + after + length > size
    at = 0
    if head[4:8] != b"ftyp":
        return False
    while at + 8 <= size:
        box = bytes(read_exactly(file, min(16, size - at), at))
        length = int.from_bytes(box[:4], "big")
        length = int.from_bytes(box[8:16], "big") if length == 1 else length
        if length < 8:  # 0: to the end of the file
            return False
        at += length
    return at > size


def _vint(data: bytes, at: int) -> tuple[int | None, int]:
    """Return a number of EBML's variable length at `at`, None where it is unknown, and the place behind it."""
    width = 9 - data[at].bit_length() if at < len(data) and data[at] else 9
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (None if width > 8 or value == (1 << 7 * width) - 1 else value), at + width


def _as_shown(av: ModuleType, frame: Any, aspect: Fraction | None) -> np.ndarray:
    """Convert a decoded frame to uint8 [H, W, 3] as a player shows it."""
    if frame.is_corrupt:
        raise ValueError("the frame is damaged")
    if int(frame.color_trc) in _HDR:
        raise ValueError("it is HDR (PQ or HLG); convert it to SDR first, which needs a choice of brightness")
    if int(frame.color_trc) in _OTHER_TRANSFERS or int(frame.color_primaries) in _OTHER_PRIMARIES:
        coded = f"primaries {int(frame.color_primaries)}, transfer {int(frame.color_trc)}"
        raise ValueError(f"its colours are those of another screen ({coded} of H.273); convert it to BT.709 first")
    spaces = av.video.reformatter.Colorspace
    untagged = int(frame.colorspace) in _UNSAID
    known = {"src_colorspace": spaces.ITU709 if frame.height >= LARGE else spaces.ITU601} if untagged else {}
    width = frame.width if not aspect else max(1, round(frame.width * aspect))
    if width * frame.height > MAX_PIXELS:
        raise ValueError(f"{width}x{frame.height} are more than {MAX_PIXELS} pixels")
    if any(component.is_alpha for component in frame.format.components):
        picture: np.ndarray = frame.to_ndarray(format="rgba", width=width, height=frame.height, **known)
        if picture[..., 3].min() < 255:
            raise ValueError("it is transparent in places; lay it on a background first")
        picture = picture[..., :3]
    else:
        picture = frame.to_ndarray(format="rgb24", width=width, height=frame.height, **known)
    matrix = next((bytes(side) for side in frame.side_data if side.type.name == "DISPLAYMATRIX"), None)
    return np.ascontiguousarray(picture if matrix is None else _turned(picture, matrix))


def _turned(picture: np.ndarray, matrix: bytes) -> np.ndarray:
    """Apply a display matrix: 9 numbers of 32 bits, of which the first of each pair maps x, the second y.

    (x', y') = (a x + c y, b x + d y), as ISO/IEC 14496-12, 6.2.2 has it; x goes right and y down.
    """
    a, b, _, c, d = (np.sign(value) if abs(value) == 1 << 16 else value for value in struct.unpack("=9i", matrix)[:5])
    turns = {
        (1, 0, 0, 1): picture,
        (-1, 0, 0, 1): picture[:, ::-1],
        (1, 0, 0, -1): picture[::-1],
        (-1, 0, 0, -1): picture[::-1, ::-1],
        (0, 1, 1, 0): picture.transpose(1, 0, 2),
        (0, 1, -1, 0): picture.transpose(1, 0, 2)[:, ::-1],
        (0, -1, 1, 0): picture.transpose(1, 0, 2)[::-1],
        (0, -1, -1, 0): picture.transpose(1, 0, 2)[::-1, ::-1],
    }
    turned: np.ndarray | None = turns.get((int(a), int(b), int(c), int(d)))
    if turned is None:
        raise ValueError("its display matrix turns by other than quarters")
    return turned


def _why(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return one_line(getattr(error, "strerror", None) or error) or type(error).__name__
