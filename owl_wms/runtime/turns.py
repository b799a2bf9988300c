"""Decides which threads of one process may obtain programs at the same time.

Three rules, from the outside in; a thread that holds one asks only for those after it, so nobody waits in a circle:

    one_of(key)    one thread per key: a thread that asks for the program that another one is building waits for it
    building()     one build per process: two at once would time their candidates on a GPU that the other one uses
    tracing()      one trace, load or import per process: torch.export keeps process-wide state (2.11: a second load at
                   the same time fails with "_CURRENT_DESERIALIZER is already set"), and a build that failed for that
                   would be remembered. It also keeps imports of torch's parts apart, which meet half-made otherwise.

A build runs in a process of its own and holds no `tracing()`, so the key or the stored program of another shape does
not wait for it.

Usage:
    with tracing():
        key = ...
    with one_of(key):
        with building():
            ...
        with tracing():
            ...
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

_tracing = threading.RLock()
_building = threading.Lock()
_guard = threading.Lock()
_keys: weakref.WeakValueDictionary[tuple[str, ...], _Turn] = weakref.WeakValueDictionary()


class _Turn:
    """Gives out the lock of one key, which exists while somebody holds it or waits for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Inside the block no other thread traces, loads or imports for a program; may be entered again by its thread."""
    with _tracing:
        yield


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Inside the block no other thread builds."""
    with _building:
        yield


@contextlib.contextmanager
def one_of(key: tuple[str, ...], busy: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside the block no other thread finds or builds the program of `key`; `busy` is called if one does now."""
    with _guard:
        turn = _keys.get(key)
        if turn is None:
            turn = _keys[key] = _Turn()
    if not turn.lock.acquire(blocking=False):
        busy()
        turn.lock.acquire()
    try:
        yield
    finally:
        turn.lock.release()


def renew() -> None:
    """For a forked child: locks that another thread of the parent held would stay locked for ever."""
    global _tracing, _building, _guard, _keys
    _tracing, _building, _guard = threading.RLock(), threading.Lock(), threading.Lock()
    _keys = weakref.WeakValueDictionary()
