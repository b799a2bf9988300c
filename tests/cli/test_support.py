"""`owl-wms doctor` says of a GPU which kernels, plan and precision serve it, and what was run on such a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms import env, trt
from owl_wms.cli import _support
from owl_wms.cli.doctor import diagnose
from owl_wms.ops.common.gpu import SHARED_LIMITS
from tests.ops.common.test_nvrtc import FAMILIES

ABSENT = trt.TensorRTStatus(available=False, flavour="none", version="", reason="not installed", remedy="install it")


def test_what_our_tests_compile_and_run_is_what_is_said() -> None:
    assert set(_support.EXECUTED) | _support.COMPILED == set(FAMILIES)
    assert not set(_support.EXECUTED) & _support.COMPILED


@pytest.mark.parametrize(
    ("capability", "library", "kernels", "plan", "tested"),
    [
        ((9, 0), True, "warpgroup", "tensorrt+ops where", "measured on H100 and H200"),
        ((9, 0), False, "warpgroup", "ops where", "measured"),
        ((8, 0), True, "8.0 and newer", "tensorrt+ops where", "not on such a device"),
        ((12, 0), False, "8.0 and newer", "ops where", "never run"),
        ((8, 7), True, "8.0 and newer", "tensorrt+ops where", "neither compiled nor run"),
        ((13, 0), True, "within 99 KB", "tensorrt+ops where", "neither compiled nor run"),
        ((7, 5), True, "none: they need compute capability 8.0; this GPU has 7.5", "tensorrt", "neither"),
        ((7, 5), False, "none", "PyTorch decodes", "neither"),
    ],
)
def test_every_kind_of_gpu(capability: tuple[int, int], library: bool, kernels: str, plan: str, tested: str) -> None:
    said = _support.support(capability, library, "auto")
    assert kernels in said["kernels"]
    assert said["plan"].startswith(plan)
    assert tested in said["tested"]
    assert said["precision"] == "fp16, then bf16"


def test_the_page_about_gpus_begins_with_what_doctor_says_of_each() -> None:
    pytest.importorskip("triton")
    from benchmarks.architectures import GPUS, names_of, others, overview, timed, variants

    assert set(GPUS) == set(FAMILIES)
    page = (Path(__file__).parents[2] / "docs" / "gpus.md").read_text(encoding="utf-8").splitlines()
    assert page[2 : 2 + len(overview())] == overview(), "python -m benchmarks.architectures writes the page"
    assert set(timed()) <= set(page)
    kernels = [names_of(kernel) for kernel in (*variants(), *others())]
    rows = [line for line in page if line.startswith(tuple({name.split()[1] for name in kernels}), 2)]
    assert [line.startswith(name) for line, name in zip(rows, kernels, strict=True)] == [True] * len(kernels)


def test_eight_bits_are_refused_where_they_cannot_be() -> None:
    assert "need compute capability 9.0; this GPU has 8.9" in _support.support((8, 9), True, "fp8")["precision"]
    assert _support.support((9, 0), True, "fp8")["precision"] == "fp8"
    assert (8, 9) in SHARED_LIMITS


@pytest.mark.parametrize(("text", "wanted"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("unknown: no CUDA device", None)])
def test_the_capability_is_read_off_the_machine(text: str, wanted: tuple[int, int] | None) -> None:
    assert _support.capability_of(text) == wanted


@pytest.mark.parametrize(("fallback", "last"), [("pytorch", "else PyTorch: "), ("error", "TENSORRT_FALLBACK=error): ")])
def test_a_gpu_without_tensorrt_has_our_kernels(monkeypatch: pytest.MonkeyPatch, fallback: str, last: str) -> None:
    machine: dict[str, Any] = {**env.describe_machine(), "compute_capability": "8.6"}
    monkeypatch.setattr(env, "describe_machine", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trt, "status", lambda: ABSENT)
    monkeypatch.setenv("TENSORRT_FALLBACK", fallback)
    said = diagnose()
    assert said["usable"]
    assert said["verdict"].startswith("Our kernels would decode without TensorRT, where the decoder has a fused form")
    assert last in said["verdict"]
    assert said["verdict"].endswith("not installed. Remedy: install it.")
    assert said["gpu"]["tested"] == "compiled in our tests, never run"
