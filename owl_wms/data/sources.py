"""Finds clips of latents and controls in the forms that other projects keep them in, one clip at a time.

| source | a clip |
|---|---|
| `.pt`, `.npy`, `.safetensors` file | its tensors; [b, n, ...] are b clips |
| a folder of those | files of one base name: `a.latent.npy`, `a.mouse.npy`, `a.buttons.npy`; or `a.pt` with all |
| `.tar`, a folder of them, `s3://bucket/prefix` | members `{base}.{name}.pt`, also `.npy` and `.safetensors` |
| a folder with `.arrow` or `.parquet` files (Hugging Face `datasets`) | a row |
| a video, a folder of them | its frames, encoded on the way; controls from `a.mouse.npy`, `a.buttons.npy`, `a.csv` |

The names `latent`, `latents`, `depth_latent` and `video` (of arrays) mean latents.

Usage:
    for clip in clips_of("clips/"): ...      # Clip(name="clips/a", arrays={"depth_latent": ..., "mouse": ...})
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from owl_wms.data.npy_table import LATENT_COLUMN
from owl_wms.data.s3 import TarBucket, list_tars, tar_members
from owl_wms.errors import ConfigError, DataError
from owl_wms.files import at_home, is_foreign, one_line, read_regular
from owl_wms.media.arrays import ARRAY_SUFFIXES, load_tensor_bytes, read_arrays
from owl_wms.media.facts import Facts
from owl_wms.media.npy import NpyFile
from owl_wms.media.read_facts import facts_of_bytes, read_facts
from owl_wms.media.stills import natural_order
from owl_wms.media.watch import VIDEO_SUFFIXES

LATENT_NAMES = ("latent", "latents", LATENT_COLUMN, "video")
_OTHER_NAMES = ("mouse", "buttons", "audiolatent", "audio")
_TABLES = (".arrow", ".parquet")
_OF_MAPS = re.compile(r"cache-[0-9a-f]{16}(_\d{5}_of_\d{5})?\.arrow")  # what `datasets` writes for `map` and `shuffle`
_log = logging.getLogger(__name__)
_MAX_TAR = 8 << 30
_MAX_CSV = 1 << 28


@dataclass(kw_only=True)
class Clip:
    """One clip as its source has it; nothing is checked yet.

    Attributes:
        name: where it comes from; the same in every run, which is how an interrupted import goes on.
        arrays: column -> [n, ...]; for a video without the latents.
        facts: what its file says about itself.
        video: a video whose frames are still to be encoded.
        buttons: their names, in the order of the column; empty where the source has none.
    """

    name: str
    arrays: dict[str, np.ndarray]
    facts: Facts = field(default_factory=Facts)
    video: Path | None = None
    buttons: tuple[str, ...] = ()


def clips_of(source: str) -> Iterator[Clip]:
    """Yield the clips of a source, in a fixed order.

    Raises:
        DataError: no such source, one without clips, or a file that cannot be read.
        ConfigError: what a form needs (pyarrow, boto3) is not installed.
    """
    if source.startswith("s3://"):
        bucket_name, _, prefix = source.removeprefix("s3://").partition("/")
        bucket = TarBucket(bucket_name)
        for key in [prefix] if prefix.endswith(".tar") else list_tars(bucket, prefix):
            yield from _of_tar(bucket.fetch(key), f"s3://{bucket_name}/{key}")
        return
    path = at_home(source)
    if path.is_dir():
        yield from _of_folder(path)
    elif not os.path.lexists(path):
        raise DataError(f"{path}: no such file or folder", path=path)
    else:
        yield from _of_file(path, path.name)


def _paths_below(folder: Path) -> Iterator[Path]:
    """Yields what lies in a folder, at any depth. `Path.rglob` would not tell of a folder that may not be read."""

    def unread(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise DataError(f"{folder}: cannot be read: {error.strerror}", path=folder) from error
        _log.warning("%s: cannot be read and is passed over: %s", error.filename, error.strerror)

    for top, folders, files in os.walk(folder, onerror=unread):
        yield from (Path(top, name) for name in (*folders, *files))


def _of_folder(folder: Path) -> Iterator[Clip]:
    found = [path for path in _paths_below(folder) if not is_foreign(path.relative_to(folder).parts)]
    for path in found:
        if path.is_symlink() and path.is_dir():
            _log.warning("%s: is a link to a folder and is passed over; import that folder too", path)
    files = [path for path in found if not path.is_dir()]
    files.sort(key=lambda path: ([natural_order(Path(part)) for part in path.relative_to(folder).parts]))
    if (folder / "manifest.json").exists() and (folder / "schema.json").exists():
        raise DataError(f"{folder}: is a table already; train and show it as it is", path=folder)
    caches = [path for path in files if _OF_MAPS.fullmatch(path.name)]
    if caches:
        _log.warning("%s: caches of `datasets` are passed over (%d, such as %s)", folder, len(caches), caches[0].name)
    tables = [path for path in files if path.suffix.lower() in _TABLES and path not in caches]
    videos = {path.with_suffix("") for path in files if path.suffix.lower() in VIDEO_SUFFIXES}
    groups: dict[Path, dict[str, Path]] = {}
    for path in files:
        if path.suffix.lower() in ARRAY_SUFFIXES:
            base, member = _member(path.stem)
            group = path.with_name(base)
            first = groups.setdefault(group, {}).setdefault(member, path)
            if first is not path and group not in videos:  # beside a video only its controls are read
                raise DataError(f"{folder}: {_two_of_one_name(first, path)}", path=folder)
    empty = True
    for path in files:
        suffix, name = path.suffix.lower(), str(path.relative_to(folder))
        if suffix == ".tar" or path in tables or (suffix in VIDEO_SUFFIXES and not path.stem.endswith(".depth")):
            yield from _of_file(path, name)
            empty = False
    for group, members in groups.items():
        if group not in videos:
            table = group.with_name(f"{group.name}.csv")
            yield from _of_arrays(members, str(group.relative_to(folder)), group, table)
            empty = False
    if empty:
        forms = ", ".join((*ARRAY_SUFFIXES, ".tar", *_TABLES, *VIDEO_SUFFIXES))
        raise DataError(f"{folder}: holds no clips ({forms})", path=folder)


def _of_file(path: Path, name: str) -> Iterator[Clip]:
    suffix = path.suffix.lower()
    if suffix in ARRAY_SUFFIXES:
        yield from _of_arrays({"": path}, name, path, path.with_suffix(".csv"))
    elif suffix == ".tar":
        try:
            data = read_regular(path, _MAX_TAR)
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", "it does not fit into memory; divide it")
            raise DataError(f"{path}: cannot be read: {reason}", path=path) from error
        yield from _of_tar(data, name)
    elif suffix in _TABLES:
        yield from _of_rows(path, name)
    elif suffix in VIDEO_SUFFIXES:
        arrays, buttons = _controls_beside(path)
        yield Clip(name=name, arrays=arrays, facts=read_facts(path), video=path, buttons=buttons)
    else:
        forms = ", ".join((*ARRAY_SUFFIXES, ".tar", *_TABLES, *VIDEO_SUFFIXES))
        known = f"must be a folder, an address that begins with s3://, or a file ending in {forms}"
        raise DataError(f"{path}: {known}", path=path)


def _member(stem: str) -> tuple[str, str]:
    """Split `a.mouse` into base and name; a stem without a known name is a base whose file has all arrays."""
    base, _, name = stem.rpartition(".")
    return (base, name) if base and name in (*LATENT_NAMES, *_OTHER_NAMES) else (stem, "")


def _two_of_one_name(first: Path, second: Path) -> str:
    return f"{first.name} and {second.name} are two files of one name; keep the one that is meant"


def _column(name: str) -> str:
    return LATENT_COLUMN if name in (*LATENT_NAMES, "") else name


def _put(arrays: dict[str, np.ndarray], name: str, array: np.ndarray, where: Path | str) -> None:
    """Takes an array under its column's name; raises DataError if there is one already, as of frames beside latents."""
    column = _column(name)
    if column in arrays:
        what, names = ("latents", LATENT_NAMES) if column == LATENT_COLUMN else (column, (column,))
        text = f"has {what} twice, {name!r} too; keep one array of the names {', '.join(names)}"
        raise DataError(f"{where}: {text}", path=where)
    arrays[column] = array


