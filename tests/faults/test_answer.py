"""A program whose bytes are as they were written, in a process that computes something else with them.

Stands for a library that chooses another algorithm, a driver that compiles an engine anew, a GPU with a fault: what no
hash can see.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms import trt
from owl_wms.cache import CacheStore
from owl_wms.request import Request
from owl_wms.runtime import VideoDecode
from owl_wms.runtime.turns import tracing
from owl_wms.settings import TensorRTConfig
from owl_wms.trt.check import output
from owl_wms.trt.check.parity import Reference, latents
from owl_wms.trt.library import engines
from owl_wms.trt.run.load import LoadedProgram
from tests.faults.conftest import Fault
from tests.faults.test_runtime import PlainToolchain, same, small_decoder


class AnsweringToolchain(PlainToolchain):
    """As TensorRT's: the program's file holds the answer of its build, and who reads it asks for that answer."""

    def build(
        self, decoder: torch.nn.Module, request: Request, key: Any, folder: Path, *_rest: Any
    ) -> Mapping[str, Any]:
        self.builds += 1
        z = latents(request.input_shape, 1.0, torch.float32, "cpu")
        with tracing(), torch.no_grad():
            limits = Reference.measure(decoder, decoder, request.input_shape, torch.float32, torch.device("cpu"))
            built = output.RecordedOutput.of(decoder(z), limits.check(decoder), seed=0)
            exported = torch.export.export(decoder, (z,))
            torch.export.save(exported, folder / "program.pt2", extra_files={output.FILE: built.pack()})
        return {"precision": "fp32", "plan": "plain"}

    def load(self, data: bytes, request: Request, report: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
        return trt.load_program(data, "cpu")


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one per cent off": lambda x: x * 1.01,
    "one channel off": lambda x: torch.cat([x[:, :1] + 0.1, x[:, 1:]], dim=1),
    "not finite": lambda x: x / 0,
    "zeros": torch.zeros_like,
    "frames in another order": lambda x: x.flip(0),
}


def test_a_program_that_answers_otherwise_is_not_used(
    fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "attached", lambda: True)
    decoder, toolchain = small_decoder(), AnsweringToolchain()
    settings = TensorRTConfig(cache_dir=folder / "cache", precision="fp32")
    z = torch.randn(2, 5, 4, 2, 2)

    def fresh() -> VideoDecode:
        decode = VideoDecode(decoder, batch_size=4, settings=settings, toolchain=toolchain)
        assert same(decode(z), z, decoder)
        return decode

    assert fresh().stats().builds == 1
    right = LoadedProgram.__call__
    for name, wrong in FAULTS.items():
        caplog.clear()
        with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "owl_wms"):
            patched.setattr(LoadedProgram, "__call__", lambda self, z, wrong=wrong: wrong(right(self, z)))
            decode = fresh()
            assert same(decode(z), z, decoder)
        assert decode.stats().backend == "pytorch", name
        assert "does not repeat the output of its build" in decode.stats().reason
        assert len(caplog.records) == 1, [record.getMessage() for record in caplog.records]
    healed = fresh().stats()
    assert (healed.backend, healed.hits, toolchain.builds) == ("plain", 1, 1)
    assert len(CacheStore(folder / "cache").entries()) == 1
    fault.record("answer", f"{len(FAULTS)} kinds of wrong frames refused at loading; the entry served the next process")


def test_a_decode_inside_autocast_costs_no_sound_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs once ran under the caller's autocast, computed something else, and their entries went to quarantine."""
    monkeypatch.setattr(engines, "attached", lambda: True)
    decoder, toolchain = small_decoder(), AnsweringToolchain()
    settings = TensorRTConfig(cache_dir=folder / "cache", precision="fp32")
    z = torch.randn(1, 5, 4, 2, 2)
    for _ in range(2):
        decode = VideoDecode(decoder, batch_size=4, settings=settings, toolchain=toolchain, strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            frames = decode(z)
        assert same(frames, z, decoder)
        assert decode.stats().backend == "plain"
    assert toolchain.builds == 1
