"""Keep the cache under its size: least recently used first, never an entry in use, whatever the clocks say.

Why markers with an ordinal: "last used" is stored as the modification time of an empty file `.use/<entry>`, outside the
entry, so that a hit changes nothing that is hashed. Each use sets it to one more than the largest marker there, or to
now if that is later; so the order is right even when a clock was ten years ahead for a while. Users of an entry hold a
shared lock on its manifest; only one whose lock can be had exclusively goes.

Usage:
    evict.mark_used("dcae_0123456789abcdef", cache_fd, mode=0o700)
    removed = evict.shrink(cache_fd, max_bytes=20 * 2**30, mode=0o700)
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Collection

from owl_wms.cache import fs
from owl_wms.cache.key import is_entry_name
from owl_wms.cache.manifest import FILE_NAME
from owl_wms.cache.staging import FOLDER as STAGING
from owl_wms.cache.staging import open_folder
from owl_wms.process import Process

FOLDER = ".use"
LOCKS = ".locks"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shrunk:
    """The result of an eviction: names removed, bytes they held, names that would have gone but are in use, bytes
    left."""

    removed: tuple[str, ...]
    freed_bytes: int
    in_use: tuple[str, ...]
    left_bytes: int


def mark_used(entry: str, cache_fd: int, mode: int) -> None:
    """Make `entry` the most recently used one; OSError when the directory cannot be written."""
    folder_fd = open_folder(FOLDER, cache_fd, mode)
    try:
        latest = max(_marks(folder_fd).values(), default=0)
        ordinal = max(time.time_ns(), latest + 1)
        try:
            _set_mark(entry, folder_fd, ordinal)
        except PermissionError:  # another user's marker in a shared cache may be replaced, but not given another time
            fs.unlink(entry, folder_fd)
            _set_mark(entry, folder_fd, ordinal)
    finally:
        fs.close(folder_fd)


def _set_mark(entry: str, folder_fd: int, ordinal: int) -> None:
    marker = fs.touch(entry, folder_fd, 0o600)
    try:
        fs.set_mtime_ns(marker, ordinal)
    finally:
        fs.close(marker)


def last_used(cache_fd: int) -> dict[str, int]:
    """Entry -> ordinal of its last use (nanoseconds when the clocks were right).

    Entries without a marker are absent.
    """
    try:
        folder_fd = fs.open_directory(FOLDER, cache_fd)
    except OSError:
        return {}
    try:
        return _marks(folder_fd)
    finally:
        fs.close(folder_fd)


def _marks(folder_fd: int) -> dict[str, int]:
    marks = {}
    for name in fs.listdir(folder_fd):
        with contextlib.suppress(OSError):
            marks[name] = fs.lstat(name, folder_fd).st_mtime_ns
    return marks


def shrink(cache_fd: int, max_bytes: int, mode: int, protected: Collection[str] = ()) -> Shrunk:
    """Remove least recently used entries until the rest fit in `max_bytes`; `protected` ones and those in use stay.

    Raises:
        OSError: the cache directory cannot be listed.
    """
    names = [name for name in fs.listdir(cache_fd) if is_entry_name(name)]
    sizes = {name: fs.tree_size(name, cache_fd) for name in names}
    marks = last_used(cache_fd)
    total = sum(sizes.values())
    removed: list[str] = []
    in_use: list[str] = []
    for name in sorted(names, key=lambda name: (marks.get(name, 0), name)):
        if total <= max_bytes:
            break
        if name in protected or not _remove_unused(name, marks.get(name), cache_fd, mode):
            in_use.append(name)
            continue
        total -= sizes[name]
        removed.append(name)
    freed = sum(sizes[name] for name in removed)
    return Shrunk(removed=tuple(removed), freed_bytes=freed, in_use=tuple(in_use), left_bytes=total)


def _remove_unused(name: str, mark: int | None, cache_fd: int, mode: int) -> bool:
    """Take one entry out by a single rename, then delete it.

    False when it is in use, was just used, or cannot be moved.
    """
    entry_fd = manifest_fd = -1
    try:
        try:
            entry_fd = fs.open_directory(name, cache_fd)
            manifest_fd = fs.open_file(FILE_NAME, entry_fd)
        except FileNotFoundError:
            pass  # gone already, or an entry without a manifest, which nobody can be using
        except OSError:
            if entry_fd >= 0:
                return False
        if manifest_fd >= 0 and not fs.flock(manifest_fd, exclusive=True):
            return False
        # Looked at again under the lock: a reader may have come and gone since the list was made.
        if last_used(cache_fd).get(name) != mark:
            return False
        if entry_fd >= 0 and fs.lstat(name, cache_fd).st_ino != fs.fstat(entry_fd).st_ino:
            return False
        _discard(name, cache_fd, mode)
    except OSError:
        return False
    finally:
        for descriptor in (manifest_fd, entry_fd):
            if descriptor >= 0:
                fs.close(descriptor)
    return True


def _discard(name: str, cache_fd: int, mode: int) -> None:
    staging_fd = open_folder(STAGING, cache_fd, mode)
    try:
        # Named like a writer's folder, so that it is swept should this process die between rename and removal.
        away = Process.current().unique_name()
        with contextlib.suppress(FileNotFoundError):
            fs.rename(name, away, cache_fd, staging_fd)
            fs.remove_tree(away, staging_fd)
    finally:
        fs.close(staging_fd)
    for folder, file in ((FOLDER, name), (LOCKS, f"{name}.holder")):
        with contextlib.suppress(OSError):
            folder_fd = fs.open_directory(folder, cache_fd)
            try:
                fs.unlink(file, folder_fd)
            finally:
                fs.close(folder_fd)


def remove_orphan_markers(cache_fd: int) -> None:
    """Drop use markers and lock files of entries that no longer exist; a lock that somebody holds stays."""
    names = set(fs.listdir(cache_fd))
    for folder in (FOLDER, LOCKS):
        try:
            folder_fd = fs.open_directory(folder, cache_fd)
        except OSError:
            continue
        try:
            for file in fs.listdir(folder_fd):
                if file.removesuffix(".lock").removesuffix(".holder") not in names:
                    with contextlib.suppress(OSError):
                        _unlink_unlocked(file, folder_fd)
        finally:
            fs.close(folder_fd)


def _unlink_unlocked(file: str, folder_fd: int) -> None:
    descriptor = fs.open_file(file, folder_fd)
    try:
        if fs.flock(descriptor, exclusive=True):
            fs.unlink(file, folder_fd)
    finally:
        fs.close(descriptor)
