"""Every system call that the cache makes, behind one gate.

Why: a promise such as "whatever fails, the caller still gets its program" can only be checked if each call can be made
to fail in turn. Every function below goes through `_call`; the fault suite replaces that one function to count, record
or break the i-th call. The calls take directory descriptors and refuse to follow links, so that what was checked is
what is used.

POSIX only (Linux is what is tested): `dir_fd`, `flock` and directory fsync have no Windows counterpart. Without them
(`MISSING` says which) `guard` refuses every directory, so that programs are built and not kept.

Usage:
    handle = fs.open_directory("/var/cache/owl")
    descriptor = fs.open_file("manifest.json", handle)
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    MISSING = "directory descriptors and flock"
else:
    MISSING = (
        "" if {os.open, os.stat, os.mkdir, os.rename, os.unlink} <= os.supports_dir_fd else "directory descriptors"
    )

STORAGE_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.EFBIG,
    }
)
"""Errors of a disk, a quota or a mount that cannot take more; none of them is the caller's fault."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_CHUNK = 1 << 22
# Windows has neither of the two, and opens as text unless told otherwise.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
# A file that is needed whole is read whole: joining pieces would copy 500 MB once more, a third of a second.
_WHOLE = 1 << 30
_NEARLY_FULL_BYTES = 1 << 20


def _call(name: str, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Make the system call `name`. Tests replace this function."""
    return function(*args, **kwargs)


def open_directory(path: str, dir_fd: int | None = None) -> int:
    """Descriptor of a real directory; OSError (ENOTDIR or ELOOP) when `path` is a link or something else."""
    return _call("open", os.open, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def open_file(path: str, dir_fd: int | None = None) -> int:
    """Read-only descriptor of a regular file.

    OSError for links, and for pipes and devices (EINVAL), which could block for ever.
    """
    descriptor = _call("open", os.open, path, _READ, dir_fd=dir_fd)
    try:
        if not stat.S_ISREG(fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
    except BaseException:
        close(descriptor)
        raise
    return descriptor


def close(descriptor: int) -> None:
    """Close.

    An error is swallowed, because data that matters was fsynced before and reading needs no close to succeed.
    """
    with contextlib.suppress(OSError):
        _call("close", os.close, descriptor)


def fstat(descriptor: int) -> os.stat_result:
    return _call("fstat", os.fstat, descriptor)


def lstat(path: str, dir_fd: int | None = None) -> os.stat_result:
    return _call("lstat", os.stat, path, dir_fd=dir_fd, follow_symlinks=False)


def listdir(descriptor: int) -> list[str]:
    """Names in an open directory, sorted so that two runs do the same things in the same order."""
    return sorted(_call("listdir", os.listdir, descriptor))


def mkdir(path: str, mode: int, dir_fd: int | None = None) -> None:
    _call("mkdir", os.mkdir, path, mode, dir_fd=dir_fd)


def rename(source: str, target: str, source_fd: int, target_fd: int) -> None:
    _call("rename", os.rename, source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)


def unlink(path: str, dir_fd: int) -> None:
    _call("unlink", os.unlink, path, dir_fd=dir_fd)


def rmdir(path: str, dir_fd: int) -> None:
    _call("rmdir", os.rmdir, path, dir_fd=dir_fd)


def chmod(descriptor: int, mode: int) -> None:
    _call("fchmod", os.fchmod, descriptor, mode)


def fsync(descriptor: int) -> None:
    _call("fsync", os.fsync, descriptor)


def set_mtime_ns(descriptor: int, nanoseconds: int) -> None:
    _call("utime", os.utime, descriptor, ns=(nanoseconds, nanoseconds))


def flock(descriptor: int, *, exclusive: bool) -> bool:
    """Try to take an advisory lock, exclusive or shared, without waiting.

    Returns:
        False only when somebody else holds it. True otherwise, also where the file system has no locks at all:
        nothing's correctness may rest on a lock, so its absence is not an error.
    """
    operation = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
    try:
        _call("flock", fcntl.flock, descriptor, operation)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)
    return True


def write_new_file(name: str, data: bytes, dir_fd: int, mode: int) -> None:
    """Create `name` (it must not exist), write `data` whole, fsync, close."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = _call("open", os.open, name, flags, mode, dir_fd=dir_fd)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[_call("write", os.write, descriptor, rest[:_CHUNK]) :]
        fsync(descriptor)
    finally:
        close(descriptor)


def touch(name: str, dir_fd: int, mode: int) -> int:
    """Descriptor of an empty marker file, made if it is absent."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return _call("open", os.open, name, flags, mode, dir_fd=dir_fd)


def _read_at(descriptor: int, count: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows, where no two threads share a descriptor of this module
    return os.read(descriptor, count)


def read_descriptor(descriptor: int, size: int) -> bytes:
    """Bytes 0..size of an open file, fewer if it ends earlier; the file position is not used."""
    parts: list[bytes] = []
    offset = 0
    while offset < size:
        part = _call("read", _read_at, descriptor, min(_WHOLE, size - offset), offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def iterate_descriptor(descriptor: int) -> Iterator[bytes]:
    """The whole file in chunks, for hashing without holding it."""
    offset = 0
    while part := _call("read", _read_at, descriptor, _CHUNK, offset):
        yield part
        offset += len(part)


def remove_tree(name: str, dir_fd: int) -> None:
    """Remove a file, link or directory tree below an open directory.

    Links are removed, never followed. A missing name is fine.
    """
    try:
        found = lstat(name, dir_fd)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        with contextlib.suppress(FileNotFoundError):
            unlink(name, dir_fd)
        return
    inner = open_directory(name, dir_fd)
    try:
        for child in listdir(inner):
            remove_tree(child, inner)
    finally:
        close(inner)
    with contextlib.suppress(FileNotFoundError):
        rmdir(name, dir_fd)


def tree_size(name: str, dir_fd: int) -> int:
    """Bytes of the regular files below `name`; what vanishes meanwhile counts as nothing."""
    try:
        found = lstat(name, dir_fd)
        if not stat.S_ISDIR(found.st_mode):
            return found.st_size if stat.S_ISREG(found.st_mode) else 0
        inner = open_directory(name, dir_fd)
    except OSError:
        return 0
    try:
        return sum(tree_size(child, inner) for child in listdir(inner))
    finally:
        close(inner)


def free_bytes(path: str) -> int:
    """Bytes an ordinary user may still write on the file system of `path`."""
    found = _call("statvfs", os.statvfs, path)
    return found.f_bavail * found.f_frsize


def is_storage_trouble(error: BaseException, path: str) -> bool:
    """Returns whether a failed build is to be put down to the file system of `path`.

    The build may word "disk full" in its own way, or die in a child process; so besides the errors it was raised from,
    the disk is asked.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in STORAGE_ERRNOS:
            return True
        cause = cause.__cause__ or cause.__context__
    try:
        return free_bytes(path) < _NEARLY_FULL_BYTES
    except OSError:
        return True