def _numpy(value: Any, where: Path | str) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    narrow = value.is_floating_point() and value.dtype not in (torch.float16, torch.float32, torch.float64)
    try:
        return (value.float() if narrow else value).numpy()
    except (RuntimeError, TypeError) as error:  # a dtype that numpy lacks, or that torch cannot convert
        raise DataError(f"{where}: tensors of {value.dtype} cannot be read; store float32", path=where) from error


def _of_arrays(members: Mapping[str, Path], name: str, where: Path, table: Path) -> Iterator[Clip]:
    arrays: dict[str, np.ndarray] = {}
    facts = Facts()
    for member, path in members.items():
        value = read_arrays(path)
        tensors = {member: value}
        if isinstance(value, Mapping):
            tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
            if member and len(tensors) == 1:  # the file's name says what it is, whatever the tensor is called in it
                tensors = {member: next(iter(tensors.values()))}
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise DataError(f"{path}: needs tensors, it holds a {type(tensor).__name__}", path=path)
            _put(arrays, str(key), _numpy(tensor, path), path)
        if member == "" or member in LATENT_NAMES:
            facts = read_facts(path)
    latents = arrays.get(LATENT_COLUMN)
    if latents is None:
        raise DataError(f"{where}: has no latents; found {', '.join(arrays) or 'nothing'}", path=where)
    if latents.ndim != 5:
        controls, buttons = ({}, ()) if {"mouse", "buttons"} & arrays.keys() else _controls_of(table)
        yield Clip(name=name, arrays={**arrays, **controls}, facts=facts, buttons=buttons)
        return
    for index in range(len(latents)):
        yield Clip(name=f"{name}#{index}", arrays={key: value[index] for key, value in arrays.items()}, facts=facts)


