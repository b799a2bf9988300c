"""The durations of a decode function's last calls, and their percentiles.

Usage:
    stopwatch = Stopwatch()
    with stopwatch.measure(device):
        ...
    stopwatch.percentiles()      # {"p50": 7.9, "p90": 8.1, "p99": 9.0, "samples": 64}
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

import torch

from owl_wms.runtime import capture
from owl_wms.timing import Marks

KEPT_SAMPLES = 1024


class Stopwatch:
    """The last `KEPT_SAMPLES` durations; thread-safe."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._done: deque[float] = deque(maxlen=KEPT_SAMPLES)
        self._pending: deque[Marks] = deque(maxlen=KEPT_SAMPLES)

    @contextlib.contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Times the block on `device`. A block that raises, or that a CUDA graph captures, leaves no sample."""
        if capture.underway():
            yield
            return
        marks = Marks(device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            marks.mark()
            yield
            marks.mark()
        with self._guard:
            self._pending.append(marks)

    def percentiles(self) -> dict[str, float] | None:
        """`p50`, `p90`, `p99` in milliseconds and `samples`; None when nothing was timed. Waits for what is still
        running.
        """
        with self._guard:
            waiting, self._pending = list(self._pending), deque(maxlen=KEPT_SAMPLES)
        for marks in waiting:
            marks.wait()
            with self._guard:
                self._done.append(marks.between(0, 1))
        with self._guard:
            ordered = sorted(self._done)
        if not ordered:
            return None
        # Nearest rank: with few samples an interpolated p99 would be a number nobody measured.
        ranked = {
            f"p{p}": round(ordered[min(len(ordered) - 1, -(-len(ordered) * p // 100) - 1)], 4) for p in (50, 90, 99)
        }
        return {**ranked, "samples": len(ordered)}
