"""Measures time where the work happens: CUDA events on a GPU, the process's clock on a CPU.

A wall clock around an asynchronous launch measures the launch. Events are recorded in the stream and read later, so
that measuring does not stall the work.

Candidates are timed in turns (`interleaved`): clock rates and temperature drift, and candidates that are timed one
after the other would be compared across that drift.

Usage:
    latency_ms = interleaved({"eager": eager, "tensorrt": program}, z)      # {"eager": 36.8, "tensorrt": 15.4}
    marks = Marks(device); marks.mark(); run(); marks.mark(); marks.wait(); marks.between(0, 1)      # milliseconds
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from owl_wms.errors import ConfigError


class Marks:
    """Marks points in a stream of work; milliseconds between them once the work is done.

    On CUDA a mark is an event in the stream; elsewhere it is the process's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Sets the next mark."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))  # by itself it takes the current device's stream
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def wait(self) -> None:
        """Waits until the work before the last mark is done."""
        if self._cuda:
            self._marks[-1].synchronize()

    def between(self, first: int, second: int) -> float:
        """Returns the milliseconds between two marks; call after `wait`."""
        a, b = self._marks[first], self._marks[second]
        result: float = a.elapsed_time(b) if self._cuda else (b - a) * 1e3
        return result


class Spent:
    """Seconds that each stage of a pipeline was busy; thread-safe. Stages overlap, so they add up to more than the time
    that passed."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self.seconds: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        """Adds to a stage."""
        with self._guard:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextlib.contextmanager
    def on(self, stage: str) -> Iterator[None]:
        """Adds the wall-clock time of a block, also where it raises."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - begun)


class Stages:
    """Seconds of stages that follow each other: each lasts until the next one begins."""

    def __init__(self) -> None:
        self._spent, self._name, self._begun = Spent(), "", time.perf_counter()

    def begin(self, name: str) -> None:
        """Ends the present stage and begins another, or goes on with one of the same name."""
        now = time.perf_counter()
        if self._name:
            self._spent.add(self._name, now - self._begun)
        self._name, self._begun = name, now

    def end(self) -> dict[str, float]:
        """Ends the present stage. Returns the seconds of every stage, in the order in which they first began."""
        self.begin("")
        return {name: round(seconds, 3) for name, seconds in self._spent.seconds.items()}


Measure: TypeAlias = Callable[[str, Callable[[], float]], "float | None"]


def _measured(_name: str, run: Callable[[], float]) -> float:
    return run()


@torch.no_grad()
def interleaved(
    candidates: Mapping[str, Callable[[Tensor], Tensor]],
    z: Tensor,
    *,
    rounds: int = 15,
    warmup: int = 1,
    budget_seconds: float | None = 3.0,
    measure: Measure = _measured,
    head_start: int = 0,
) -> dict[str, float]:
    """Median milliseconds per call of every candidate on `z`, without those that were left out.

    Args:
        z: latents on the device; every candidate gets the same batch (weights, not latents, dominate memory traffic).
        rounds: timed calls each, cut down (never below 5) so that all of them stay within `budget_seconds`; None
            cuts nothing.
        warmup: untimed calls each, >= 0; one suffices where every candidate has run before.
        measure: every measurement is made as `measure(name, run)`, which returns `run()`, or None to leave the
            candidate out from then on. What it raises ends the timing.
        head_start: clock cycles for which a GPU is kept busy before each timed call, so that the host's launches are
            not timed: for parts of a program that will be replayed as a graph.
    """

    def first(decode: Callable[[Tensor], Tensor]) -> float:
        for _ in range(warmup):
            decode(z)
        return _one(decode, z, head_start)

    single = {name: measure(name, functools.partial(first, decode)) for name, decode in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name, ms in single.items() if ms is not None}
    total = sum(ms for ms in single.values() if ms is not None) / 1e3
    if budget_seconds is not None:
        rounds = max(5, min(rounds, int(budget_seconds / max(total, 1e-6))))
    for _ in range(rounds):
        for name in list(samples):
            ms = measure(name, functools.partial(_one, candidates[name], z, head_start))
            if ms is None:
                del samples[name]
            else:
                samples[name].append(ms)
    return {name: statistics.median(values) for name, values in samples.items()}


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
    on_device = torch.cuda.device(latents.device) if latents.is_cuda else contextlib.nullcontext()
    with torch.no_grad(), on_device:
        for _ in range(warmup):
            decode(latents)
        return statistics.median(_one(decode, latents) for _ in range(iterations))


def _one(decode: Callable[[Tensor], Tensor], z: Tensor, head_start: int = 0) -> float:
    """Milliseconds of one call; a GPU is idle when it begins, or busy for `head_start` clock cycles."""
    marks = Marks(z.device)
    if z.device.type == "cuda":
        torch.cuda.synchronize(z.device)
        if head_start:
            torch.cuda._sleep(head_start)
    marks.mark()
    decode(z)
    marks.mark()
    marks.wait()
    return marks.between(0, 1)
