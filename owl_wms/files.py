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
import re
import stat
import zipfile
from collections.abc import Collection, Sequence
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

NAME_BYTES = 255
"""Longest name of one file or folder that Linux's usual file systems take."""
WINDOWS = os.name == "nt"
# https://learn.microsoft.com/windows/win32/fileio/naming-a-file: devices, whatever follows a first dot; and characters.
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[1-9\u00b9\u00b2\u00b3]) *(\..*)?", re.I | re.S)
_NOT_IN_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
# Folders that systems and file servers make: of macOS, pax, Synology and QNAP, Windows.
_FOREIGN = re.compile(r"__MACOSX|PaxHeader.*|[@#](eaDir|recycle|Recycle|Recently-Snapshot)|\$RECYCLE\.BIN|\.[^.].*")
# Windows has none of these, and its pipes lie outside its folders.
_WITHOUT_WAITING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)

_ZIP_END = 56 + 20 + 22
"""Bytes of the records at the end of a zip archive: of 64 bits, where that lies, of 32 bits."""

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def at_home(path: Path | str) -> Path:
    """Return a path with `~` and `~user` replaced by the home folder; as it is where there is no such home."""
    return Path(os.path.expanduser(path))


def open_regular(path: Path | str, *, inside: Path | str | None = None) -> BufferedReader:
    """Open a regular file for reading; never wait for a pipe's other end.

    Args:
        path: the file; `~` is replaced and symbolic links are followed.
        inside: a folder that the file has to lie in once links are followed.

    Raises:
        OSError: no such file, no permission, a folder, pipe, socket or device, or a link out of `inside`.
    """
    path = at_home(path)
    try:
        if inside is not None:
            real, top = os.path.realpath(path), os.path.realpath(at_home(inside))
            if os.path.commonpath([real, top]) != top:
                reason = "is a link out of its folder, which is not followed; copy the folder with cp -rL"
                raise OSError(errno.EINVAL, reason, str(path))
        number = os.open(path, _WITHOUT_WAITING)
    except ValueError as error:  # a NUL or a lone surrogate in the name
        raise OSError(errno.EINVAL, f"is no name of a file: {error}", str(path)) from error
    try:
        kind = stat.S_IFMT(os.fstat(number).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, f"is {_KINDS.get(kind, 'something else')}, a file is wanted", str(path))
        return open(number, "rb")
    except BaseException:
        os.close(number)
        raise


def size_of(file: BufferedReader) -> int:
    """Return the size of an open file in bytes, now."""
    return os.fstat(file.fileno()).st_size


def read_exactly(file: BufferedReader, count: int, offset: int = 0) -> bytearray:
    """Read `count` bytes from `offset` on; the file's size is compared before memory is taken.

    Raises:
        OSError: the file ends earlier, or was cut short while it was read.
    """
    if count < 0 or offset < 0 or offset + count > size_of(file):
        raise OSError(errno.EINVAL, f"the file is truncated: {offset + count} bytes are wanted, it has {size_of(file)}")
    data = bytearray(count)
    read_into(file, memoryview(data), offset)
    return data


def read_into(file: BufferedReader, view: memoryview, offset: int) -> None:
    """Fill bytes of memory from `offset` on.

    Raises:
        OSError: the file ends earlier.
    """
    done = 0
    while done < len(view):
        piece = view[done : done + (1 << 30)]
        if hasattr(os, "preadv"):
            got = os.preadv(file.fileno(), [piece], offset + done)
        else:  # Windows has no read at an offset, so there only one thread at a time may read a file
            file.seek(offset + done)
            got = file.readinto(piece)
        if got == 0:
            raise OSError(errno.EINVAL, "the file became shorter while it was read")
        done += got


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


