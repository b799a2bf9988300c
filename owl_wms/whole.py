"""Writes files whole or not at all: under another name in the same folder, renamed at the end.

Why: whoever interrupts a long decode, or fills the disk with it, keeps the clip that stood there before.

Usage:
    with written_whole(path) as draft:
        picture.save(draft)
"""

from __future__ import annotations

import os
import re
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from owl_wms.files import NAME_BYTES, WINDOWS, at_home

_SHORT = re.compile(r"\d+ requested and \d+ written|unexpected pos \d+ vs \d+")
_PAUSES = (0.05, 0.2, 0.5, 1.0, 2.0)


def draft_beside(path: Path) -> Path:
    """Returns a hidden name in the folder of `path`, or of the file that it links to, with the ending of `path`.

    It is unique: threads, and containers in which processes have the same numbers, may write one file at once.
    If the file system's limit leaves no room for the whole name, its beginning and a checksum are used.
    """
    target = Path(os.path.realpath(path))
    end = f".{os.getpid()}-{uuid.uuid4().hex[:12]}.tmp{path.suffix}"
    stem, room = target.stem, NAME_BYTES - len(os.fsencode(end)) - 1
    if len(os.fsencode(stem)) > room:
        stem = f"{os.fsencode(stem)[: room // 2].decode(errors='ignore')}.{zlib.crc32(os.fsencode(stem)):08x}"
    return target.with_name(f".{stem}{end}")


def keep_draft(draft: Path, path: Path) -> None:
    """Put a finished draft in the place of `path`, or of the file that it links to.

    Windows refuses that while another process has the old file open (a virus scanner, a reader), so it is tried for
    some seconds there.
    """
    for seconds in _PAUSES if WINDOWS else ():
        with suppress(PermissionError):
            os.replace(draft, os.path.realpath(path))
            return
        time.sleep(seconds)
    os.replace(draft, os.path.realpath(path))


def make_folder(path: Path) -> None:
    """Make a folder and those above it; of a link, the folder that it leads to.

    Raises:
        OSError: it cannot be made.
    """
    Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields the name to write to. If the body ends, that file replaces `path`; if it raises, it is deleted.

    `~` is replaced, and folders are made. A process that is killed leaves the old file, and its draft.

    Raises:
        OSError: the folder or the file cannot be made.
    """
    path = at_home(path)
    draft = draft_beside(path)
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        keep_draft(draft, path)
    finally:
        with suppress(OSError):  # the body's error says more
            draft.unlink(missing_ok=True)


def why_unwritten(error: Exception) -> str:
    """Returns the system's message without the draft's name, which the user never gave.

    numpy and torch's C++ writer tell only how many bytes they could not write: then the usual reason stands before it.
    """
    told = str(getattr(error, "strerror", None) or error)
    return f"the disk is full, or a limit is reached ({told})" if _SHORT.search(told) else told
