"""Interleaved timing: in turns, at least five samples each, and no more time than it was given."""

from __future__ import annotations

import time

import torch

from owl_wms.trt.timing import interleaved


def test_turns_samples_and_budget() -> None:
    calls: list[str] = []

    def candidate(name: str, seconds: float):  # type: ignore[no-untyped-def]
        def decode(z: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            time.sleep(seconds)
            return z

        return decode

    z = torch.zeros(1)
    times = interleaved({"slow": candidate("slow", 0.02), "fast": candidate("fast", 0.001)}, z, budget_seconds=0.01)
    assert 15 < times["slow"] < 200
    assert 0.5 < times["fast"] < times["slow"]
    assert calls == ["slow"] * 2 + ["fast"] * 2 + ["slow", "fast"] * 5
    calls.clear()
    interleaved({"fast": candidate("fast", 0.0001)}, z)
    assert len(calls) == 2 + 15
    assert interleaved({}, z) == {}
