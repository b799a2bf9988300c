"""A loaded program must repeat what it answered when it was built: the same bits, or as near as parity allows."""

from __future__ import annotations

import io
import logging

import pytest
import torch
from torch import Tensor, nn

from owl_wms.errors import FastPathError
from owl_wms.trt.check import output
from owl_wms.trt.check.output import RecordedOutput
from owl_wms.trt.check.parity import Reference, latents
from owl_wms.trt.library import engines
from owl_wms.trt.run.load import load_program

SHAPE = (2, 4, 3, 5)


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 1), nn.Tanh(), nn.Upsample(scale_factor=16), nn.Conv2d(8, 3, 3, padding=1))


def packed(change: float = 0.0) -> bytes:
    """A decoder's program whose file holds the answer of that decoder, its last weights changed by `change`."""
    model = decoder().eval().requires_grad_(False)
    z = latents(SHAPE, 1.0, torch.float32, "cpu")
    parity = Reference.measure(model, model, SHAPE, torch.float32, torch.device("cpu")).check(model)
    built = RecordedOutput.of(model(z), parity, seed=0)
    model[3].weight.mul_(1 + change)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (z,)), buffer, extra_files={output.FILE: built.pack()})
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "attached", lambda: True)


def test_the_same_bits_are_loaded_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "owl_wms"):
        assert load_program(packed(), "cpu")(torch.zeros(SHAPE)).shape == (2, 3, 48, 80)
    assert not [record for record in caplog.records if record.name.startswith("owl_wms")]


def test_a_callers_autocast_changes_neither_loading_nor_frames(caplog: pytest.LogCaptureFixture) -> None:
    z, data = latents(SHAPE, 1.0, torch.float32, "cpu", seed=1), packed()
    with caplog.at_level(logging.INFO, "owl_wms"), torch.autocast("cpu", torch.bfloat16):
        program = load_program(data, "cpu")
        inside = program(z)
    assert not [record for record in caplog.records if record.name.startswith("owl_wms")]
    assert torch.equal(inside, program(z))


def test_another_order_of_summation_is_loaded_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "owl_wms"):
        load_program(packed(3e-6), "cpu")
    assert "not bit for bit: other bits, relative distance" in caplog.text


def test_another_answer_is_refused() -> None:
    with pytest.raises(FastPathError, match="does not repeat the output of its build: relative distance") as error:
        load_program(packed(3e-3), "cpu")
    assert error.value.stage == "parity"


def changed(output: Tensor, what: str) -> Tensor:
    """`output` with one fault."""
    bad = output.clone()
    if what == "channel":
        bad[:, 1] *= 1.01
    elif what == "tile":
        bad[1, :, 64:128, 64:128] = 0
    elif what == "nan":
        bad[...] = torch.nan
    elif what == "shape":
        bad = bad[:, :, 1:]
    return bad


@pytest.mark.parametrize("what", ["channel", "tile", "nan", "shape"])
def test_a_fault_anywhere_is_seen(what: str) -> None:
    generator = torch.Generator().manual_seed(0)
    output = torch.rand(2, 4, 360, 640, generator=generator) * 2 - 1
    limits = {"scales": [{"scale": 1, "relative_limit": 1e-3, "absolute_limit": 1e-2}]}
    built = RecordedOutput.unpack(RecordedOutput.of(output, limits, seed=3).pack())
    assert (built.seed, built.compare(output)) == (3, "")
    assert built.compare(output * (1 + 1e-4)).startswith("other bits")
    with pytest.raises(FastPathError):
        built.compare(changed(output, what))


def test_without_limits_only_the_same_bits_will_do() -> None:
    built = RecordedOutput.of(torch.ones(7), {}, seed=0)
    assert built.compare(torch.ones(7)) == ""
    with pytest.raises(FastPathError):
        built.compare(torch.ones(7) * (1 + 1e-6))


@pytest.mark.parametrize("count", [1, 2, 4095, 4096, 7_372_800])
def test_the_sample_takes_no_value_twice(count: int) -> None:
    sample = output.sample_of(torch.arange(count, dtype=torch.float64))
    assert len(sample) == min(count, output.SAMPLES) == len(set(sample.tolist()))
