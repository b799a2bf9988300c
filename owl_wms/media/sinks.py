"""Destinations of decoded frames: a clip, an array, pictures, or standard output; one clip after another or each by
itself.

All of them take uint8 [k, H, W, C] pieces in order, are context managers, and give a file its name when it is whole:
whoever interrupts a decode, or fills the disk with it, keeps what stood there before.

Usage:
    with open_sink(Path("clip.npy"), shape=(1, 4000), fps=60) as sink:
        for frames in decode_stream(decode, latents):
            sink.write(frames)
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from owl_wms.errors import ConfigError, DataError
from owl_wms.files import at_home
from owl_wms.media.video import CRF, STDOUT, X264, VideoWriter, Y4mWriter, said
from owl_wms.timing import Spent
from owl_wms.whole import draft_beside, keep_draft, why_unwritten, written_whole

__all__ = ["FORMS", "PICTURES", "STDOUT", "Sink", "check_replaceable", "form_of", "open_sink", "outputs"]

PICTURES = (".png", ".jpg")
FORMS = ("mp4", "npy", "png", "jpg", "y4m", "raw")
_WRITERS = 4  # threads that copy into the page cache: one alone reaches 2 to 4 GB per second
_PART_BYTES = 1 << 20  # least for a thread
_JPEG_QUALITY = 95


class Sink(AbstractContextManager["Sink"]):
    """Takes frames piece by piece."""

    def write(self, frames: Tensor) -> None:
        """Appends uint8 [k, H, W, C] frames. Raises DataError if they cannot be written."""
        raise NotImplementedError


def form_of(out: Path, form: str | None = None) -> str:
    """Returns the form, one of FORMS, that a name stands for: its ending, y4m for `-`, png for a folder.

    Raises:
        ConfigError: an ending that cannot be written, or a form that the name contradicts.
    """
    if form is not None and form not in FORMS:
        raise ConfigError(f"--format must be one of {', '.join(FORMS)}, got {form!r}", key="format")
    ending = out.suffix.lower().removeprefix(".")
    fits: tuple[str, ...]
    if out == STDOUT:
        fits, default = ("y4m", "raw"), "y4m"
    elif ending in ("mp4", "npy", "y4m", "raw"):
        fits, default = (ending,), ending
    elif ending in ("png", "jpg", "jpeg"):
        raise ConfigError(f"{out}: pictures go to a folder, give its name; --format jpg makes JPEG", path=out)
    elif ending:
        raise ConfigError(
            f"{out}: must end in .mp4, .npy, .y4m or .raw, be a folder without an ending, or -; got {out.suffix!r}",
            path=out,
        )
    else:
        fits, default = ("png", "jpg"), "png"
    if form not in (None, *fits):
        raise ConfigError(f"--format {form} does not fit --out {out}, which takes {' or '.join(fits)}", path=out)
    return form or default


def outputs(out: Path, clips: int, each: bool) -> list[Path]:
    """Returns the names that will be written: `out`, or for several clips each by itself `NAME_0.mp4` and so on."""
    if not each or clips == 1 or out == STDOUT:
        return [out]
    digits = len(str(clips - 1))
    # No `with_name`, which refuses `.`: its pictures go to folders inside it.
    return [out.parent / f"{out.stem}_{index:0{digits}}{out.suffix}" for index in range(clips)]


def open_sink(
    out: Path,
    *,
    shape: tuple[int, int],
    fps: float,
    form: str | None = None,
    each: bool = False,
    encoder: str = X264,
    crf: int = CRF,
    preset: str | None = None,
    spent: Spent | None = None,
) -> Sink:
    """Returns a sink for `shape = (clips, frames of each)`, nothing being written yet.

    Args:
        out: a name that `form_of` accepts.
        shape: an array of one clip is [n, H, W, C], one of several [b, n, H, W, C]; other forms put clips end to end.
        fps: frames per second of clips and of Y4M.
        form: see `form_of`.
        each: write every clip to a file of its own, see `outputs`.
        encoder, crf, preset: see VideoWriter.
        spent: receives seconds of the stages `encode` and `write`.

    Raises:
        ConfigError: as `form_of`.
        DataError: a clip is wanted and PyAV is missing.
    """
    spent = Spent() if spent is None else spent
    chosen = form_of(out, form)
    paths = outputs(out, shape[0], each)
    leading = shape if len(paths) == 1 and shape[0] > 1 else (shape[1],)

    def make(path: Path) -> Any:
        if chosen == "mp4":
            return VideoWriter(path, fps, encoder=encoder, crf=crf, preset=preset, spent=spent)
        if chosen == "npy":
            return ArrayWriter(path, leading, spent)
        if chosen in ("png", "jpg"):
            return PictureWriter(path, f".{chosen}", spent)
        file = _standard_output if path == STDOUT else partial(_whole_file, path)
        return Y4mWriter(file, path, fps, spent) if chosen == "y4m" else RawWriter(file, path, spent)

    return _Clips([partial(make, path) for path in paths], shape[1] if len(paths) > 1 else shape[0] * shape[1])


class _Clips(Sink):
    """Divides frames among sinks of `length` frames each, one open at a time."""

    def __init__(self, makers: list[Callable[[], Any]], length: int) -> None:
        self._makers, self._length = iter(makers), length
        self._stack = ExitStack()
        self._current: Any = None
        self._left = 0

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, frames: Tensor) -> None:
        while len(frames):
            if self._left == 0:
                self._stack.close()
                self._current = self._stack.enter_context(next(self._makers)())
                self._left = self._length
            taken, frames = frames[: self._left], frames[self._left :]
            self._current.write(taken)
            self._left -= len(taken)


class ArrayWriter(Sink):
    """A `.npy` array uint8 [*leading, H, W, C] of as many frames as `leading` says, written by several threads."""

    def __init__(self, path: Path, leading: tuple[int, ...], spent: Spent) -> None:
        self.path, self._leading, self._spent = path, leading, spent
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._place = 0
        self._pool = ThreadPoolExecutor(_WRITERS, "owl-wms-write")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()
        with _naming(self.path):
            self._stack.__exit__(kind, error, trace)

    def write(self, frames: Tensor) -> None:
        with self._spent.on("write"), _naming(self.path):
            array: np.ndarray[Any, Any] = np.ascontiguousarray(frames.numpy())
            if self._file is None:
                self._file = self._stack.enter_context(_whole_file(self.path))
                header = {"descr": "|u1", "fortran_order": False, "shape": (*self._leading, *array.shape[1:])}
                np.lib.format.write_array_header_1_0(self._file, header)
                self._file.flush()
                self._place = self._file.tell()
            data = array.reshape(-1).data
            part = max(-(-len(data) // _WRITERS), _PART_BYTES)
            starts = range(0, len(data), part)
            number, place = self._file.fileno(), self._place
            if not hasattr(os, "pwrite"):  # Windows; nobody else moves the file's position
                self._file.write(data)
            elif len(starts) == 1:  # another thread would take longer to begin
                _write_at(number, data, place)
            else:
                list(self._pool.map(lambda at: _write_at(number, data[at : at + part], place + at), starts))
            self._place += len(data)


def _write_at(file: int, data: memoryview, place: int) -> None:
    while data:
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written


class PictureWriter(Sink):
    """A folder of pictures `000000.png` and so on, encoded on all cores, which gets its name when the last is there.

    If there is a folder of that name, it stays, and so do other files in it: pictures of an earlier decode are replaced
    when the last new one is there. It may be a mount, which cannot be renamed and whose neighbours lie on another disk.
    """

    def __init__(self, folder: Path, suffix: str, spent: Spent) -> None:
        self.path, self._suffix, self._spent = folder, suffix, spent
        self._target = Path(os.path.realpath(at_home(folder)))
        self._draft = draft_beside(self._target / "pictures" if self._target.is_dir() else self._target)
        self._pool = ThreadPoolExecutor(os.cpu_count(), "owl-wms-pictures")
        self._count = 0

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        if kind is not None or not self._count:
            shutil.rmtree(self._draft, ignore_errors=True)
            return
        try:
            if self._target.is_dir():
                self._replace_pictures()
            else:
                keep_draft(self._draft, self._target)
        except OSError as error:  # hours of work are not thrown away for a name
            text = f"cannot be written: {why_unwritten(error)}; the pictures are in {self._draft}"
            raise DataError(f"{self.path}: {text}", path=self.path) from error

    def _replace_pictures(self) -> None:
        """Moves the pictures into the folder, once those of an earlier decode are gone: a mixture of both would look
        like one clip.
        """
        for path in filter(_is_ours, list(self._target.iterdir())):
            path.unlink()
        for path in sorted(self._draft.iterdir()):
            path.rename(self._target / path.name)
        self._draft.rmdir()

    def write(self, frames: Tensor) -> None:
        with self._spent.on("encode"), _naming(self.path):
            if not self._count:
                self._draft.mkdir(parents=True)
            names = range(self._count, self._count + len(frames))
            list(self._pool.map(self._save, frames.numpy(), names))
            self._count += len(frames)

    def _save(self, frame: np.ndarray[Any, Any], number: int) -> None:
        colour = np.ascontiguousarray(frame[..., :3])
        Image.fromarray(colour, "RGB").save(
            self._draft / f"{number:06}{self._suffix}", quality=_JPEG_QUALITY, subsampling=0, compress_level=1
        )


class RawWriter(Sink):
    """Bytes of frames, red, green, blue and what else the decoder has, without a header."""

    def __init__(self, file: Callable[[], AbstractContextManager[BinaryIO]], path: Path, spent: Spent) -> None:
        self.path, self._make, self._spent = path, file, spent
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with _naming(self.path):
            self._stack.__exit__(kind, error, trace)

    def write(self, frames: Tensor) -> None:
        with self._spent.on("write"), _naming(self.path):
            self._file = self._file or self._stack.enter_context(self._make())
            self._file.write(np.ascontiguousarray(frames.numpy()).reshape(-1).data)


def check_replaceable(path: Path) -> None:
    """Refuses a folder that holds anything but what PictureWriter writes; hidden files are passed over.

    Raises:
        ConfigError: it does.
    """
    if path.is_dir():
        foreign = [p.name for p in path.iterdir() if not _is_ours(p) and not p.name.startswith(".")]
        if foreign:
            reason = f"holds {foreign[0]!r}, which is no picture of an earlier decode"
            raise ConfigError(f"{path}: {reason}; name another folder", path=path)


def _is_ours(path: Path) -> bool:
    return path.stem.isdecimal() and path.suffix in PICTURES


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    with written_whole(path) as draft, draft.open("wb") as file:
        yield file


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{said(path)}: cannot be written: {why_unwritten(error)}", path=path) from error
