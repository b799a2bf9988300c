"""A caller under torch.compile: Dynamo stays outside of a decode, which answers as ever and notices new weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from owl_wms.runtime import AudioDecode, VideoDecode
from owl_wms.trt import compile_for_training
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings


@pytest.fixture
def compiled() -> tuple[Callable[..., Callable[[Tensor], Tensor]], list[str]]:
    """A torch.compile whose backend runs what it gets as it is, and the operators that it got."""
    torch._dynamo.reset()
    operators: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Tensor]:
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    return lambda function: torch.compile(function, backend=backend), operators


@pytest.mark.parametrize("enabled", [True, False])
def test_what_a_decode_does_is_not_compiled(
    tmp_path: Path, compiled: tuple, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    strays: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", strays.append)
    decoder, latents = TinyDecoder().eval().requires_grad_(False), torch.randn(1, 5, 4, 3, 5)
    decode = VideoDecode(
        decoder, batch_size=2, settings=settings(tmp_path, enabled=enabled), toolchain=ExportToolchain()
    )
    make, operators = compiled
    step = make(lambda z: decode(z + 1).float() - 2)
    for _ in range(3):
        assert torch.equal(step(latents), decode(latents + 1).float() - 2)
        for parameter in decoder.parameters():
            parameter.add_(0.1)
        plain = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path, enabled=False))
        torch.testing.assert_close(step(latents), plain(latents + 1).float() - 2, rtol=1e-2, atol=2e-2)
    assert len(operators) == 3, f"beside +, float and -: {operators}"
    assert strays == []


def test_audio_and_the_form_for_trainers_likewise(compiled: tuple) -> None:
    make, operators = compiled
    audio = AudioDecode(torch.nn.Conv1d(3, 2, 1).requires_grad_(False), batch_size=2)
    clips = torch.randn(2, 7, 3)
    assert torch.equal(make(audio)(clips), audio(clips))
    video = compile_for_training(TinyDecoder().eval())
    latents = torch.randn(2, 4, 3, 5)
    assert torch.equal(make(lambda z: video(z))(latents), video.decoder(latents))
    assert operators == []


def test_a_process_that_compiles_nothing_does_not_import_dynamo() -> None:
    code = """
import sys, torch
from owl_wms.runtime import AudioDecode
AudioDecode(torch.nn.Conv1d(3, 2, 1), batch_size=2)(torch.zeros(1, 2, 3))
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False"], done.stderr
