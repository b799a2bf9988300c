"""An object in a process of its own: its methods are called from here, one at a time, and may be waited for later.

Usage:
    aside = Aside(Side)         # the process; `Side` is made there by the first call
    aside.begin("new", "dist", 8)
    aside.end()
    aside.ask("turn", 0)
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def serve(connection: Connection, make: Callable[..., Any]) -> None:
    """The process: answers `(method, arguments)` with `(whether it failed, what it returned or said)`."""
    made: Any = None
    while (asked := _asked(connection)) is not None:
        method, arguments = asked
        try:
            if method == "new":
                made, said = make(*arguments), None
            else:
                said = getattr(made, method)(*arguments)
            connection.send((False, said))
        except Exception as error:  # whatever it is, it costs this process's results and no others
            first = next(iter(str(error).splitlines()), "")
            connection.send((True, f"{type(error).__name__}: {first}"))


def _asked(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:  # whoever asks is gone
        return None


class Aside:
    """The process. Calls to it do not overlap: each `begin` is followed by its `end`.

    Args:
        make: what makes the object from the arguments of the method `new`; importable there.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, make), daemon=True)
        self._process.start()
        other.close()

    def begin(self, method: str, *arguments: Any) -> None:
        """Let it begin; `end` waits for it."""
        self._connection.send((method, arguments))

    def done(self, seconds: float) -> bool:
        """Waits so long at most; whether `end` will return at once."""
        return self._connection.poll(max(seconds, 0.0))

    def end(self) -> Any:
        """What the method returned. Raises RuntimeError with what the process said when it failed, or has ended."""
        try:
            failed, said = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(5)
            raise RuntimeError(f"the process ended with status {self._process.exitcode}") from None
        if failed:
            raise RuntimeError(said)
        return said

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method there and wait."""
        self.begin(method, *arguments)
        return self.end()

    def close(self, seconds: float = 20) -> None:
        """End the process: it gets so long to do it by itself."""
        with contextlib.suppress(OSError):  # it has ended
            self._connection.send(None)
        self._process.join(seconds)
        self._process.kill()
