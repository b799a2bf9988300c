"""Which of several decoders is fastest on this device: interleaved medians, by CUDA events or, on the CPU, by the
clock.

Why interleaved: clocks and temperature drift; candidates timed one after the other are compared across that drift,
candidates timed in turns are not.

Usage:
    latency_ms = interleaved({"eager": eager, "tensorrt": program}, z)      # {"eager": 36.8, "tensorrt": 15.4}
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

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
    budget_seconds: float = 3.0,
    measure: Measure = _measured,
    head_start: int = 0,
) -> dict[str, float]:
    """Median milliseconds a call of every candidate on `z`, without those that were left out.

    Args:
        z: latents on the device; every candidate gets the same batch (weights, not latents, dominate memory traffic).
        rounds: timed calls each, cut down (never below 5) so that all of them stay within `budget_seconds`.
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
    rounds = max(5, min(rounds, int(budget_seconds / max(total, 1e-6))))
    for _ in range(rounds):
        for name in list(samples):
            ms = measure(name, functools.partial(_one, candidates[name], z, head_start))
            if ms is None:
                del samples[name]
            else:
                samples[name].append(ms)
    return {name: statistics.median(values) for name, values in samples.items()}


def _one(decode: Callable[[Tensor], Tensor], z: Tensor, head_start: int) -> float:
    if z.device.type != "cuda":
        start = time.perf_counter()
        decode(z)
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(z.device)
    if head_start:
        torch.cuda._sleep(head_start)
    begin.record()
    decode(z)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
