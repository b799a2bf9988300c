"""Interleaved timing: in turns, at least five samples each, and no more time than it was given. A clock's marks belong
to its own device's stream, whichever device is current.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from owl_wms import timing
from owl_wms.timing import Marks, Stages, interleaved


def test_turns_samples_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = [0.0]  # a busy machine would cut rounds
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def candidate(name: str, seconds: float):  # type: ignore[no-untyped-def]
        def decode(z: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            clock[0] += seconds
            return z

        return decode

    z = torch.zeros(1)
    times = interleaved({"slow": candidate("slow", 0.02), "fast": candidate("fast", 0.001)}, z, budget_seconds=0.01)
    assert times == {"slow": pytest.approx(20), "fast": pytest.approx(1)}
    assert calls == ["slow"] * 2 + ["fast"] * 2 + ["slow", "fast"] * 5
    calls.clear()
    interleaved({"fast": candidate("fast", 0.0001)}, z)
    assert len(calls) == 2 + 15
    assert interleaved({}, z) == {}


def test_each_stage_lasts_until_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 3.5, 4.0, 9.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    stages = Stages()
    for name in ("import", "compile", "parity", "compile"):
        stages.begin(name)
    assert stages.end() == {"import": 2.0, "compile": 5.5, "parity": 0.5}


@pytest.mark.parametrize("head_start", [0, 1000])
def test_a_head_start_keeps_the_gpu_busy_before_the_clock_starts(
    head_start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "of cuda"
            order.append("clock")

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Any) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(f"busy {cycles}"))
    z: Any = SimpleNamespace(device=torch.device("cuda"))
    times = interleaved({"one": lambda _: order.append("run")}, z, warmup=0, rounds=5, head_start=head_start)  # type: ignore[dict-item, func-returns-value, return-value]
    assert times == {"one": 1.0}
    once = ["wait", *([f"busy {head_start}"] if head_start else []), "clock", "run", "clock"]
    assert order == once * 6


def test_marks_are_in_the_stream_of_the_clocks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event records into the current device's stream by itself: on cuda:1 nothing waited for the frame's copy."""
    recorded: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str = "the current device's") -> None:
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    Marks(torch.device("cuda", 1)).mark()
    assert recorded == ["of cuda:1"]


def test_the_processs_clock_elsewhere() -> None:
    clock = Marks(torch.device("cpu"))
    clock.mark()
    time.sleep(0.02)
    clock.mark()
    clock.wait()
    assert 20 <= clock.between(0, 1) < 20_000, "milliseconds"
