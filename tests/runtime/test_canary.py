"""`check="canary"`: a program that begins to give wrong and finite frames is noticed, a sound one is left alone.

Run: python -m pytest tests/runtime/test_canary.py
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms.errors import ConfigError, FastPathError, NonFiniteError
from owl_wms.runtime import UNATTENDED, VideoDecode, canary, verdict
from owl_wms.runtime.canary import Canary
from owl_wms.runtime.eager import EagerDecoder
from owl_wms.runtime.output import Output
from owl_wms.runtime.programs import Loaded
from owl_wms.runtime.stats import Ledger
from owl_wms.runtime.verdict import FP32_EVERY, distance, judge, within
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings

EVERY = 40
ROW = {"scale": 1, "relative_limit": 0.015, "absolute_limit": 0.01}


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


def flip(toolchain: Checked | Copied) -> None:
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
    assert "a frame of the program is wrong: " in decode.stats().reason
    assert decode.stats().failures == {"run": 1}
    assert (decode.stats().canaries, decode.stats().canary_misses) == (1, 1)
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
    with pytest.raises(FastPathError, match="a frame of the program is wrong"):
        strict(latents)


@pytest.mark.parametrize("output", ["bf16", "uint8"])
def test_a_sound_program_is_left_alone(output: str, tmp_path: Path) -> None:
    decode, _, toolchain = decoding(tmp_path, output)
    for scale in (0.0, 0.1, 1.0, 3.0):
        for _ in range(EVERY // 8):
            decode(scale * torch.randn(1, 8, 4, 3, 3))
    state = decode.stats()
    assert (state.backend, state.canaries, state.canary_misses, state.failures) == ("export", 4, 0, {})
    assert toolchain.runs > EVERY // 2


def test_one_frame_of_every_so_many_and_not_always_the_same_place() -> None:
    chosen = Canary("bf16", Ledger(), str)
    places = [chosen.due(7) for _ in range(200)]
    assert sum(place is not None for place in places) == 200 * 7 // (EVERY + 2)
    assert len({place for place in places if place is not None}) <= 7
    assert all(place is None or 0 <= place < 7 for place in places)


def problem_of(eager: EagerDecoder, report: Mapping[str, Any], z: torch.Tensor, frame: torch.Tensor, kind: str) -> str:
    problem, own = judge(eager, report, z, frame, kind, frame)
    assert own.left in (0, FP32_EVERY - 1)
    return problem


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "fp8"])
@pytest.mark.parametrize("kind", ["bf16", "uint8"])
@torch.no_grad()
def test_the_verdict_is_the_parity_check_on_these_latents(kind: str, precision: str) -> None:
    eager, latents = EagerDecoder(TinyDecoder().eval()), torch.randn(1, 4, 9, 9)
    for scale in (0.0, 0.1, 3.0):  # rounding weighs most in small values
        z = latents * scale
        exact = eager(z)[0]
        stored = Output(kind, 2, torch.device("cpu"), (4, 9, 9))
        stored.write(0, eager.module.to(torch.float32)(z).to(torch.bfloat16 if precision == "bf16" else torch.float32))
        assert problem_of(eager, {"precision": precision}, z, stored.tensor[0], kind) == "", scale
        spoilt = exact.clone()
        spoilt[:, 4:8, 4:8] += 0.9
        stored.write(1, spoilt[None])
        problem = problem_of(eager, {"precision": precision}, z, stored.tensor[1], kind)
        assert "against fp32, at " in problem, scale


@torch.no_grad()
def test_one_small_wrong_place_is_enough() -> None:
    """Its share of the whole frame's error is nothing; the largest difference shows it."""
    eager, z = EagerDecoder(TinyDecoder().eval()), torch.randn(1, 4, 64, 64)
    frame = eager(z)[0]
    frame[0, 7, 7] = frame[0, 7, 7] / frame[0, 7, 7].abs().clamp(min=1) + 0.04
    report = {"precision": "bf16", "parity": {"scales": [ROW]}}
    measured = distance(frame, eager(z)[0]).tolist()
    assert measured[0] < ROW["relative_limit"] * measured[2]
    assert not within(measured, report, "bf16")
    assert "absolute error" in problem_of(eager, report, z, frame, "bf16")


