"""Ends a worker's process when an item takes too long: a library that hangs cannot be interrupted from Python.

Usage:
    watch = Watch(limit=3600.0)
    with watch.on(part, key, item): ...
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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

    @contextmanager
    def on(self, part: Part, key: str, item: Item) -> Iterator[None]:
        """Limits the time of its body; after that, the item is recorded as failed in `part` and the process ends."""
        with self._lock:
            self._at = time.monotonic() + self._limit, part, key, item
        try:
            yield
        finally:
            with self._lock:
                self._at = None

    def _look(self) -> None:
        while True:
            time.sleep(min(1.0, self._limit / 4))
            with self._lock:
                if self._at is None or time.monotonic() < self._at[0]:
                    continue
                _, part, key, item = self._at
                reason, remedy = f"took longer than {self._limit:g} s", "raise --time-limit, or run it alone"
                try:
                    part.add("failed", key, item=item.url, reason=reason, remedy=remedy)
                    part.upload()
                finally:
                    os._exit(OVER_TIME)
