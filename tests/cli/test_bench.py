"""`owl-wms bench` prints one JSON object that says what was timed, on what, and by what."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from owl_wms.cli import bench
from tests.cli.runner import run

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
    assert found["schema"] == bench.SCHEMA
    assert (found["device"], found["decoder"], found["batch_size"], found["latent"]) == ("cpu", "demo", 1, [128, 8, 8])
    assert found["machine"]["torch"].endswith(torch.__version__.split("+")[0])
    assert set(found["gpu"].values()) == {"-"}
    assert "no CUDA device" in found["decoded_by"]
    asked_for = set(re.findall(r"`([a-z_]+)`", (RESULTS / "community.md").read_text(encoding="utf-8"))) - {"owl_wms"}
    assert {"machine", "rows"} <= asked_for <= set(found) | set(ours), "the page says what the command prints"
