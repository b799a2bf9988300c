"""Ends what this process does beside its main thread, before the interpreter shuts down.

Why it exists: Python cuts daemon threads off wherever they are, and waits for other threads as long as they take. A
thread that waits for a build process must do neither: that process would go on without a reader, and what both have
written would be left behind. So at exit the stops are called first, and then the threads have a moment to clean up.

Usage:
    thread = begin(work, name="owl-wms-program")
    with stopped_by(process.kill):          # inside `work`, around what takes long
        process.wait()
    if over():                              # nothing new is begun from now on
        ...
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable, Iterator

from owl_wms import env

EXIT_SECONDS = 5.0
"""Longest time that the exit of the process waits for its threads, after the stops."""

_guard = threading.Lock()
_stops: dict[object, Callable[[], None]] = {}
_threads: list[threading.Thread] = []
_over = threading.Event()


def begin(work: Callable[[], None], *, name: str) -> threading.Thread:
    """Starts a thread that runs `work`; the exit of the process waits for it, at most `EXIT_SECONDS`."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    with _guard:
        _threads[:] = [other for other in _threads if other.is_alive()]
        thread.start()
        _threads.append(thread)
    return thread


@contextlib.contextmanager
def stopped_by(stop: Callable[[], None]) -> Iterator[None]:
    """Inside the block, the exit of the process calls `stop`, from its main thread; at once if it has begun."""
    key = object()
    with _guard:
        _stops[key] = stop
        late = _over.is_set()
    try:
        if late:
            stop()
        yield
    finally:
        with _guard:
            _stops.pop(key, None)


def over() -> bool:
    """Returns whether the process has begun to exit."""
    return _over.is_set()


@atexit.register
def _end() -> None:
    with _guard:
        _over.set()
        stops, threads = list(_stops.values()), list(_threads)
    for stop in stops:
        with contextlib.suppress(Exception):  # what is gone already need not be stopped
            stop()
    for thread in threads:
        thread.join(EXIT_SECONDS)


def _forget() -> None:
    """For a forked child: threads and build processes are its parent's."""
    global _guard
    _guard = threading.Lock()
    _stops.clear()
    _threads.clear()


env.after_fork(_forget)
