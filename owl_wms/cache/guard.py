"""Decides which directory may be trusted with compiled programs.

Why: whoever can write an entry can write its hash too, and a compiled program is code. So the boundary is the
directory: it must be a real one, ours, and closed to others. A directory that fails this is refused with the reason,
and the caller builds without a cache.

Rules, in the order checked (docs/cache.md has them with reasons):
    the path is not a link, and is a directory; it is made with mode 0700 when missing;
    its owner is this process's effective user, or root;
    nobody else may write it: no world write, and no group write unless the group is the owner's private one;
    no ancestor lets everybody replace it: world-writable only with the sticky bit (`/tmp`).
With an HMAC key the directory may be shared: another owner and group write are accepted, because entries prove
themselves.

Usage:
    descriptor = guard.open_trusted(Path("/home/me/.cache/owl_wms"))
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from owl_wms.cache import fs
from owl_wms.errors import CacheRefusedError

with contextlib.suppress(ImportError):  # Windows has no such accounts; every directory is refused there
    import grp
    import pwd

DIRECTORY_MODE = 0o700


def open_trusted(path: Path, *, shared: bool = False, create: bool = True) -> int:
    """Descriptor of the cache directory, checked.

    Args:
        path: absolute directory.
        shared: entries are signed, so other owners and group write are accepted.
        create: make it (and its parents) with mode 0700 when it is missing.

    Raises:
        CacheRefusedError: it may not be trusted or cannot be used; the message says why and what to do.
        FileNotFoundError: it is missing and `create` is False.
    """
    if fs.MISSING:
        remedy = "run in WSL, or expect one build per process"
        raise CacheRefusedError(f"cache directory {path}: this system has no {fs.MISSING}; {remedy}", path=path)
    try:
        descriptor = _open(path, create)
    except FileNotFoundError:
        if not create:
            raise
        raise CacheRefusedError(f"cache directory {path} cannot be made", path=path) from None
    except OSError as error:
        raise CacheRefusedError(f"cache directory {path} {_explain(path, error)}", path=path) from None
    try:
        problem = _distrust(path, fs.fstat(descriptor), shared) or _open_ancestor(path)
    except OSError as error:
        fs.close(descriptor)
        raise CacheRefusedError(f"cache directory {path} cannot be checked: {error}", path=path) from None
    if problem:
        fs.close(descriptor)
        raise CacheRefusedError(f"cache directory {path} {problem}", path=path)
    return descriptor


def file_problem(found: os.stat_result, shared: bool) -> str | None:
    """Returns why a file or directory inside the cache may not be used; None when it may."""
    if shared:
        return None
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to uid {found.st_uid}, not to uid {os.geteuid()} or root"
    if found.st_mode & stat.S_IWOTH:
        return f"can be written by everybody (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def _open(path: Path, create: bool) -> int:
    try:
        return fs.open_directory(str(path))
    except FileNotFoundError:
        if not create or os.path.islink(path):
            raise
    missing = [path]
    while not os.path.lexists(missing[-1].parent):
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        try:
            fs.mkdir(str(folder), DIRECTORY_MODE)
        except FileExistsError:
            continue  # another process made it first; it is checked like any other below
    return fs.open_directory(str(path))


def _explain(path: Path, error: OSError) -> str:
    if os.path.islink(path):
        return f"is a symbolic link; give the real path ({os.path.realpath(path)})"
    if error.errno == errno.ENOTDIR:
        return "or a part of its path is not a directory; choose another with TENSORRT_CACHE_DIR"
    return f"cannot be opened: {error.strerror}; choose another with TENSORRT_CACHE_DIR"


def _distrust(path: Path, found: os.stat_result, shared: bool) -> str | None:
    mode = stat.S_IMODE(found.st_mode)
    if mode & stat.S_IWOTH:
        return f"can be written by everybody (mode {mode:04o}); chmod go-w it, or choose another"
    if shared:
        return None
    if found.st_uid not in (os.geteuid(), 0):
        squash = " (an NFS mount that maps root to nobody looks like this)" if os.geteuid() == 0 else ""
        remedy = "choose another, or sign entries with TENSORRT_CACHE_KEY"
        return f"belongs to uid {found.st_uid}, not to uid {os.geteuid()} or root{squash}; {remedy}"
    if mode & stat.S_IWGRP and not _is_private_group(found.st_uid, found.st_gid):
        remedy = "chmod g-w it, or sign entries with TENSORRT_CACHE_KEY"
        return f"can be written by group {found.st_gid} (mode {mode:04o}); {remedy}"
    return None


def _is_private_group(uid: int, gid: int) -> bool:
    """Returns whether a group is its user's own, as systems with umask 002 make them: same name, nobody else in it."""
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}


def _open_ancestor(path: Path) -> str | None:
    for parent in path.parents:
        found = fs.lstat(str(parent))
        if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            return f"lies in {parent}, where everybody can replace it; chmod o-w that, or choose another"
    return None
