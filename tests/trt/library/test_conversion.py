"""Real conversion and partition reports for every decoder family without a GPU, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from owl_wms.trt.library import importer, versions
from tests.trt import decoders

FEWER_THAN = {"2.14": 29}  # its tracker reports 30 operators for the smallest decoder, with nothing left in PyTorch
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def answers() -> list[dict]:
    if importer.installed_flavour()[0] == "none":
        pytest.skip("Torch-TensorRT is not installed")
    if torch.cuda.is_available():
        pytest.skip("the stand-in is for machines without a GPU; tests/trt/test_gpu.py does the real thing")
    done = subprocess.run(
        [sys.executable, "-m", "tests.trt.conversion_child"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def find(answers: list[dict], **wanted: object) -> dict:
    return next(a for a in answers if all(a.get(key) == value for key, value in wanted.items()))


def test_torch_tensorrt_imports(answers: list[dict]) -> None:
    state = find(answers, name="status")
    assert state["available"], state["reason"]
    assert state["flavour"] in ("rtx", "standard")


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_every_family_is_one_engine(answers: list[dict], family: str) -> None:
    found = find(answers, name=family, plan="tensorrt", precision="fp16", kept=[])
    assert found["engines"] == 1
    assert found["engine_operators"] > FEWER_THAN.get(versions.number(torch.__version__), 40)
    assert found["left"] == []


def test_plain_sana_converts(answers: list[dict]) -> None:
    assert find(answers, plan="tensorrt-plain")["engines"] == 1


def test_exactly_the_kept_module_stays_in_pytorch(answers: list[dict]) -> None:
    found = next(a for a in answers if a.get("kept"))
    assert [where.split("/")[0] for _, where in found["left"]] == found["kept"]
    assert found["left"][0][0] == "torch.ops.aten.convolution.default"
    assert found["engines"] == 2


def test_an_engine_is_built_and_reports_progress(answers: list[dict]) -> None:
    found = find(answers, name="serialized")
    assert found["engine_bytes"] > 10_000
    assert "Building engine" in found["phases"]


def test_a_step_and_its_state_are_one_engine(answers: list[dict]) -> None:
    found = find(answers, name="step")
    assert found["engines"] == 1
    assert found["engine_operators"] > 60
    assert found["left"] == []


def test_no_kernels_of_a_shared_file_come_into_a_build(answers: list[dict]) -> None:
    release = versions.of_torch()
    if release is None or not release.runtime_cache:
        pytest.skip("this release keeps no kernels in a file")
    found = find(answers, name="runtime_cache")
    assert found["inside"] == ""
    assert found["outside"] != ""
