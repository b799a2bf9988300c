"""The soak finds what it is there to find: frames of old weights, frames that are wrong, and growing memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import soak
from owl_wms.runtime import canary


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> soak.Worker:
    """One whose every change of weights takes one clip."""
    monkeypatch.setattr(canary, "EVERY", canary.EVERY)  # it sets its own
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = argparse.Namespace(
        decoder="tiny",
        number=0,
        cache=tmp_path / "cache",
        shapes=2,
        states=3,
        clips=3,
        minutes=0.03,
        until=0,
        share=0.5,
        room=0,
    )
    return soak.Worker(options)


def test_a_sound_worker_has_no_wrong_frame(worker: soak.Worker) -> None:
    result = worker.run()
    counts = result["counts"]
    assert counts["frames"] > 0
    assert counts["chunks_program"] > 0
    assert (counts["wrong"], counts["updates that change little"], counts["canary_misses"]) == (0, 0, 0)
    assert len(result["memory"]["host"]) > 0
    assert result["programs"] == ["export bf16"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_decode_function_that_misses_an_update_is_found(worker: soak.Worker, number: int) -> None:
    if number:
        worker.decode = soak.decode_of(worker.decoder, worker.options, "uint8")
    worker.clip()
    generation = worker.decode._generation
    assert generation is not None
    worker.decode._current = lambda: generation  # type: ignore[method-assign]  # it looks at no stamp any more
    assert worker.counts["wrong"] == 0
    worker.update()
    for _ in range(4):
        worker.clip()
    assert worker.counts["wrong"] > 0


def test_nan_is_wrong(worker: soak.Worker) -> None:
    sound = worker.decode

    def broken(latents: torch.Tensor) -> Any:
        return torch.full_like(sound(latents), float("nan"))

    worker.decode = broken  # type: ignore[assignment]
    worker.clip()
    assert worker.counts["wrong"] == worker.counts["frames"] > 0
    assert worker.worst == float("inf")


def test_growth_is_that_after_the_first_third() -> None:
    def sampled(mib: list[float]) -> list[tuple[float, float]]:
        return [(2.0 * number, value) for number, value in enumerate(mib)]

    assert soak.growth(sampled([1.0, 500.0, 900.0, 900.0, 900.0, 900.0, 900.0, 900.0, 900.0])) == 0
    assert soak.growth(sampled([float(mib) for mib in range(0, 900, 10)])) == pytest.approx(590)
    assert soak.growth(sampled([900.0, 700.0, 1400.0] * 30)) == 0, "states of the weights in turn are no growth"
    leak = [300.0 + 0.2 * number + (500.0 if number % 7 == 0 else 0.0) for number in range(1000)]
    assert soak.growth(sampled(leak)) == pytest.approx(0.2 * 666, rel=0.03)
    assert soak.growth(sampled([1.0])) == 0
