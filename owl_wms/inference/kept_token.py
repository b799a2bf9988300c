"""Keeps a server's token for some hours, so that a page finds the server again after a restart.

The token is in a file that only its owner can read, one per port. Whoever can read it could read the server's memory
too.

Usage:
    token = keep_token(8080)        # the one of the last server on this port, or a new one
"""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path

from owl_wms import env
from owl_wms.inference.server import new_token

KEPT_SECONDS = 12 * 3600


def token_folder() -> Path:
    """Returns the folder of the tokens: this login's own, which is emptied at its end, or one in the home folder."""
    runtime = env.read("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):  # others are to be ignored (XDG Base Directory Specification)
        return Path(runtime) / "owl-wms"
    return Path.home() / ".cache" / "owl-wms" / "play"


def keep_token(port: int, folder: Path | None = None) -> str:
    """Returns the token for a port, and keeps it for the next server there.

    A file that others could have written or can read is not used, and neither is one older than `KEPT_SECONDS`. If
    nothing can be kept, the token is new and used once.
    """
    place = (token_folder() if folder is None else folder) / f"{port}.token"
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = _read(place)
        token = new_token() if found is None else found
        draft = place.with_suffix(f".{os.getpid()}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(token)
        draft.replace(place)
    except OSError:
        return new_token()
    return token


def _read(place: Path) -> str | None:
    try:
        handle = os.open(place, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    with os.fdopen(handle, encoding="ascii", errors="replace") as file:
        about = os.fstat(file.fileno())
        mine = not hasattr(os, "getuid") or (about.st_uid == os.getuid() and not about.st_mode & 0o077)
        if not (mine and stat.S_ISREG(about.st_mode) and abs(time.time() - about.st_mtime) < KEPT_SECONDS):
            return None
        text = file.read(200)
    return text if re.fullmatch(r"[\w-]{16,100}", text, re.ASCII) else None
