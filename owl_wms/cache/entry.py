"""Reads one entry: its bytes are read once, checked, and handed out.

Why: between checking a file and using it, somebody can swap it. So the payload is read a single time, its size and
SHA-256 are compared with a manifest that proved itself first, and `read` returns those same bytes. Nothing is
deserialized here.

Usage:
    entry = load(cache_path, cache_fd, expected)
    data = entry.read("program.pt2")
    entry.close()                           # until then it is protected from eviction
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from owl_wms.cache import fs, guard
from owl_wms.cache.key import Key, canonical, entry_name
from owl_wms.cache.manifest import FILE_NAME, MAX_BYTES, PROGRAM, Manifest, parse, signature_problem
from owl_wms.errors import CacheCorruptError, CacheError

# What opening answers when a name holds the wrong kind of thing: a link, a file for a directory, a pipe. Damage, not a
# full disk.
_WRONG_KIND = (errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.ENXIO, errno.EISDIR)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Miss:
    """No usable entry, and why.

    Attributes:
        reason: one sentence.
        kind: `absent`, `corrupt` (quarantined), `unreadable` (the file system said no), `gone` (evicted meanwhile) or
            `refused` (the directory).
    """

    reason: str
    kind: str = "absent"

    def __bool__(self) -> bool:
        return False


class Entry:
    """A program whose bytes match its manifest.

    Attributes:
        name: directory name of the entry, `<model>_<16 hex>`.
        manifest: its facts.
        path: its directory, or None when it is not in the cache.
        built: it was built by this call rather than found.
        reason: why it is not in the cache; empty when it is.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        data: bytes,
        *,
        path: Path | None,
        lock_fd: int | None,
        built: bool = False,
        reason: str = "",
    ) -> None:
        self.name = name
        self.manifest = manifest
        self.path = path
        self.built = built
        self.reason = reason
        self._data: bytes | None = data
        self._lock_fd = lock_fd
        self._finalizer = None if lock_fd is None else weakref.finalize(self, fs.close, lock_fd)

    @property
    def cached(self) -> bool:
        """Returns whether it stands in the cache directory; False means it lives in memory only."""
        return self.path is not None

    def read(self, name: str = PROGRAM) -> bytes:
        """The verified bytes.

        Raises:
            CacheError: another file name, or the entry was closed.
        """
        if name != PROGRAM:
            raise CacheError(f"an entry holds {PROGRAM}, not {name!r}", path=self.path or name)
        if self._data is None:
            raise CacheError(f"entry {self.name} was closed; look it up again", path=self.path or name)
        return self._data

    def close(self) -> None:
        """Let go of the bytes and of the lock that keeps the entry from eviction.

        Harmless twice. Garbage collection does the same.
        """
        self._data = None
        if self._finalizer is not None:
            self._finalizer()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """The entry that a caller looks for: model label and key, and how it must be signed."""

    label: str
    key: Key
    hmac_key: bytes | None

    @property
    def entry(self) -> str:
        """Directory name of the entry."""
        return entry_name(self.label, self.key.digits)


class EntryGoneError(OSError):
    """The entry was evicted between two calls; internal, it ends as a Miss."""


def load(cache_path: Path, cache_fd: int, expected: Expected, meanwhile: Callable[[], None] | None = None) -> Entry:
    """Open, lock, read and verify one entry.

    Args:
        cache_path: the cache directory.
        cache_fd: its descriptor.
        expected: what the entry must be.
        meanwhile: called in this thread while another one reads and hashes the program; never for an entry that is
            absent or whose manifest is wrong.

    Raises:
        FileNotFoundError: there is none.
        EntryGoneError: it vanished meanwhile.
        CacheCorruptError: it is there and wrong; nothing of it was deserialized.
        OSError: the file system would not let it be read, which says nothing about the entry.
        Exception: whatever `meanwhile` raises.
    """
    name, shared = expected.entry, expected.hmac_key is not None
    entry_fd, manifest_fd, raw = _open_entry(name, cache_path, cache_fd, shared)
    try:
        manifest = _accept(raw, cache_path / name, expected.hmac_key)
        _compare(manifest, expected, cache_path / name)
        read = functools.partial(_read_program, name, cache_path, cache_fd, entry_fd, manifest, shared)
        data = read() if meanwhile is None else _beside(read, meanwhile)
    except BaseException:
        fs.close(manifest_fd)
        raise
    finally:
        fs.close(entry_fd)
    return Entry(name, manifest, data, path=cache_path / name, lock_fd=manifest_fd)


def _beside(read: Callable[[], bytes], meanwhile: Callable[[], None]) -> bytes:
    # Leaving the block waits for the reading, also when `meanwhile` raises: the descriptors are closed after it.
    with ThreadPoolExecutor(1, "owl-wms-read") as pool:
        reading = pool.submit(read)
        meanwhile()
        return reading.result()


