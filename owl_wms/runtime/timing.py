"""Milliseconds, measured where the work happens: CUDA events on a GPU, the monotonic clock on a CPU.

Why: a wall clock around an asynchronous launch measures the launch. Events are recorded during the decode and read
later, so that timing never makes a decode wait.

Usage:
    stopwatch = Stopwatch()
    with stopwatch.measure(device):
        ...
    stopwatch.percentiles()      # {"p50": 7.9, "p90": 8.1, "p99": 9.0, "samples": 64}
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from owl_wms.errors import ConfigError
from owl_wms.runtime import recording

KEPT_SAMPLES = 1024


class Stopwatch:
    """The last `KEPT_SAMPLES` durations; thread-safe."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._done: deque[float] = deque(maxlen=KEPT_SAMPLES)
        self._pending: deque[tuple[Any, Any]] = deque(maxlen=KEPT_SAMPLES)

    @contextlib.contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Time the block on `device`; an exception inside leaves no sample, nor does a block that is only recorded."""
        if recording.underway():
            yield
            return
        if device.type != "cuda":
            begin = time.perf_counter()
            yield
            with self._guard:
                self._done.append((time.perf_counter() - begin) * 1e3)
            return
        with torch.cuda.device(device):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
        with self._guard:
            self._pending.append((first, last))

    def percentiles(self) -> dict[str, float] | None:
        """`p50`, `p90`, `p99` in milliseconds and `samples`; None when nothing was timed. Waits for what is still
        running.
        """
        with self._guard:
            waiting, self._pending = list(self._pending), deque(maxlen=KEPT_SAMPLES)
        for first, last in waiting:
            last.synchronize()
            with self._guard:
                self._done.append(first.elapsed_time(last))
        with self._guard:
            ordered = sorted(self._done)
        if not ordered:
            return None
        # Nearest rank: with few samples an interpolated p99 would be a number nobody measured.
        ranked = {
            f"p{p}": round(ordered[min(len(ordered) - 1, -(-len(ordered) * p // 100) - 1)], 4) for p in (50, 90, 99)
        }
        return {**ranked, "samples": len(ordered)}


def measure_inference_time(
    decode: Callable[[Tensor], Tensor], latents: Tensor, *, warmup: int = 3, iterations: int = 20
) -> float:
    """Median milliseconds of `decode(latents)`.

    Args:
        decode: a decode function or a decoder.
        latents: what it takes, on the device to be timed.
        warmup: calls before the clock starts, >= 0; the first one may build a program.
        iterations: calls that are timed, >= 1.

    Raises:
        ConfigError: a count out of range.
    """
    if warmup < 0 or iterations < 1:
        raise ConfigError(f"warmup must be >= 0 and iterations >= 1; got {warmup} and {iterations}", key="iterations")
    cuda = latents.device.type == "cuda"
    samples = []
    on_device = torch.cuda.device(latents.device) if cuda else contextlib.nullcontext()  # events are of its stream
    with torch.no_grad(), on_device:
        for _ in range(warmup):
            decode(latents)
        for _ in range(iterations):
            if cuda:
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                decode(latents)
                last.record()
                last.synchronize()
                samples.append(first.elapsed_time(last))
            else:
                begin = time.perf_counter()
                decode(latents)
                samples.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(samples)