def unusable_name(name: str, *, windows: bool = WINDOWS) -> str | None:
    """Say why a text cannot be the name of one file or folder; None when it can.

    Args:
        name: between two separators; it may come out of a table or an archive, so nothing is taken for granted.
        windows: go by the rules of Windows too. There `clip:1` writes to a hidden stream of `clip`, `nul.npy` to
            nowhere, and `a.` and `a` are one file.
    """
    if name in ("", ".", ".."):
        return "means a folder" if name else "is empty"
    if len(os.fsencode(name)) > NAME_BYTES:
        return f"is longer than {NAME_BYTES} bytes"
    if "/" in name or "\0" in name:
        return "holds a separator or a NUL"
    if not windows:
        return None
    if _DEVICES.fullmatch(name):
        return "is a device on Windows"
    foreign = _NOT_IN_NAMES.search(name)
    if foreign:
        return f"holds {foreign[0]!r}, which names on Windows cannot"
    return "ends in a dot or a space, which Windows drops" if name[-1] in ". " else None


def is_foreign(parts: Sequence[str]) -> bool:
    """Return whether a path's parts name a hidden file, or lie in a folder that systems and file servers make."""
    return any(_FOREIGN.fullmatch(part) for part in parts[:-1]) or parts[-1].startswith(".")


def is_pointer(head: bytes) -> bool:
    """Return whether a file that begins with `head` (16 bytes) is what Git LFS leaves in the place of a large one."""
    return head.startswith(b"version https://")


POINTER = "it is a pointer of Git LFS and not the file itself; run git lfs pull in its repository"


def foreign_to_torch(head: bytes) -> str | None:
    """Say why a file that begins with `head` (16 bytes) cannot be torch.save's: it is neither a zip nor a pickle.

    Returns None when it may be one. torch.load takes any other file for a pickle, and reports `101` for a text.
    """
    if not head:
        return "it is empty"
    if head.startswith((b"PK", b"\x80")):
        return None
    if is_pointer(head):
        return POINTER
    words = " ".join(head.decode("ascii", errors="replace").split())
    begins = f" and begins with {words!r}" if words.isprintable() and words.isascii() else ""
    return f"torch.save did not write this file: it is neither a zip archive nor a pickle{begins}"


def false_claims(file: BinaryIO) -> str | None:
    """Says why the members of a zip archive would need more memory than the file has bytes; None when they would not.

    `torch.save` stores its members uncompressed, so members that are compressed (a few KiB can then stand for
    gigabytes) or that together are larger than the file were not written by it. Nor was an archive whose directory
    cannot be read here, or lies elsewhere than its end says: torch's own reader goes by what it finds there, and by
    whatever sizes that tells. The file is left at its beginning.
    """
    file.seek(0)
    archived = file.read(4) == b"PK\x03\x04"
    size = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            members, begins = archive.infolist(), archive.start_dir
        file.seek(max(0, size - _ZIP_END))
        plain = _directory_at(file.read(), size) == begins and not min((m.header_offset for m in members), default=0)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        plain = False
    finally:
        file.seek(0)
    if not plain:
        return "its directory is damaged or missing" if archived else None
    packed = next((member.filename for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        return f"its member {packed!r} is compressed, which torch.save never does"
    claimed = sum(member.file_size for member in members)
    return f"its members claim {claimed} bytes in a file of {size}" if claimed > size else None


def _directory_at(end: bytes, size: int) -> int | None:
    """Returns where the end of a zip archive of so many bytes says that its directory begins; None if it is damaged.

    Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.14 to 4.3.16.
    """
    if end[-22:-18] != b"PK\x05\x06":
        return None
    if end[-42:-38] != b"PK\x06\x07":
        return int.from_bytes(end[-6:-2], "little")
    if end[:4] != b"PK\x06\x06" or int.from_bytes(end[-34:-26], "little") != size - _ZIP_END:
        return None
    return int.from_bytes(end[48:56], "little")


def refused_with(error: BaseException, codes: Collection[int]) -> OSError | None:
    """Returns the OSError with one of these numbers in an error or in what led to it, or None."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in codes:
            return found
        found = found.__cause__ or found.__context__
    return None
