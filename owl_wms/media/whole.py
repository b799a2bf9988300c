"""Files written whole or not at all: under another name in the same folder, renamed at the end.

Why: whoever interrupts a long decode, or fills the disk with it, keeps the clip that stood there before.

Usage:
    with written_whole(path) as draft:
        picture.save(draft)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def draft_beside(path: Path) -> Path:
    """A hidden name in the folder of the file that `path` is, or links to; it keeps the ending, which says the form."""
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")


def keep_draft(draft: Path, path: Path) -> None:
    """Put a finished draft in the place of `path`, or of the file that it links to."""
    os.replace(draft, os.path.realpath(path))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """The name to write to; what was written takes the place of `path` when the body ends, and goes when it raises.

    Folders are made. A process that is killed leaves the old file, and its draft.

    Raises:
        OSError: the folder or the file cannot be made.
    """
    draft = draft_beside(path)
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        keep_draft(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def why_unwritten(error: Exception) -> str:
    """What the system said, without the draft's name, which the user never gave."""
    return str(getattr(error, "strerror", None) or error)