def test_what_is_not_finite_is_a_difference_where_fp32_is_finite() -> None:
    eager, z = EagerDecoder(TinyDecoder().eval()), torch.randn(1, 4, 3, 3)
    report = {"precision": "bf16", "parity": {"scales": [ROW]}}
    frame = eager(z)[0]
    frame[0, 0, 0] = float("nan")
    measured = distance(frame, eager(z)[0]).tolist()
    assert not within(measured, report, "bf16")
    assert problem_of(eager, report, z, frame, "bf16") == "it has values that are not finite"
    z[:] = float("inf")
    assert problem_of(eager, report, z, frame, "bf16") == "", "fp32 has no values to compare with"


def test_a_report_without_limits_leaves_it_to_the_parity_check() -> None:
    exact = [0.0, 0.0, 1.0]
    assert within(exact, {"parity": {"scales": [ROW]}}, "bf16")
    for report in ({}, {"parity": {"scales": []}}, {"parity": {"scales": [{**ROW, "absolute_limit": None}]}}):
        assert not within(exact, report, "bf16"), report
    assert within([0.019, 0.5, 1.0], {"precision": "int8", "parity": {"scales": [ROW]}}, "bf16")
    assert not within([0.021, 0.5, 1.0], {"precision": "int8", "parity": {"scales": [ROW]}}, "bf16")


