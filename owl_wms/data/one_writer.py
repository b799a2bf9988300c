"""Lets one program at a time add a row to a table, and notices when another one has added rows meanwhile.

Why it exists: a writer knows the rows that it has read or added, and replaces the manifest whole. Two that write to one
folder would take each other's rows out of it, and write over each other's arrays.

Usage:
    writer = OneWriter(folder / "manifest.json")
    with writer.turn(rows):
        ...                 # write arrays, replace the manifest
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from owl_wms.errors import DataError

try:
    import fcntl
except ImportError:  # Windows, where other writers are noticed and not kept waiting
    fcntl = None  # type: ignore[assignment]


class OneWriter:
    """Knows the version of a manifest that its program has last read or written."""

    def __init__(self, manifest: Path) -> None:
        self._manifest = manifest
        self._known = self._version()

    @contextmanager
    def turn(self, rows: list[dict[str, Any]]) -> Iterator[None]:
        """Keeps other writers waiting while its body replaces the manifest; some network drives cannot.

        Args:
            rows: that the manifest should hold. It is read only if it looks changed: some drives give a file new
                numbers and times by themselves.

        Raises:
            DataError: another program has replaced it since this one did.
        """
        folder = os.open(self._manifest.parent, os.O_RDONLY) if fcntl is not None else None
        try:
            if folder is not None:
                with suppress(OSError):
                    fcntl.flock(folder, fcntl.LOCK_EX)
            if self._version() != self._known and not self._holds(rows):
                text = "another program has added rows since this one opened the table; run this one again afterwards"
                raise DataError(f"{self._manifest.parent}: {text}", path=self._manifest.parent)
            try:
                yield
            finally:
                self._known = self._version()
        finally:
            if folder is not None:
                with suppress(OSError):
                    fcntl.flock(folder, fcntl.LOCK_UN)  # a process that was forked meanwhile has the folder open too
                os.close(folder)

    def _holds(self, rows: list[dict[str, Any]]) -> bool:
        try:
            return bool(json.loads(self._manifest.read_bytes()) == json.loads(json.dumps(rows)))
        except (ValueError, RecursionError):
            return False

    def _version(self) -> tuple[int, int, int]:
        found = os.stat(self._manifest)
        return found.st_ino, found.st_size, found.st_mtime_ns
