"""Lists the files of a dataset one folder at a time, and cuts the list into blocks by bytes.

Why a stream: a dataset can have ten million files, and the process that hands out work must not hold a list of them.
A block is the unit of work: small enough that a slow file delays few others, large enough that handing it out is cheap.

Usage:
    for block in cut(list_items("s3://bucket/latents", LATENT_SUFFIXES)): ...
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from owl_wms.batch.store import FOLDER, GENERATION, Store, is_local, located
from owl_wms.errors import DataError
from owl_wms.files import is_foreign, one_line
from owl_wms.interrupts import raise_interrupt
from owl_wms.media.arrays import ARRAY_SUFFIXES
from owl_wms.media.watch import VIDEO_SUFFIXES

_log = logging.getLogger(__name__)
_TAGS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "modificationTime", "modify", "blob_id", "sha")
"""Keys under which stores tell one state of a file from another, the surest first; the last two are of content."""
LATENT_SUFFIXES = (".tar", *ARRAY_SUFFIXES)
FRAME_SUFFIXES = (*VIDEO_SUFFIXES, *ARRAY_SUFFIXES)
MANIFEST_SUFFIXES = (".jsonl", ".txt")
BLOCK_BYTES, BLOCK_ITEMS = 256 << 20, 16
_LONGEST_LINE = 1 << 16


class Item(NamedTuple):
    """One input file.

    Attributes:
        url: a local path or a URL that fsspec opens.
        name: its path below the dataset's folder; outputs are named after it.
        size: bytes.
        tag: the store's ETag or what it has of that kind, or for a local file its modification time in nanoseconds.
    """

    url: str
    name: str
    size: int
    tag: str

    def key(self, generation: str) -> str:
        """Returns 32 hexadecimal digits that change with the input's identity and with the generation."""
        text = json.dumps([self.url, self.size, self.tag, generation])
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def list_items(source: str, suffixes: tuple[str, ...], out: str = "") -> Iterator[Item]:
    """Yields the files below a folder or prefix, sorted within each folder, or those that a manifest names.

    At most one folder's names are in memory. Hidden files, folders that systems and file servers make (`#recycle`) and
    links to folders are passed over, and so is what a run has written: ledgers, and the generations beside `out`.

    Args:
        source: a folder, a file, a URL of either, or a manifest: `.txt` with a path or URL per line, or `.jsonl` with
            objects that have `path`. Relative paths count from the manifest's folder.
        suffixes: endings that are inputs.
        out: folder of this run's generation, which may lie inside the source.

    Raises:
        DataError: there is nothing at `source`, a line of a manifest names no readable file, or two lines have files
            whose outputs would have one name.
    """
    try:
        fs, root = located(source)
        local = is_local(fs)
        root = os.path.realpath(root) if local else root.rstrip("/")
        kind = _kind(fs, root)
        if kind == "directory":
            passed = _Passed(fs, out)
            walk = _walk_local(root, passed) if local else _walk(fs, root, passed)
            for path, size, tag in walk:
                name = path[len(root) :].lstrip("/")
                if name.lower().endswith(suffixes):
                    yield Item(path if local else fs.unstrip_protocol(path), name, size, tag)
        elif kind == "file" and root.lower().endswith(MANIFEST_SUFFIXES):
            yield from _named_in(source, fs, root)
        else:
            yield _single(source, None)
    except DataError:
        raise
    except Exception as error:  # a store's library has errors of its own: no credentials, no such host
        raise_interrupt(error)
        text = f"{source or 'INPUT'}: cannot be listed: {one_line(error)}; check the path and credentials"
        raise DataError(text, path=source) from error


def is_there(url: str) -> bool:
    """Returns whether a file of a dataset still exists.

    Raises:
        DataError: its store cannot be asked; that the file is gone is then not known.
    """
    try:
        return _kind(*located(url)) is not None
    except Exception as error:
        raise_interrupt(error)
        text = f"{url}: its store cannot be asked: {one_line(error)}; check the path, the network and credentials"
        raise DataError(text, path=url) from error


