"""`owl-wms bench` prints one JSON object that says what was timed, on what, and by what."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import community
from owl_wms.cli import bench
from tests.cli.runner import run

ON_A_GPU = {"unbroken_ms", "watts", "clock_mhz", "joules"}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU builds a program, which takes minutes")
def test_the_printed_object_can_be_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object, **_named: object) -> object:
        def fail(_z: object) -> object:
            raise RuntimeError("no C++ compiler\nin a long text")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    assert run("bench", "--batch-size", "1", "--iterations", "1") == 0
    said = capsys.readouterr()
    told = [line for line in said.err.splitlines() if line.startswith("timing ")]
    assert told == ["timing eager", "timing torch.compile", "timing owl_wms (pytorch)"]
    found = json.loads(said.out)
    eager, compiled, ours = found["rows"]
    assert (eager["way"], compiled["way"], ours["way"]) == ("eager", "torch.compile", "owl_wms (pytorch)")
    assert compiled["failed"] == "RuntimeError: no C++ compiler"
    for row in (eager, ours):
        assert row["ms"] > 0
        assert row["frames_per_second"] == pytest.approx(1e3 / row["ms"])
        assert row["relative_error"] < 2**-8, "fp32 against fp32, in frames rounded to bf16"
        assert row["max_uint8"] <= 2
        assert row["over_eager"] == pytest.approx(eager["ms"] / row["ms"])
        assert row["over_compiled"] is None
        assert "joules" not in row, "a CPU has no meter"
    assert found["schema"] == bench.SCHEMA
    assert (found["device"], found["decoder"], found["batch_size"], found["latent"]) == ("cpu", "demo", 1, [128, 8, 8])
    assert found["machine"]["torch"].endswith(torch.__version__.split("+")[0])
    assert set(found["gpu"].values()) == {"-"}
    assert "no CUDA device" in found["decoded_by"]
    assert found["programs"] == []
    assert community.row(found, "#31").startswith("| CPU, "), "what the command prints can be added to the table"
    asked_for = set(re.findall(r"`([a-z_]+)`", (RESULTS / "community.md").read_text(encoding="utf-8"))) - {"owl_wms"}
    assert {"machine", "rows"} <= asked_for <= set(found) | set(ours) | ON_A_GPU, (
        "the page says what the command prints"
    )


def test_a_driver_that_does_not_tell_gives_null_and_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"watts": math.nan, "clock_mhz": 1605.0, "sustained_ms": 2.0, "joules": math.nan}
    monkeypatch.setattr("owl_wms.power.under_load", lambda run, device: dict(told))
    found = bench._under_load(lambda z: z, torch.zeros(1))
    assert found == {"watts": None, "clock_mhz": 1605.0, "unbroken_ms": 2.0, "joules": None}
    assert set(found) == ON_A_GPU
