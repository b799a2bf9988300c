"""From files in a staging folder to an entry that others can see: verify, make durable, rename once.

Why the order: after a power cut a file system may keep a rename and lose what was renamed. So every file is fsynced,
read back and hashed, then its directory is fsynced, then one rename makes it visible, then the parent is fsynced.

Usage:
    data = take_program(staged.path)
    lock_fd = publish(staged, name, manifest, cache_fd, hmac_key=None, modes=PRIVATE)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owl_wms.cache import evict, fs
from owl_wms.cache.entry import Expected
from owl_wms.cache.key import MAX_DEPTH, normalise
from owl_wms.cache.manifest import FILE_NAME, MAX_BYTES, PROGRAM, Manifest, parse
from owl_wms.cache.staging import ENTRY, StagingFolder
from owl_wms.errors import CacheCorruptError, CacheError, ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Modes:
    """Permission bits of what the cache makes."""

    directory: int
    file: int


PRIVATE = Modes(directory=0o700, file=0o600)
SHARED = Modes(directory=0o770, file=0o640)


def take_program(folder: Path) -> bytes:
    """The program that a build left in `folder`.

    Raises:
        CacheError: the build returned without writing one, or wrote something that is not a regular file.
        OSError: it cannot be read.
    """
    try:
        descriptor = fs.open_file(str(folder / PROGRAM))
    except FileNotFoundError:
        raise CacheError(f"the build returned without writing {PROGRAM}", path=folder) from None
    try:
        return fs.read_descriptor(descriptor, fs.fstat(descriptor).st_size)
    finally:
        fs.close(descriptor)


def describe(expected: Expected, data: bytes, report: Mapping[str, Any] | None) -> Manifest:
    """The manifest of freshly built bytes. What JSON cannot express in the report is replaced, value by value: one
    number that is not finite must not cost the others, by which the program is run.
    """
    return Manifest(
        name=expected.label,
        key=expected.key.digits,
        material=expected.key.material,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        report=_expressible(dict(report or {})),
        created_unix=max(0, int(time.time())),
    )


def _expressible(value: Any, depth: int = 0) -> Any:
    """`value` as JSON: numbers that are not finite become None, other objects and what is nested too deep their type's
    name.
    """
    if depth < MAX_DEPTH and isinstance(value, Mapping):
        return {str(key): _expressible(item, depth + 1) for key, item in value.items()}
    if depth < MAX_DEPTH and isinstance(value, (list, tuple)):
        return [_expressible(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    try:
        return normalise(value, "report", depth)
    except ConfigError:
        return f"<{type(value).__name__}>"


def publish(
    staged: StagingFolder, name: str, manifest: Manifest, cache_fd: int, *, hmac_key: bytes | None, modes: Modes
) -> int:
    """Make the staged entry visible under `name`.

    Returns:
        A descriptor with a shared lock on the manifest: the entry is in use until it is closed.

    Raises:
        FileExistsError, NotADirectoryError or OSError (ENOTEMPTY): something stands at `name`.
        OSError: the file system would not take it; nothing is visible.
        CacheCorruptError: what was read back is not what was written, or the manifest cannot be expressed.
    """
    text = manifest.to_bytes(hmac_key)
    entry_fd = fs.open_directory(ENTRY, staged.folder_fd)
    lock_fd = -1
    try:
        for other in fs.listdir(entry_fd):
            if other != PROGRAM:
                fs.remove_tree(other, entry_fd)
        _settle_program(entry_fd, modes.file)
        fs.write_new_file(FILE_NAME, text, entry_fd, modes.file)
        lock_fd = fs.open_file(FILE_NAME, entry_fd)
        fs.chmod(lock_fd, modes.file)
        _read_back(entry_fd, lock_fd, manifest, text)
        fs.fsync(entry_fd)
        fs.flock(lock_fd, exclusive=False)
        with contextlib.suppress(OSError):
            evict.mark_used(name, cache_fd, modes.directory)
        fs.rename(ENTRY, name, staged.folder_fd, cache_fd)
        fs.fsync(cache_fd)
    except BaseException:
        if lock_fd >= 0:
            fs.close(lock_fd)
        raise
    finally:
        fs.close(entry_fd)
    return lock_fd


def _settle_program(entry_fd: int, mode: int) -> None:
    descriptor = fs.open_file(PROGRAM, entry_fd)
    try:
        fs.chmod(descriptor, mode)
        fs.fsync(descriptor)
    finally:
        fs.close(descriptor)


def _read_back(entry_fd: int, manifest_fd: int, manifest: Manifest, text: bytes) -> None:
    digest = hashlib.sha256()
    descriptor = fs.open_file(PROGRAM, entry_fd)
    try:
        for part in fs.iterate_descriptor(descriptor):
            digest.update(part)
    finally:
        fs.close(descriptor)
    stored = fs.read_descriptor(manifest_fd, MAX_BYTES + 1)
    if digest.hexdigest() != manifest.sha256 or stored != text or parse(stored, FILE_NAME) != manifest:
        raise CacheCorruptError("what was read back is not what was written", path=FILE_NAME)