def _kind(fs: Any, path: str) -> str | None:
    """Returns `file` or `directory`, or None if the store says that there is nothing.

    `exists`, `isfile` and `isdir` of many fsspec stores return False for any error, one of the network too.

    Raises:
        Exception: whatever the store's library raises if it cannot be asked.
    """
    try:
        return str(fs.info(path)["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def cut(items: Iterable[Item], workers: int = 1, *, most_bytes: int = BLOCK_BYTES) -> Iterator[list[Item]]:
    """Yields consecutive items in blocks of at most `most_bytes` (or one item) and `BLOCK_ITEMS`.

    Towards the end of the list blocks become smaller, down to one item, so that workers end at nearly the same time
    (guided self-scheduling, Polychronopoulos and Kuck 1987).
    """
    left, waiting = iter(items), deque[Item]()
    while True:
        waiting.extend(islice(left, 4 * BLOCK_ITEMS * workers - len(waiting)))
        if not waiting:
            return
        count = min(BLOCK_ITEMS, max(1, len(waiting) // (2 * workers)))
        block = [waiting.popleft()]
        size = block[0].size
        while waiting and len(block) < count and size + waiting[0].size <= most_bytes:
            size += waiting[0].size
            block.append(waiting.popleft())
        yield block


class _Passed:
    """Tells the folders that hold no inputs."""

    def __init__(self, fs: Any, out: str) -> None:
        store = Store(out) if out else None
        same = store is not None and type(store.fs) is type(fs)
        self._generations = f"{store.root.rpartition('/')[0]}/{GENERATION}" if same and store is not None else None

    def __call__(self, folder: str) -> bool:
        name = folder.rpartition("/")[2]
        ours = self._generations is not None and folder.startswith(self._generations)
        return name.startswith(".") or name == FOLDER or ours or is_foreign((name, FOLDER))


def _walk_local(folder: str, passed: _Passed) -> Iterator[tuple[str, int, str]]:
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except FileNotFoundError:  # a folder that went while its parent was walked; the root was there
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if not passed(entry.path):
                yield from _walk_local(entry.path, passed)
        elif entry.is_file():
            with suppress(FileNotFoundError):  # it went while its folder was walked
                stat = entry.stat()
                yield entry.path, stat.st_size, str(stat.st_mtime_ns)
        elif entry.is_dir():
            _warn_of_link(entry.path, "a folder and is passed over; give it as an INPUT of its own")
        elif entry.is_symlink():
            _warn_of_link(entry.path, "nothing and is passed over; mend or remove it")


@lru_cache(1024)  # a run lists the source twice
def _warn_of_link(path: str, to: str) -> None:
    _log.warning("%s: is a link to %s", path, to)


def _walk(fs: Any, root: str, passed: _Passed) -> Iterator[tuple[str, int, str]]:
    for path, folders, files in fs.walk(root, detail=True, on_error="raise"):
        for name in [name for name in folders if passed(f"{path.rstrip('/')}/{name}")]:
            del folders[name]
        for name, info in sorted(files.items()):
            if name and not name.startswith("."):
                yield info["name"], int(info["size"]), _tag(info)
        fs.invalidate_cache()  # fsspec remembers every listing


def _tag(info: dict[str, Any]) -> str:
    return str(next((info[name] for name in _TAGS if info.get(name)), "")).strip('"')


def _single(source: str, name: str | None) -> Item:
    fs, path = located(source)
    try:
        info = fs.info(path)
        if info["type"] != "file":
            raise OSError("is no file")
    except OSError as error:
        absent = isinstance(error, FileNotFoundError) and error.strerror is None  # its text is the path once more
        why = "there is nothing" if absent else error.strerror or one_line(error)
        raise DataError(f"{source}: cannot be read: {why}", path=source) from error
    if is_local(fs):
        stat, real = os.stat(path), Path(os.path.realpath(path))
        if real.suffix != Path(path).suffix:  # a link of Hugging Face's cache: the file's own name says no form
            real = Path(os.path.realpath(Path(path).parent), Path(path).name)
        return Item(str(real), name or Path(path).name, stat.st_size, str(stat.st_mtime_ns))
    return Item(fs.unstrip_protocol(path), name or PurePosixPath(path).name, int(info["size"]), _tag(info))


def _named_in(source: str, fs: Any, path: str) -> Iterator[Item]:
    folder, taken = path.rpartition("/")[0], _Names()
    # Editors of Windows begin a file with a mark that is no part of its first line.
    with taken, fs.open(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), ""), 1):
            if len(line) == _LONGEST_LINE:
                text = f"{source}: line {number} has {_LONGEST_LINE} characters or more, which no path has"
                raise DataError(text, path=source, index=number)
            if not line.strip():
                continue
            try:
                named = str(json.loads(line)["path"]) if path.lower().endswith(".jsonl") else line.strip()
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                text = f'{source}: line {number} is no object with a path; write {{"path": "..."}}'
                raise DataError(text, path=source, index=number) from error
            path_in_it = named.partition("://")[2] if "://" in named else named
            parts = [part for part in path_in_it.split("/") if part not in ("", ".")]
            if ".." in parts or not parts:
                raise DataError(f"{source}: line {number}: {named!r} has '..' or no name; write it out", path=source)
            beside = f"{folder}/{named}"
            beside = beside if is_local(fs) else fs.unstrip_protocol(beside)
            whole = named if "://" in named or named.startswith("/") else beside
            item = _single(whole, "/".join(parts))
            earlier = taken.take(item)
            if earlier is None:
                yield item
            elif earlier != item.url:
                text = f"{source}: line {number}: outputs of {item.url} and of {earlier} would have one name; write"
                raise DataError(f"{text} both paths in the same way, or use two manifests", path=source, index=number)


class _Names:
    """The files that a manifest has named, by the name of their output, in a temporary SQLite file."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("")
        self._base.execute("CREATE TABLE names (name BLOB PRIMARY KEY, url BLOB) WITHOUT ROWID")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._base.close()

    def take(self, item: Item) -> str | None:
        """Returns the URL that has this name already, or None, and the name is this item's from now on."""
        name, url = os.fsencode(item.name), os.fsencode(item.url)
        row = self._base.execute("SELECT url FROM names WHERE name = ?", (name,)).fetchone()
        if row is not None:
            return os.fsdecode(row[0])
        self._base.execute("INSERT INTO names VALUES (?, ?)", (name, url))
        return None
