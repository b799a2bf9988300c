"""A stream by real programs without a GPU: built in a process of their own, cached, loaded, failing in mid-stream.

Run: python -m pytest tests/runtime/test_step_programs.py
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.runtime import StreamDecode
from owl_wms.runtime.programs import forget_failed_builds
from owl_wms.runtime.toolchain import TensorRT
from owl_wms.settings import TensorRTConfig
from owl_wms.trt.check.chain import KEPT, STEPS, Chain
from owl_wms.trt.check.parity import Reference
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.run.load import LoadedProgram
from owl_wms.vae.stepping import Stepping
from tests.trt import decoders

STREAMED = 6


class OnTheCpu(TensorRT):
    """The toolchain of the package, for a decoder on the CPU: plan `ops` needs no GPU, only time."""

    def ready(self, request: Request) -> FastPathError | None:
        return None


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget_failed_builds()


def test_built_cached_and_left_in_mid_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU the build process uses it; tests/trt/test_gpu.py does")
    step, request = decoders.make_step()
    decoder = step.decoder
    settings = TensorRTConfig(precision="bf16", cache_dir=tmp_path / "cache")
    latents = torch.randn(1, STREAMED, *request.input_shape[1:], generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = decoder(latents)

    def near(got: Tensor) -> bool:
        return bool((got - wanted).norm() < 0.02 * wanted.norm())

    stream = StreamDecode(decoder, settings=settings, toolchain=OnTheCpu())
    assert near(stream.step(latents))
    stats = stream.stats()
    assert (stats.backend, stats.builds, stats.chunks_program, stats.fallbacks) == ("tensorrt", 1, STREAMED, 0)
    (program,) = stats.programs
    assert (program["plan"], program["precision"], program["not_kept"]) == ("ops", "bf16", "")
    assert program["entry"].startswith("taehv_")

    again = StreamDecode(decoder, settings=settings, toolchain=OnTheCpu())
    first = again.step(latents[:, :3])
    assert (again.stats().hits, again.stats().builds) == (1, 0)
    run = LoadedProgram.__call__

    def lost(self: LoadedProgram, *inputs: Tensor) -> object:
        run(self, *inputs)
        raise RuntimeError("device lost")

    monkeypatch.setattr(LoadedProgram, "__call__", lost)
    with caplog.at_level(logging.WARNING, logger="owl_wms.runtime"):
        rest = again.step(latents[:, 3:])
    assert near(torch.cat([first, rest], 1))
    assert (again.stats().chunks_program, again.stats().fallbacks) == (3, 3)
    assert "device lost" in caplog.text


def test_another_state_is_another_program() -> None:
    step, request = decoders.make_step()
    recording = Recording.of(step, request.input_shape, request.state)
    assert "s.0: " in recording.text
    assert recording.digest() != Recording.of(step, request.input_shape).digest()
    assert Request.from_json(request.to_json()) == request


class Forgets(torch.nn.Module):
    """A step whose state loses a channel."""

    def forward(self, latent: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return latent + state.sum(), state[:, 1:]


def test_a_step_must_return_the_state_that_it_takes() -> None:
    with pytest.raises(FastPathError, match=r"takes a state of .*1, 2, 3, 3.* and returns one of .*1, 1, 3, 3"):
        Recording.of(Forgets().eval(), (1, 4, 3, 3), ((1, 2, 3, 3),))


class Leaky(torch.nn.Module):
    """`frames = latent + state`, and a state that is wrong by `fault` of itself at every step."""

    def __init__(self, fault: float) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, latent: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return latent + state, (0.9 * state + latent) * (1 + self.fault)


def test_an_error_that_grows_fails_the_parity_check() -> None:
    """One step is well within the limits; what 32 of them make of it is not."""
    shape = (1, 4, 3, 3)
    exact = Chain(Leaky(0.0), (shape,))
    reference = Reference.measure(exact, exact, (STEPS, *shape[1:]), torch.bfloat16, "cpu")
    assert len(reference.wanted) == 3 * (len(KEPT) + 1)
    assert reference.check(exact)["passed"]
    grown = reference.check(Chain(Leaky(0.02), (shape,)))
    assert not grown["passed"]
    assert grown["scales"][0]["reason"] == ""
    assert "relative error" in grown["reason"]


def test_the_step_of_a_decoder_says_its_state() -> None:
    step, request = decoders.make_step()
    assert isinstance(step, Stepping)
    assert len(request.state) == 9


class JobTimeout(Exception):
    """What a job runner's signal handler raises."""


def test_a_time_limit_of_the_caller_passes_through_and_pytorch_steps_for_a_while(tmp_path: Path) -> None:
    asked = []

    class Slow(OnTheCpu):
        def ready(self, request: Request) -> FastPathError | None:
            asked.append(request)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            time.sleep(5)
            return None

    def alarm(*_: object) -> None:
        raise JobTimeout

    step, request = decoders.make_step()
    latents = torch.randn(1, 2, *request.input_shape[1:], generator=torch.Generator().manual_seed(5))
    stream = StreamDecode(step.decoder, settings=TensorRTConfig(cache_dir=tmp_path / "cache"), toolchain=Slow())
    before = signal.signal(signal.SIGALRM, alarm)
    try:
        with pytest.raises(JobTimeout):
            stream.step(latents)
    finally:
        signal.signal(signal.SIGALRM, before)
    with torch.no_grad():
        assert torch.allclose(stream.step(latents).float(), step.decoder(latents).float(), atol=1e-2)
    assert len(asked) == 1, "the limit would end a second attempt too"
    assert (stream.stats().backend, stream.stats().failures) == ("pytorch", {})
