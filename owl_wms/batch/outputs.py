"""Writes the result of one source as a local file: what `media` writes, and tars and tables of frames.

Usage:
    write_frames(pieces, Path("a.npy"), "npy", shape=(1, 900), fps=60)
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from owl_wms.errors import ConfigError, DataError
from owl_wms.media.arrays import save_array
from owl_wms.media.facts import Facts
from owl_wms.media.npy import NpyFile
from owl_wms.media.sinks import open_sink
from owl_wms.timing import Spent

FRAME_FORMS = ("npy", "mp4", "tar", "parquet")
LATENT_FORMS = ("pt", "npy", "safetensors")


def write_frames(
    pieces: Iterator[Tensor],
    path: Path,
    form: str,
    *,
    shape: tuple[int, int],
    fps: float,
    spent: Spent | None = None,
) -> int:
    """Writes uint8 [k, H, W, C] pieces and returns how many frames they had.

    Args:
        pieces: in order, clips end to end.
        path: ends in `.` and the form.
        form: `npy` [n, H, W, C] ([b, n, H, W, C] for several clips); `mp4`; `tar` with one member `frames.npy`;
            `parquet` with a row per frame: `frame`, `height`, `width`, `channels`, `data` (bytes).
        shape: (clips, frames of each).
        fps: of mp4.
        spent: receives seconds of the stages `encode` and `write`; parquet's are not told apart from the rest.

    Raises:
        DataError: the file cannot be written, or fewer or more frames came than `shape` says.
        ConfigError: the form's library is missing.
    """
    if form == "parquet":
        count = _write_table(pieces, path)
    else:
        inner = path.with_suffix(".npy") if form == "tar" else path
        count = 0
        with open_sink(inner, shape=shape, fps=fps, spent=spent) as sink:
            for piece in pieces:
                sink.write(piece)
                count += len(piece)
        if form == "tar":
            with tarfile.open(path, "w") as tar:
                tar.add(inner, "frames.npy")
            inner.unlink()
    if count != shape[0] * shape[1]:
        raise DataError(f"{path.name}: {count} frames came, {shape[0] * shape[1]} were due", path=path)
    return count


def write_latents(pieces: Iterator[Tensor], path: Path, facts: Callable[[], Facts] = Facts) -> int:
    """Writes float32 [k, c, h, w] pieces as one array [n, c, h, w]; the ending says the form. Returns n.

    Args:
        facts: returns what the file states about itself; it is called after the last piece.

    Raises:
        DataError: the file cannot be written.
    """
    latents = torch.cat(list(pieces))
    save_array(path, latents, facts=facts())
    return len(latents)


def _write_table(pieces: Iterator[Tensor], path: Path) -> int:
    arrow, parquet = _pyarrow()
    columns = [("frame", arrow.int64()), *((name, arrow.int32()) for name in ("height", "width", "channels"))]
    schema = arrow.schema([*columns, ("data", arrow.binary())])
    count = 0
    try:
        with parquet.ParquetWriter(path, schema, compression="none") as writer:
            for piece in pieces:
                frames, (height, width, channels) = piece.numpy(), piece.shape[1:]
                rows: list[Any] = [
                    range(count, count + len(frames)),
                    *([side] * len(frames) for side in (height, width, channels)),
                    [np.ascontiguousarray(frame).tobytes() for frame in frames],
                ]
                writer.write_table(
                    arrow.Table.from_arrays(
                        [arrow.array(row, t.type) for row, t in zip(rows, schema, strict=True)], schema=schema
                    )
                )
                count += len(frames)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}", path=path) from error
    return count


def count_frames(path: Path, form: str) -> int:
    """Returns how many frames, or latent frames, an output holds, from the file alone.

    Raises:
        DataError, OSError, ValueError: it cannot be read.
    """
    if form == "parquet":
        return int(_pyarrow()[1].read_metadata(path).num_rows)
    if form == "npy":
        with NpyFile(path) as array:
            return int(np.prod(array.shape[:-3]))
    if form == "tar":
        with tarfile.open(path) as tar:
            member = tar.extractfile("frames.npy")
            assert member is not None
            np.lib.format.read_magic(member)
            return int(np.prod(np.lib.format.read_array_header_1_0(member)[0][:-3]))
    if form == "mp4":
        from owl_wms.media.watch import read_video

        return sum(1 for _ in read_video(path))
    from owl_wms.media.latents import LatentFile

    clips, length, *_ = LatentFile(path).shape
    return clips * length


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        text = "parquet needs pyarrow: pip install pyarrow; or take --format npy"
        raise ConfigError(text, key="format") from error
    return pyarrow, parquet
