"""Signals that end a run after its current step: SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU.

They come from a terminal (Ctrl-C, a closed window) and from schedulers (Slurm's `--signal=USR1@60`, submitit's USR2,
Grid Engine's SIGXCPU). A signal that was ignored when the run began stays ignored, as `nohup` and shells that start
background jobs intend.

Usage:
    with stop_signals() as stop:
        while not stop: ...        # stop.by == "SIGTERM"
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from owl_wms.data.workers import STOPPING

_log = logging.getLogger(__name__)
# What comes sooner is the first signal once more: a launcher such as torchrun passes on what its processes have already
# got from the terminal or the scheduler, and on a busy machine a SIGTERM late.
_SECOND_AFTER_SECONDS = {signal.SIGINT: 1.0, signal.SIGTERM: 5.0}


class StopRequest:
    """Remembers whether a signal has asked for the end; true once one has.

    Attributes:
        by: name of the first signal, or None.
    """

    def __init__(self, *, logs: bool = False) -> None:
        """`logs`: log at the first signal what happens next, and how to stop at once."""
        self._logs = logs
        self.by: str | None = None
        self._since = 0.0

    def __bool__(self) -> bool:
        return self.by is not None

    def take(self, number: int, frame: object) -> None:
        """Handle a signal. A SIGINT or SIGTERM some seconds after the first signal raises KeyboardInterrupt."""
        if self.by is None:
            self.by, self._since = signal.Signals(number).name, time.monotonic()
            if self._logs:
                text = "%s: the run ends and saves after this step; at once by a second Ctrl-C, or SIGTERM after %g s"
                _log.warning(text, self.by, _SECOND_AFTER_SECONDS[signal.SIGTERM])
        elif time.monotonic() - self._since > _SECOND_AFTER_SECONDS.get(signal.Signals(number), math.inf):
            raise KeyboardInterrupt


@contextmanager
def stop_signals(*, logs: bool = False) -> Iterator[StopRequest]:
    """Has the signals set a `StopRequest` while the body runs; in another thread than the main one nothing sets it."""
    stop = StopRequest(logs=logs)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    found = {number: signal.getsignal(number) for number in STOPPING}
    # None is a handler that Python did not set and cannot put back.
    previous = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, stop.take)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
