"""Loads what is played on a thread of its own, while the server shows its page and how far the loading is.

Why it exists: torch alone takes seconds to import, and a model and its compiled decoder some more. The page needs none
of them.

Usage:
    loading = Loading(lambda progress: build_pipeline(config, weights, progress=progress))
    app = make_app(loading.new_source, settings, loading)
    loading.begin()
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from owl_wms import ending
from owl_wms.errors import OwlError
from owl_wms.inference.controls import Button, as_json

if TYPE_CHECKING:
    from owl_wms.inference.source import Source

Progress = Callable[[str, int, int], None]
"""Called with what is being made, and how far it is: ("first frames", 3, 12). 0 of 0 is a step without parts."""


class Loading:
    """The sources of a server, the first of them under way.

    Args:
        load: makes the source of the first player; called once, on a thread of its own.
        players: how many can play at once. Each has a twin of the first source before anybody plays: one thread
            prepares and plays, so that a beginning made later would stop whoever plays already.
        tell: told of every step as well.
        controls: buttons that the page shows meanwhile.

    Attributes:
        done: when loading is over; its exception is what `load` raised.
    """

    def __init__(
        self,
        load: Callable[[Progress], Source],
        players: int = 1,
        tell: Progress = lambda what, done, total: None,
        controls: tuple[Button, ...] = (),
    ) -> None:
        self._load, self._players, self._tell, self._controls = load, players, tell, controls
        self.done: Future[None] = Future()
        self._ready: list[Source] = []
        self._made = 0
        self._first: Source | None = None
        self._step: tuple[str, int, int] = ("the program", 0, 0)
        self._asked = float("-inf")

    def begin(self) -> None:
        """Starts the thread; the end of the process stops what it builds."""
        ending.begin(self._run, name="owl-play-load")

    def _run(self) -> None:
        try:
            first = self._load(self._note)
            twins = [first.twin(number) for number in range(1, self._players)]
        except BaseException as error:  # whoever waits must hear of it, on whatever thread they are
            self.done.set_exception(error)
            return
        self._first, self._ready, self._made = first, [first, *twins], self._players
        self.done.set_result(None)

    def _note(self, what: str, done: int, total: int) -> None:
        if ending.over():
            raise InterruptedError("the process is ending")
        self._step = what, done, total
        self._tell(what, done, total)

    def new_source(self) -> Source:
        """Returns the source of one more player."""
        assert self._first is not None, "only once loading is over"
        if self._ready:
            return self._ready.pop(0)
        self._made += 1
        return self._first.twin(self._made - 1)

    def state(self) -> dict[str, Any]:
        """Returns as JSON what a page shows meanwhile: `ready`, `what`, `done`, `total`, `controls`, `failed`."""
        self._asked = time.monotonic()
        what, done, total = self._step
        over = self.done.done()
        error = self.done.exception() if over else None
        reason = str(error) if isinstance(error, OwlError) else type(error).__name__
        failed = {} if error is None else {"failed": reason}
        about = {"what": what, "done": done, "total": total, "controls": as_json(self._controls)}
        return {"ready": over and error is None, **about, **failed}

    def watched(self, seconds: float) -> bool:
        """Returns whether a page has asked for the state during the last `seconds`."""
        return time.monotonic() - self._asked < seconds