def _of_tar(data: bytes, source: str) -> Iterator[Clip]:
    clips: dict[str, dict[str, np.ndarray]] = {}
    facts: dict[str, Facts] = {}
    for name, content in tar_members(data, source=source):
        stem, suffix = Path(name).with_suffix("").as_posix(), Path(name).suffix.lower()
        base, member = _member(stem)
        if suffix not in ARRAY_SUFFIXES or not member:
            continue
        try:
            value = _tensor_of(content, suffix)
        except (OSError, ValueError) as error:
            raise DataError(f"{source}: member {name}: {one_line(error)}", path=source) from error
        where = f"{source}: member {name}"
        _put(clips.setdefault(base, {}), member, _numpy(value, where), where)
        if member in LATENT_NAMES:
            facts[base] = facts_of_bytes(content, Path(source, name))
    for base, arrays in clips.items():
        yield Clip(name=f"{source}/{base}", arrays=arrays, facts=facts.get(base, Facts()))


def _tensor_of(content: bytes, suffix: str) -> Any:
    if suffix == ".pt":
        return load_tensor_bytes(content)
    if suffix == ".npy":
        return NpyFile.of_bytes(content).read()
    from safetensors.torch import load

    try:
        tensors = list(load(content).values())
    except Exception as error:  # damaged headers raise what the parser raises
        raise ValueError(f"cannot be read as .safetensors: {one_line(error)}") from error
    if len(tensors) != 1:
        raise ValueError(f"holds {len(tensors)} tensors, one is wanted")
    return tensors[0]


def _of_rows(path: Path, name: str) -> Iterator[Clip]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("reading a Hugging Face data set needs pyarrow: pip install pyarrow") from error
    index = 0
    try:
        if path.suffix.lower() == ".parquet":
            batches: Any = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1)
        else:
            batches = pyarrow.ipc.open_stream(io.BytesIO(read_regular(path, _MAX_TAR)))
        for batch in batches:
            for row in batch.to_pylist():
                arrays: dict[str, np.ndarray] = {}
                for key, value in row.items():
                    if key in (*LATENT_NAMES, *_OTHER_NAMES) and value is not None:
                        _put(arrays, key, np.asarray(value, dtype=np.float32), path)
                yield Clip(name=f"{name}#{index}", arrays=arrays)
                index += 1
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        text = f"row {index} cannot be read: {one_line(getattr(error, 'strerror', None) or error)}"
        raise DataError(f"{path}: {text}", path=path, index=index) from error


def _controls_beside(video: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Read the controls of a video, and its buttons' names: array files of its base name, or a table."""
    found: dict[str, np.ndarray] = {}
    for name in _OTHER_NAMES:
        there = [
            path for suffix in ARRAY_SUFFIXES if (path := video.with_name(f"{video.stem}.{name}{suffix}")).exists()
        ]
        if len(there) > 1:
            raise DataError(f"{video}: {_two_of_one_name(*there[:2])}", path=video)
        if there:
            found[name] = _numpy(read_arrays(there[0]), there[0])
    controls, buttons = _controls_of(video.with_suffix(".csv"))
    return {**found, **controls}, buttons


def _controls_of(table: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Read a table of controls, if there is one, and its buttons' names.

    Its header names mouse_x and mouse_y, if there is a mouse, then each button, 0 or 1; its rows are the frames.
    """
    if not table.exists():
        return {}, ()
    try:
        rows = list(csv.reader(io.StringIO(read_regular(table, _MAX_CSV).decode("utf-8-sig"))))
        while rows and not rows[-1]:
            rows.pop()
        if not rows:
            raise ValueError("it is empty")
        head = [name.strip() for name in rows[0]]
        if len(head) == 1 and re.search("[;\t]", head[0]):
            raise ValueError("its columns must be separated by commas")
        for number, row in enumerate(rows[1:], 2):
            if len(row) != len(head):
                raise ValueError(f"row {number} has {len(row)} values, the header {len(head)}")
        values = np.array(rows[1:], dtype=np.float32).reshape(-1, len(head))
        if not any(name.startswith("mouse") or _is_number(name) for name in head):
            return {"buttons": values}, tuple(head)
        if head[:2] != ["mouse_x", "mouse_y"]:
            raise ValueError(f"its columns must begin with mouse_x and mouse_y, got {', '.join(head[:4])}")
        return {"mouse": values[:, :2], "buttons": values[:, 2:]}, tuple(head[2:])
    except (OSError, ValueError, csv.Error) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is no text in UTF-8"
        raise DataError(f"{table}: cannot be read as controls: {reason}", path=table) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
