"""Time between points of work on a device, read after the fact so that measuring does not stall it."""

from __future__ import annotations

import time
from typing import Any

import torch


class StageClock:
    """Marks points in a stream of work; milliseconds between them once the work is done.

    On CUDA a mark is an event in the stream; elsewhere it is the process's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """The next point."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))  # by itself it takes the current device's stream
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def wait(self) -> None:
        """Until the work before the last mark is done."""
        if self._cuda:
            self._marks[-1].synchronize()

    def between(self, first: int, second: int) -> float:
        """Milliseconds between two marks; call after `wait`."""
        a, b = self._marks[first], self._marks[second]
        return a.elapsed_time(b) if self._cuda else (b - a) * 1e3
