"""The trainers' form on a machine that cannot compile: PyTorch's own answer, one warning, nothing raised."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from owl_wms.errors import ConfigError, FastPathError
from owl_wms.trt import GraphedProgram, compile_for_training, jit
from tests.trt import decoders


def test_cpu_latents_get_the_eager_answer_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    decoder, shape = decoders.make("square")
    wrapped = compile_for_training(decoder)
    z = torch.randn(shape)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(3):
            assert torch.equal(wrapped(z), decoder(z))
    assert len(caplog.records) == 1
    assert "CUDA latents" in wrapped.reason


def test_our_fused_form_is_compiled_checked_and_timed() -> None:
    """On a stand-in for the GPU: Dynamo, the converters and the partition are real, engines run in PyTorch."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        pytest.skip("Torch-TensorRT is not installed")
    if torch.cuda.is_available():
        pytest.skip("the stand-in is for machines without a GPU; benchmarks.road does the real thing")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.trt.jit_child"], capture_output=True, text=True, timeout=280, check=True
    )
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["plan"] == "tensorrt+ops"
    assert said["reason"] == ""
    assert said["dtype"] == "torch.float32"
    assert said["error"] < 0.02
    assert said["relative_error"] < 0.02
    assert said["timed"] == ["compiled", "pytorch"]
    assert said["wrong"].startswith("a program's frames are not right: ")
    assert said["fallback"], "a decoder that fails the check is PyTorch's"


def test_strict_raises() -> None:
    decoder, shape = decoders.make("square")
    with pytest.raises(FastPathError, match="CUDA latents"):
        compile_for_training(decoder, strict=True)(torch.randn(shape))


def test_a_failure_at_run_ends_in_eager(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    decoder, shape = decoders.make("square")
    wrapped = compile_for_training(decoder, precision="fp32")

    def explode(_z: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: illegal memory access\nmore")

    monkeypatch.setattr(jit.TrainingDecoder, "_compile", lambda self, z: explode)
    z = torch.randn(shape)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert torch.equal(wrapped(z), decoder(z))
    assert "illegal memory access" in wrapped.reason
    assert len(caplog.records) == 1


def test_a_failed_import_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise FastPathError("import", "Torch-TensorRT is not installed", "install it")

    monkeypatch.setattr(jit.importer, "require", absent)
    wrapped = compile_for_training(decoders.make("square")[0], strict=True)
    z = torch.empty(1, 8, 4, 4, device="meta")
    monkeypatch.setattr(type(z), "device", torch.device("cuda", 0), raising=False)
    with pytest.raises(FastPathError, match="not installed"):
        wrapped._compile(z)


def test_a_callers_autocast_is_kept_out() -> None:
    decoder, shape = decoders.make("square")
    wrapped = compile_for_training(decoder, precision="bf16", strict=True)
    seen: list[bool] = []

    def program(z: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return z

    wrapped._compiled[tuple(shape)] = program
    with torch.autocast("cpu", torch.bfloat16):
        wrapped(torch.randn(shape))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


class OnTheSecondGPU(torch.Tensor):
    """A CPU tensor that says it is on cuda:1."""

    device = torch.device("cuda", 1)  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]


def test_the_latents_gpu_is_current_while_it_builds_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch-TensorRT builds for the current device, Triton launches on it."""
    decoder, shape = decoders.make("square")
    wrapped = compile_for_training(decoder, precision="bf16", strict=True)
    current, seen = [torch.device("cuda", 0)], list[tuple[str, torch.device]]()

    @contextlib.contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def program(z: torch.Tensor) -> torch.Tensor:
        seen.append(("run", current[-1]))
        return z

    def build(z: torch.Tensor) -> object:
        seen.append(("build", current[-1]))
        return program

    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(wrapped, "_compile", build)
    wrapped(torch.randn(shape).as_subclass(OnTheSecondGPU))
    assert seen == [("build", torch.device("cuda", 1)), ("run", torch.device("cuda", 1))]


@pytest.mark.parametrize("precision", ["auto", "fp8", "half"])
def test_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(ConfigError, match="fp16, bf16, fp32"):
        compile_for_training(decoders.make("square")[0], precision=precision)


def test_no_graph_on_the_cpu_but_the_same_answer() -> None:
    decoder, shape = decoders.make("square")
    z = torch.randn(shape)
    graphed = GraphedProgram(decoder, z)
    assert not graphed.graphed
    assert "CUDA" in graphed.reason
    with torch.no_grad():
        assert torch.equal(graphed(z), decoder(z))