def test_a_decoder_that_fp32_cannot_run_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, plain, toolchain = decoding(tmp_path)
    latents = torch.randn(1, EVERY, 4, 3, 3)
    decode.prepare((4, 3, 3))
    toolchain.damage = lambda frames: frames + 0.5
    monkeypatch.setattr(verdict, "_in", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    assert torch.equal(decode(latents), plain(latents))
    assert "fp32 cannot decode it: OutOfMemoryError: no memory" in decode.stats().reason


def test_memory_that_is_not_there_for_the_comparison_takes_no_frames_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode, plain, _ = decoding(tmp_path)
    latents = torch.randn(1, EVERY, 4, 3, 3)
    decode.prepare((4, 3, 3))

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(canary, "distance", no_memory)
    for _ in range(2):
        torch.testing.assert_close(decode(latents), plain(latents))
    assert (decode.stats().backend, decode.stats().canaries) == ("export", 0)
    assert caplog.text.count("no frame could be compared with PyTorch's: OutOfMemoryError: no memory") == 1


class Later:
    """An event of a GPU that has not happened yet."""

    def __init__(self) -> None:
        self.happened, self.waits = False, 0

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.happened = True
        self.waits += 1


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> list[Later]:
    """Makes comparisons end when the test says so, as on a GPU; returns their events."""
    events: list[Later] = []
    made = canary._Comparison

    def comparison(**fields: Any) -> Any:
        events.append(Later())
        return made(**{**fields, "done": events[-1]})

    monkeypatch.setattr(canary, "_Comparison", comparison)
    return events


def test_a_comparison_beside_the_work_is_read_by_a_later_call(tmp_path: Path, later: list[Later]) -> None:
    decode, plain, toolchain = decoding(tmp_path)
    latents = torch.randn(1, EVERY, 4, 3, 3)
    decode.prepare((4, 3, 3))
    toolchain.damage = lambda frames: frames + 0.5
    frames = decode(latents)
    latents_then = latents.clone()
    frames.zero_(), latents.zero_()  # the caller's, who may change them
    for _ in range(3):
        decode(latents)
    assert (len(later), later[0].waits) == (1, 0), "another one is not begun, and nobody waits"
    later[0].happened = True
    assert torch.equal(decode(latents_then), plain(latents_then)), "the call that reads it is PyTorch's"
    state = decode.stats()
    assert (state.canaries, state.canary_misses, state.backend) == (1, 1, "pytorch")


def test_stats_waits_for_a_comparison_and_strict_raises_at_the_next_call(tmp_path: Path, later: list[Later]) -> None:
    decode, _, toolchain = decoding(tmp_path, strict=True)
    latents = torch.randn(1, EVERY, 4, 3, 3)
    decode.prepare((4, 3, 3))
    toolchain.damage = lambda frames: frames + 0.5
    decode(latents)
    assert decode.stats().canary_misses == 1
    assert later[0].waits == 1
    with pytest.raises(FastPathError, match="a frame of the program is wrong"):
        decode(latents)


@torch.no_grad()
def test_weights_that_change_meanwhile_are_no_miss_and_the_next_comparison_is_waited_for(
    tmp_path: Path, later: list[Later]
) -> None:
    decode, plain, _ = decoding(tmp_path)
    latents = torch.randn(1, EVERY, 4, 3, 3)
    decode(latents)
    for part in decode.decoder.parameters():
        part.mul_(1.5)
    later[0].happened = True
    got = decode(latents)
    torch.testing.assert_close(got, plain(latents))
    state = decode.stats()
    assert (state.canaries, state.canary_misses, state.backend) == (1, 0, "export")
    assert [event.waits for event in later] == [1, 1]


class Copied:
    """Its program is a copy of the decoder, on any device; `module` is that copy, in the program's memory."""

    name = "copied"
    background = False

    def obtain(self, decoder: torch.nn.Module, *_: Any) -> Loaded:
        self.module = copy.deepcopy(decoder)
        report = {"precision": "fp32", "parity": {"scales": [{**ROW, "relative_limit": 1e-4}]}}
        numbers = {"file_bytes": 0, "build_seconds": 0.0, "load_seconds": 0.0}
        return Loaded(program=self.module, built=True, name="copy", not_kept="in memory", report=report, **numbers)


class Coarse(TinyDecoder):
    """Rounds to multiples of 1/16 in bf16, and to none that matters in fp32."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return super().forward(z) + 8 - 8


class Finer(Copied):
    """Computes in fp32 beside a decoder in bf16, whose own error is beyond the program's limits."""

    def obtain(self, decoder: torch.nn.Module, *arguments: Any) -> Loaded:
        loaded = super().obtain(decoder, *arguments)
        self.module.float()
        return dataclasses.replace(loaded, program=lambda z: self.module(z.float()))


@pytest.mark.parametrize("output", ["bf16", "uint8"])
@torch.no_grad()
def test_fp32_decides_now_and_then_where_pytorch_is_coarser_than_the_program(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(canary, "judge", lambda *given: asked.append(given) or judge(*given))
    monkeypatch.setattr(verdict, "FP32_EVERY", 5)
    decoder, toolchain = Coarse().eval().bfloat16(), Finer()
    asking: dict[str, Any] = {"batch_size": 4, "output": output, "check": "canary", "toolchain": toolchain}
    decode = VideoDecode(decoder, settings=settings(tmp_path), **asking)
    latents = torch.randn(1, EVERY, 4, 3, 3, dtype=torch.bfloat16)
    for _ in range(11):
        decode(latents)
    state = decode.stats()
    assert (state.backend, state.canaries, state.canary_misses) == ("copied", 11, 0)
    assert len(asked) == 3, "the first, the sixth and the eleventh"
    decode(latents)
    flip(toolchain)
    decode(latents)
    assert (decode.stats().canaries, decode.stats().canary_misses) == (13, 1), "found at once, out of fp32's turn"
    assert "a frame of the program is wrong" in decode.stats().reason


@pytest.mark.gpu
@pytest.mark.parametrize("output", ["bf16", "uint8"])
@torch.no_grad()
def test_a_bit_flipped_in_the_memory_of_a_gpu(output: str, tmp_path: Path) -> None:
    decoder, toolchain = TinyDecoder().eval().cuda(), Copied()
    asked = {"batch_size": 4, "output": output}
    plain = VideoDecode(decoder, settings=settings(tmp_path, enabled=False), **asked)
    decode = VideoDecode(decoder, settings=settings(tmp_path), toolchain=toolchain, check="canary", **asked)
    latents = torch.randn(1, EVERY, 4, 3, 3, device="cuda")
    for _ in range(3):
        decode(latents)
        torch.cuda.synchronize()
    state = decode.stats()
    assert (state.canaries, state.canary_misses, state.backend) == (3, 0, "copied")
    flip(toolchain)
    decode(latents)
    assert decode.stats().canary_misses == 1
    assert torch.equal(decode(latents), plain(latents))


@pytest.mark.parametrize(
    ("check", "found"),
    [
        ("canary", ("auto", True)),
        ("error+canary", ("error", True)),
        ("off+canary", ("off", True)),
        ("off", ("off", False)),
    ],
)
def test_a_comparison_goes_with_every_search(check: str, found: tuple[str, bool]) -> None:
    assert canary.parts(check) == found


@torch.no_grad()
def test_values_that_are_not_finite_are_still_an_error_in_a_job_that_nobody_watches(tmp_path: Path) -> None:
    decoder = TinyDecoder().eval()
    decode = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path, enabled=False), check=UNATTENDED)
    with pytest.raises(NonFiniteError):
        decode(torch.full((1, 4, 4, 3, 3), float("nan")))


def test_a_misspelt_check_lists_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="canary"):
        VideoDecode(TinyDecoder(), batch_size=1, settings=settings(tmp_path), check="canaries")
    with pytest.raises(ConfigError, match="canary"):
        VideoDecode(TinyDecoder(), batch_size=1, settings=settings(tmp_path), check="+canary")
