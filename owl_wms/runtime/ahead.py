"""Iterators that run in a thread of their own, a bounded number of items ahead of whoever reads them.

Why generators: stages of a pipeline become plain loops, and what ends one of them (its last item, an exception, a
reader that stops early) ends the stages before it in the same way as for nested generators without threads.

Usage:
    with contextlib.closing(ahead(read_pieces(), depth=2, name="read")) as pieces:
        for piece in pieces:
            ...
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class ChannelClosedError(Exception):
    """The other side of a Channel has ended."""


class Channel(Generic[_T]):
    """A queue of at most `size` items between two threads that either of them can close."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[_T] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: _T) -> None:
        """Appends an item; waits while the queue is full. Raises ChannelClosedError once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._size)
            if self._closed:
                raise ChannelClosedError
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> _T:
        """Takes the first item; waits for one. Raises ChannelClosedError once it is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) > 0)
            if not self._items:
                raise ChannelClosedError
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Refuses further items; what is in the queue can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def ahead(
    items: Iterable[_T], *, depth: int, name: str, wake: Callable[[], None] = lambda: None
) -> Generator[_T, None, None]:
    """Iterates over `items` in a thread of its own, which starts at the first `next` and works `depth` items ahead.

    An exception of `items` is raised here, after the items before it. Closing this generator, or an exception of its
    reader, closes `items` (if it is a generator) in that thread and waits for the thread's end.

    Args:
        items: iterated once, in the thread.
        depth: items that may wait here, >= 1. One more may be in the making.
        name: of the thread.
        wake: called before the thread's end is waited for; must end whatever `items` may be waiting for.
    """
    channel: Channel[_T] = Channel(depth)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for item in items:
                channel.put(item)
        except ChannelClosedError:
            pass
        except BaseException as error:  # whatever it is, the reader must not wait for ever
            failures.append(error)
        finally:
            try:
                if isinstance(items, Generator):
                    items.close()
            except BaseException as error:
                failures.append(error)
            channel.close()

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = channel.get()
            except ChannelClosedError:
                break
            yield item
            del item  # not held while the next one is waited for
        thread.join()
        if failures:
            raise failures[0]
    finally:
        channel.close()
        wake()
        thread.join()
        failures.clear()  # an exception's traceback holds this frame, and would keep itself alive
