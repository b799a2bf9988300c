"""Ends a worker's process when an item takes too long: a library that hangs cannot be interrupted from Python.

Usage:
    watch = Watch(limit=3600.0)
    with watch.on(part, key, item): ...
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from owl_wms.batch.items import Item
from owl_wms.batch.ledger import Part

OVER_TIME = 75  # exit status of a worker whose item took too long


class Watch:
    """A clock in a thread of its own; while the body of `on` runs, the item has that many seconds."""

    def __init__(self, limit: float) -> None:
        """Starts the thread.

        Args:
            limit: seconds that an item may take in each `on`.
        """
        self._limit = limit
        self._lock = threading.Lock()
        self._at: tuple[float, Part, str, Item] | None = None
        threading.Thread(target=self._look, name="owl-wms-watch", daemon=True).start()

    def on(self, part: Part, key: str, item: Item) -> Watched:
        """Returns what limits the time of its body; in the end the item is recorded as failed in `part`."""
        return Watched(self, part, key, item)

    def set(self, at: tuple[Part, str, Item] | None) -> None:
        """Begins the time of an item, or ends it with None."""
        with self._lock:
            self._at = None if at is None else (time.monotonic() + self._limit, *at)

    def _look(self) -> None:
        while True:
            time.sleep(min(1.0, self._limit / 4))
            with self._lock:
                if self._at is None or time.monotonic() < self._at[0]:
                    continue
                _, part, key, item = self._at
                reason, remedy = f"took longer than {self._limit:g} s", "raise --time-limit, or decode it alone"
                try:
                    part.add("failed", key, item=item.url, reason=reason, remedy=remedy)
                    part.upload()
                finally:
                    os._exit(OVER_TIME)


class Watched:
    """The time of one item."""

    def __init__(self, watch: Watch, *at: Any) -> None:
        """Remembers what to watch."""
        self._watch, self._at = watch, at

    def __enter__(self) -> None:
        self._watch.set(self._at)

    def __exit__(self, *_: Any) -> None:
        self._watch.set(None)
