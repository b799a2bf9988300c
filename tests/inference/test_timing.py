"""A clock's marks belong to its own device's stream, whichever device is current."""

from __future__ import annotations

import time

import pytest
import torch

from owl_wms.inference.timing import StageClock


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
    StageClock(torch.device("cuda", 1)).mark()
    assert recorded == ["of cuda:1"]


def test_the_processs_clock_elsewhere() -> None:
    clock = StageClock(torch.device("cpu"))
    clock.mark()
    time.sleep(0.02)
    clock.mark()
    clock.wait()
    assert 20 <= clock.between(0, 1) < 20_000, "milliseconds"
