"""Makes the temporary directories that entries are written in, and removes those of writers that are dead.

Why: an entry appears by one rename, so it is made beside its place, on the same file system, under a name nobody else
has. A writer that is killed leaves that directory behind. It may be swept only when its writer is certainly gone: the
writer holds a lock on the directory for as long as it lives, and where locks do not work the process number, start time
and boot in the directory's name tell the same. What another machine left, or this one before it was started again, can
only be judged by its lock and its age: it goes when the lock is free and nothing was written for a month, by the file
system's own times. No age is looked at otherwise, because clocks are wrong.

Layout: `<cache>/.tmp/<host>-<boot>-<pid namespace>-<pid>-<start>-<random>/entry/`; `entry` is what will be renamed.

Usage:
    staged = StagingFolder.open(cache_fd, cache_path, mode=0o700)
    (staged.path / "program.pt2").write_bytes(...)
    staged.close()
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from owl_wms.cache import fs
from owl_wms.process import Process, is_left

FOLDER = ".tmp"
ENTRY = "entry"


class StagingFolder:
    """The private directory of one writer, on the cache's file system.

    Attributes:
        path: the directory to write the entry's files into.
        folder_fd: descriptor of the directory that holds `entry`, for the rename.
    """

    def __init__(self, path: Path, name: str, parent_fd: int, folder_fd: int) -> None:
        self.path = path
        self.folder_fd = folder_fd
        self._name = name
        self._parent_fd = parent_fd

    @classmethod
    def open(cls, cache_fd: int, cache_path: Path, mode: int) -> StagingFolder:
        """Make one; OSError when the file system will not."""
        parent_fd = open_folder(FOLDER, cache_fd, mode)
        name = Process.current().unique_name()
        folder_fd = -1
        try:
            folder_fd = make_folder(name, parent_fd, mode)
            fs.flock(folder_fd, exclusive=True)
            fs.close(make_folder(ENTRY, folder_fd, mode))
        except BaseException:
            with contextlib.suppress(OSError):
                fs.remove_tree(name, parent_fd)
            for descriptor in (folder_fd, parent_fd):
                if descriptor >= 0:
                    fs.close(descriptor)
            raise
        return cls(cache_path / FOLDER / name / ENTRY, name, parent_fd, folder_fd)

    def close(self) -> None:
        """Remove what is left of it; what cannot be removed now is swept later."""
        with contextlib.suppress(OSError):
            fs.remove_tree(self._name, self._parent_fd)
        for descriptor in (self.folder_fd, self._parent_fd):
            fs.close(descriptor)


def make_folder(name: str, dir_fd: int, mode: int) -> int:
    """Make a directory with exactly `mode` (whatever the umask) and open it; FileExistsError when it is there."""
    fs.mkdir(name, mode, dir_fd)
    descriptor = fs.open_directory(name, dir_fd)
    try:
        fs.chmod(descriptor, mode)
    except BaseException:
        fs.close(descriptor)
        raise
    return descriptor


def open_folder(name: str, cache_fd: int, mode: int) -> int:
    """Descriptor of one of the cache's own folders, made when missing."""
    try:
        return fs.open_directory(name, cache_fd)
    except FileNotFoundError:
        pass
    try:
        return make_folder(name, cache_fd, mode)
    except FileExistsError:
        return fs.open_directory(name, cache_fd)


def sweep(cache_fd: int) -> int:
    """Remove the folders of dead writers; the number removed. Whatever cannot be judged or removed stays."""
    try:
        parent_fd = fs.open_directory(FOLDER, cache_fd)
    except OSError:
        return 0
    removed = 0
    try:
        for name in fs.listdir(parent_fd):
            with contextlib.suppress(OSError):
                if _is_abandoned(name, parent_fd):
                    fs.remove_tree(name, parent_fd)
                    removed += 1
    except OSError:
        pass
    finally:
        fs.close(parent_fd)
    return removed


def _is_abandoned(name: str, parent_fd: int) -> bool:
    process = Process.parse(name)
    if process is None:
        return False
    folder_fd = fs.open_directory(name, parent_fd)
    try:
        if not fs.flock(folder_fd, exclusive=True):
            return False
        # Of another container on this kernel nothing is known but that the lock, which this process has now, was free.
        lives = process.lives()
        if lives is None:
            return process.shares_kernel() or is_left(fs.fstat(folder_fd), fs.fstat(parent_fd))
        return not lives
    finally:
        fs.close(folder_fd)
