"""Counts events, and logs each kind of warning once.

Why: a decode that falls back ten thousand times must not log ten thousand lines, and must still be countable.

Usage:
    tally = Tally(logging.getLogger(__name__))
    tally.count("hits")
    tally.warn("refused", "%s is world-writable", path)
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from typing import Any

from owl_wms import env

COUNTERS = (
    "hits",
    "misses",
    "builds",
    "published",
    "unpublished",
    "quarantined",
    "evicted",
    "swept",
    "lock_timeouts",
)


class Tally:
    """Thread-safe counters and one warning per topic."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._counts: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._guard = threading.Lock()
        _LIVE.add(self)

    def count(self, name: str, by: int = 1) -> None:
        with self._guard:
            self._counts[name] += by

    def counts(self) -> dict[str, int]:
        """Every counter, zeros included."""
        with self._guard:
            return {name: self._counts[name] for name in COUNTERS}

    def warn(self, topic: str, message: str, *args: Any) -> None:
        """Log a warning unless this topic had one."""
        with self._guard:
            if topic in self._warned:
                return
            self._warned.add(topic)
        self._log.warning(message, *args)

    def _unlock_in_child(self) -> None:
        self._guard = threading.Lock()


_LIVE: weakref.WeakSet[Tally] = weakref.WeakSet()


def _after_fork() -> None:
    for tally in list(_LIVE):
        tally._unlock_in_child()


env.after_fork(_after_fork)
