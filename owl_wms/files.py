"""Opens files that others made: regular files only, and nothing outside the folder that a table names.

Why: a named pipe blocks whoever opens it, a device has no end, a symbolic link can lead out of a downloaded folder, and
a memory map of a file that is cut short later ends the process (SIGBUS). So files are opened without waiting, looked
at, and read; they are never mapped. What is wrong is an `OSError` whose `strerror` says so in words; each reader turns
it into its own error class.

Usage:
    with open_regular("clip.npy") as file:
        head = read_exactly(file, 128)
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

NAME_BYTES = 255
"""Longest name of one file or folder that Linux's usual file systems take."""

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path | str, *, inside: Path | str | None = None) -> BinaryIO:
    """Open a regular file for reading, unbuffered; never wait for a pipe's other end.

    Args:
        path: the file; symbolic links are followed.
        inside: a folder that the file has to lie in once links are followed.

    Raises:
        OSError: no such file, no permission, a folder, pipe, socket or device, or a link out of `inside`.
    """
    try:
        if inside is not None:
            real, top = os.path.realpath(path), os.path.realpath(inside)
            if os.path.commonpath([real, top]) != top:
                raise OSError(errno.EINVAL, "is a link out of its folder, which is not followed", str(path))
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # a NUL or a lone surrogate in the name
        raise OSError(errno.EINVAL, f"is no name of a file: {error}", str(path)) from error
    try:
        kind = stat.S_IFMT(os.fstat(number).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, f"is {_KINDS.get(kind, 'something else')}, a file is wanted", str(path))
        return open(number, "rb", buffering=0)
    except BaseException:
        os.close(number)
        raise


def size_of(file: BinaryIO) -> int:
    """Return the size of an open file in bytes, now."""
    return os.fstat(file.fileno()).st_size


def read_exactly(file: BinaryIO, count: int, offset: int = 0) -> bytearray:
    """Read `count` bytes from `offset` on; the file's size is compared before memory is taken.

    Raises:
        OSError: the file ends earlier, or was cut short while it was read.
    """
    if count < 0 or offset < 0 or offset + count > size_of(file):
        raise OSError(errno.EINVAL, f"the file is truncated: {offset + count} bytes are wanted, it has {size_of(file)}")
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], offset + done)
        if got == 0:
            raise OSError(errno.EINVAL, "the file became shorter while it was read")
        done += got
    return data


def read_regular(path: Path | str, limit: int, *, inside: Path | str | None = None) -> bytes:
    """Read a whole regular file of at most `limit` bytes.

    Raises:
        OSError: as `open_regular`, or a larger file.
    """
    with open_regular(path, inside=inside) as file:
        size = size_of(file)
        if size > limit:
            raise OSError(errno.EFBIG, f"is larger than {limit} bytes", str(path))
        return bytes(read_exactly(file, size))


def one_line(text: object, limit: int = 300) -> str:
    """Put a foreign text, or an error's, on one line of at most `limit` characters, to quote it in a message."""
    joined = " ".join(str(text).split())
    return joined if len(joined) <= limit else joined[:limit] + "..."


def name_too_long(path: Path | str) -> str | None:
    """Return the first part of a path that is longer than `NAME_BYTES`, shortened for a message; None if all fit."""
    parts = (part for part in Path(path).parts if len(os.fsencode(part)) > NAME_BYTES)
    return next((f"{part[:40]}..." for part in parts), None)