def inspect(name: str, cache_path: Path, cache_fd: int, hmac_key: bytes | None, *, payload: bool) -> Manifest:
    """Check an entry without holding its payload: manifest and size; with `payload` also the hash and stray files.

    Raises:
        As `load`.
    """
    shared = hmac_key is not None
    entry_fd, manifest_fd, raw = _open_entry(name, cache_path, cache_fd, shared)
    try:
        manifest = _accept(raw, cache_path / name, hmac_key)
        if name != f"{manifest.name}_{manifest.key[:16]}":
            raise CacheCorruptError(
                f"stands under the name {name}, its key says {manifest.name}_{manifest.key[:16]}",
                path=cache_path / name,
            )
        program_fd = _open_program(name, cache_path, cache_fd, entry_fd, manifest, shared)
        try:
            if payload:
                digest = hashlib.sha256()
                for part in fs.iterate_descriptor(program_fd):
                    digest.update(part)
                if digest.hexdigest() != manifest.sha256:
                    raise CacheCorruptError(f"{PROGRAM} does not match its SHA-256", path=cache_path / name)
                extra = sorted(set(fs.listdir(entry_fd)) - {PROGRAM, FILE_NAME})
                if extra:
                    raise CacheCorruptError(f"holds files it should not: {extra[:3]}", path=cache_path / name)
        finally:
            fs.close(program_fd)
    finally:
        fs.close(manifest_fd)
        fs.close(entry_fd)
    return manifest


def _open_entry(name: str, cache_path: Path, cache_fd: int, shared: bool) -> tuple[int, int, bytes]:
    try:
        entry_fd = fs.open_directory(name, cache_fd)
    except OSError as error:
        if error.errno in _WRONG_KIND:
            raise CacheCorruptError("is not a directory", path=cache_path / name) from None
        raise
    manifest_fd = -1
    try:
        problem = guard.file_problem(fs.fstat(entry_fd), shared)
        if problem:
            raise CacheCorruptError(problem, path=cache_path / name)
        manifest_fd = _open_member(FILE_NAME, name, cache_path, cache_fd, entry_fd, shared)
        if not fs.flock(manifest_fd, exclusive=False):
            raise EntryGoneError(errno.ENOENT, "the entry is being evicted", name)
        raw = fs.read_descriptor(manifest_fd, MAX_BYTES + 1)
    except BaseException:
        if manifest_fd >= 0:
            fs.close(manifest_fd)
        fs.close(entry_fd)
        raise
    return entry_fd, manifest_fd, raw


def _open_member(file: str, name: str, cache_path: Path, cache_fd: int, entry_fd: int, shared: bool) -> int:
    try:
        descriptor = fs.open_file(file, entry_fd)
    except FileNotFoundError:
        if _is_still_there(name, cache_fd, entry_fd):
            raise CacheCorruptError(f"has no {file}", path=cache_path / name) from None
        raise EntryGoneError(errno.ENOENT, "the entry was evicted meanwhile", name) from None
    except OSError as error:
        if error.errno in _WRONG_KIND:
            raise CacheCorruptError(f"{file} is not a regular file", path=cache_path / name) from None
        raise
    try:
        problem = guard.file_problem(fs.fstat(descriptor), shared)
        if problem:
            raise CacheCorruptError(f"{file} {problem}", path=cache_path / name)
    except BaseException:
        fs.close(descriptor)
        raise
    return descriptor


def _is_still_there(name: str, cache_fd: int, entry_fd: int) -> bool:
    """Returns whether the name still leads to the directory that was opened.

    An evicted entry lost its files lawfully, a standing one did not.
    """
    try:
        found = fs.lstat(name, cache_fd)
    except FileNotFoundError:
        return False
    return found.st_ino == fs.fstat(entry_fd).st_ino


def _accept(raw: bytes, path: Path, hmac_key: bytes | None) -> Manifest:
    manifest = parse(raw, path)
    problem = None if hmac_key is None else signature_problem(raw, hmac_key)
    if problem:
        raise CacheCorruptError(problem, path=path)
    return manifest


def _compare(manifest: Manifest, expected: Expected, path: Path) -> None:
    if manifest.name != expected.label:
        raise CacheCorruptError(f"belongs to model {manifest.name!r}, not {expected.label!r}", path=path)
    if manifest.key != expected.key.digits or canonical(manifest.material) != expected.key.text:
        raise CacheCorruptError(f"holds another key ({manifest.key[:24]}...) under this name", path=path)


def _open_program(name: str, cache_path: Path, cache_fd: int, entry_fd: int, manifest: Manifest, shared: bool) -> int:
    descriptor = _open_member(PROGRAM, name, cache_path, cache_fd, entry_fd, shared)
    try:
        size = fs.fstat(descriptor).st_size
        if size != manifest.size:
            raise CacheCorruptError(
                f"{PROGRAM} has {size} bytes, its manifest says {manifest.size}", path=cache_path / name
            )
    except BaseException:
        fs.close(descriptor)
        raise
    return descriptor


def _read_program(name: str, cache_path: Path, cache_fd: int, entry_fd: int, manifest: Manifest, shared: bool) -> bytes:
    descriptor = _open_program(name, cache_path, cache_fd, entry_fd, manifest, shared)
    try:
        data = fs.read_descriptor(descriptor, manifest.size)
    finally:
        fs.close(descriptor)
    if len(data) != manifest.size or hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise CacheCorruptError(f"{PROGRAM} does not match its SHA-256", path=cache_path / name)
    return data
