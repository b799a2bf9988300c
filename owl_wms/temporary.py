"""Private folders in the system's place for temporary files, without those that killed processes left there.

Why: a process that is killed during a build leaves a folder with a decoder's weights, a gigabyte for a large one, and
nothing else removes it before the machine starts again. So a folder's name holds the process that made it, and when
the next one is made, the folders of processes that are certainly gone are removed. Several machines may share the
place: see `owl_wms.process`.

Usage:
    with temporary_folder("job") as folder:       # mode 0700
        (folder / "decoder.pt").write_bytes(...)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from owl_wms.process import Process, is_left

_BEGIN = "owl_wms_"


@contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """Yields a new folder, and removes it at the end.

    Args:
        kind: what it is for, in its name; letters alone.

    Raises:
        OSError: none can be made.
    """
    _sweep(Path(tempfile.gettempdir()))
    begin = f"{_BEGIN}{Process.current().unique_name()}_{kind}_"
    with tempfile.TemporaryDirectory(prefix=begin, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _sweep(place: Path) -> None:
    """Removes this user's folders of dead processes; what cannot be judged or removed stays, for a month."""
    with suppress(OSError), os.scandir(place) as entries:
        around = os.stat(place)
        for entry in entries:
            process = Process.parse(entry.name.removeprefix(_BEGIN).partition("_")[0])
            if process is None or not entry.name.startswith(_BEGIN) or (lives := process.lives()):
                continue
            with suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                ours = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
                gone = lives is False or is_left(found, around)
                if ours and gone and entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
