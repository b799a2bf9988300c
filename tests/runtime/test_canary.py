"""`check="canary"`: a program that begins to give wrong and finite frames is noticed, a sound one is left alone.

Run: python -m pytest tests/runtime/test_canary.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms.errors import ConfigError, FastPathError
from owl_wms.runtime import VideoDecode, canary
from owl_wms.runtime.canary import Canary, difference
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings

EVERY = 40
ROW = {"scale": 1, "relative_limit": 0.015}


class Checked(ExportToolchain):
    """Its report has the limits of a parity check, and its weights can be reached as a fault of memory reaches them."""

    def build(self, *arguments: Any) -> dict[str, Any]:
        return {**super().build(*arguments), "parity": {"scales": [ROW]}}

    def load(self, data: bytes, request: Any, report: Mapping[str, Any]) -> Any:
        program = super().load(data, request, report)
        (self.module,) = [
            cell.cell_contents for cell in program.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)
        ]
        return program


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "EVERY", EVERY)


def decoding(folder: Path, output: str = "bf16", **options: Any) -> tuple[VideoDecode, VideoDecode, Checked]:
    decoder, toolchain = TinyDecoder().eval(), Checked()
    asked = {"batch_size": 4, "output": output}
    plain = VideoDecode(decoder, settings=settings(folder, enabled=False), **asked)
    decode = VideoDecode(decoder, settings=settings(folder), toolchain=toolchain, check="canary", **asked, **options)
    return decode, plain, toolchain


def flip(toolchain: Checked) -> None:
    """One bit of one weight: the highest of its exponent that makes it larger and not infinite."""
    weight = next(p for name, p in toolchain.module.named_parameters() if p.dim() == 4)
    with torch.no_grad():
        bits = weight.view(torch.int32).reshape(-1)
        bits[3] ^= next(1 << bit for bit in range(29, 22, -1) if not int(bits[3]) >> bit & 1)


@pytest.mark.parametrize("output", ["bf16", "uint8"])
@pytest.mark.parametrize("fault", ["errs", "flipped weight"])
def test_a_program_that_begins_to_err_is_switched_off(fault: str, output: str, tmp_path: Path) -> None:
    decode, plain, toolchain = decoding(tmp_path, output)
    latents = torch.randn(1, 8, 4, 3, 3)
    for _ in range(3):
        assert decode(latents).shape == plain(latents).shape
    assert decode.stats().backend == "export"
    if fault == "errs":
        toolchain.damage = lambda frames: frames.roll(1, -1)
    else:
        flip(toolchain)
    for _ in range(EVERY // 8):
        got = decode(latents)
    assert decode.stats().backend == "pytorch"
    assert "a frame of the program is not PyTorch's: rms difference" in decode.stats().reason
    assert decode.stats().failures == {"run": 1}
    assert decode.stats().canaries == 1
    assert torch.equal(decode(latents), plain(latents))
    assert got.isfinite().all()


def test_the_frames_of_the_call_that_noticed_are_pytorchs(tmp_path: Path) -> None:
    decode, plain, toolchain = decoding(tmp_path)
    latents = torch.randn(1, EVERY, 4, 3, 3)
    decode.prepare((4, 3, 3))
    toolchain.damage = lambda frames: frames + 0.5
    assert torch.equal(decode(latents), plain(latents))
    strict, _, toolchain = decoding(tmp_path / "strict", strict=True)
    strict.prepare((4, 3, 3))
    toolchain.damage = lambda frames: frames + 0.5
    with pytest.raises(FastPathError, match="is not PyTorch's"):
        strict(latents)


@pytest.mark.parametrize("output", ["bf16", "uint8"])
def test_a_sound_program_is_left_alone(output: str, tmp_path: Path) -> None:
    decode, _, toolchain = decoding(tmp_path, output)
    for scale in (0.0, 0.1, 1.0, 3.0):
        for _ in range(EVERY // 8):
            decode(scale * torch.randn(1, 8, 4, 3, 3))
    state = decode.stats()
    assert (state.backend, state.canaries, state.failures) == ("export", 4, {})
    assert toolchain.runs > EVERY // 2


def test_one_frame_of_every_so_many_and_not_always_the_same_place() -> None:
    chosen = Canary()
    places = [chosen.due(7) for _ in range(200)]
    assert sum(place is not None for place in places) == 200 * 7 // (EVERY + 2)
    assert len({place for place in places if place is not None}) <= 7
    assert all(place is None or 0 <= place < 7 for place in places)


def test_eight_bits_have_their_own_limit_and_a_nan_is_a_difference() -> None:
    truth = torch.rand(3, 8, 8) * 2 - 1
    report = {"precision": "fp8", "parity": {"scales": [{"scale": 1, "relative_limit": 0.0}]}}
    assert difference(truth + 0.02, truth, "bf16", report) == ""
    assert difference(truth + 0.2, truth, "bf16", report)
    assert difference(truth * float("nan"), truth, "bf16", report)
    assert difference(truth, truth * float("nan"), "bf16", report) == "", "PyTorch has no values to compare with"


def test_a_misspelt_check_lists_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="canary"):
        VideoDecode(TinyDecoder(), batch_size=1, settings=settings(tmp_path), check="canaries")
