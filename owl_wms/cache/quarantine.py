"""Moves bad entries aside; they are neither deleted nor used.

Why: a damaged entry is evidence (of a disk, a crash, an attacker), and must be out of the way at once; one rename does
both. The folder is bounded in count and bytes, so evidence cannot fill the disk.

Layout: `<cache>/quarantine/<entry>.<random>/entry` and beside it `reason.txt`.
"""

from __future__ import annotations

import contextlib
import uuid

from owl_wms.cache import fs
from owl_wms.cache.staging import make_folder, open_folder

FOLDER = "quarantine"
MAX_COUNT = 16
MAX_BYTES = 1 << 30


def move(entry: str, reason: str, cache_fd: int, mode: int) -> bool:
    """Move `<cache>/<entry>` (directory, file or link) into quarantine.

    Returns:
        True when it is out of the way, by us or by somebody else at the same moment.

    Raises:
        OSError: the file system will not let it be moved.
    """
    folder_fd = open_folder(FOLDER, cache_fd, mode)
    try:
        name = f"{entry}.{uuid.uuid4().hex[:12]}"
        inner_fd = make_folder(name, folder_fd, mode)
        try:
            fs.rename(entry, "entry", cache_fd, inner_fd)
        except FileNotFoundError:
            fs.rmdir(name, folder_fd)
            return True
        else:
            with contextlib.suppress(OSError):
                fs.write_new_file("reason.txt", f"{reason}\n".encode("utf-8", "replace"), inner_fd, 0o600)
        finally:
            fs.close(inner_fd)
        with contextlib.suppress(OSError):
            bound(folder_fd)
    finally:
        fs.close(folder_fd)
    return True


def bound(folder_fd: int) -> None:
    """Remove the oldest pieces of evidence until both bounds hold."""
    names = fs.listdir(folder_fd)
    ages = {}
    for name in names:
        with contextlib.suppress(OSError):
            ages[name] = fs.lstat(name, folder_fd).st_ctime_ns
    sizes = {name: fs.tree_size(name, folder_fd) for name in ages}
    oldest_first = sorted(ages, key=lambda name: (ages[name], name))
    while oldest_first and (len(oldest_first) > MAX_COUNT or sum(sizes[name] for name in oldest_first) > MAX_BYTES):
        fs.remove_tree(oldest_first.pop(0), folder_fd)
