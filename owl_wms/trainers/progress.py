"""Tells people how far a run is: its start in log lines, its steps in a line on a terminal. By rank 0 alone.

Usage:
    start = StartLog()
    start.log("opening the training data")        # logs "start, 1.3 s: opening the training data"
    with Progress(total=1000, done=trainer.step) as progress:
        progress.show(step, {"diffusion_loss": 0.9, "time": 0.2})
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger(__name__)
_SMOOTHING = 0.1  # share of a new step in the shown steps per second


class StartLog:
    """Logs the parts of a start as each of them begins, which may take minutes (loading, compiling)."""

    def __init__(self, *, enabled: bool = True) -> None:
        """Begin to count the seconds; `enabled` False logs nothing."""
        self._enabled = enabled
        self._begun = time.monotonic()

    def log(self, what: str) -> None:
        """Log, at info level, what begins now and the seconds since the start."""
        if self._enabled:
            _log.info("start, %.1f s: %s", time.monotonic() - self._begun, what)


class Progress:
    """Shows steps, losses and steps per second on a terminal, and nothing elsewhere."""

    def __init__(self, *, total: int | None, done: int = 0, enabled: bool = True) -> None:
        """Prepare the line; it appears on entry.

        Args:
            total: steps of the whole run, or None when epochs or a time end it.
            done: steps done before.
            enabled: False shows nothing even on a terminal.
        """
        self._bar: Any = None
        self._seconds = 0.0
        if enabled and sys.stderr.isatty():
            # Imported here: a run without a terminal needs none of it.
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # a terminal that was closed takes no more text
                self._bar.stop()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show a finished step; `values` are its reports, with its seconds as `time`."""
        if self._bar is None:
            return
        took = max(values.get("time", 0.0), 1e-9)
        self._seconds = took if self._seconds == 0 else self._seconds + _SMOOTHING * (took - self._seconds)
        losses = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith("loss"))
        with contextlib.suppress(OSError):
            self._bar.update(self._task, completed=step, description=f"{losses}  {1 / self._seconds:.2f} steps/s")
