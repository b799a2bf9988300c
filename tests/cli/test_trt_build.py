"""`owl-wms trt build` and `bench`: what they say when it works, when nothing is kept, and when it cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from owl_wms.runtime import decode as decode_module
from owl_wms.runtime.programs import forget_failed_builds
from owl_wms.utils import owl_vae_bridge as bridge
from tests.cli.runner import run
from tests.runtime.toolchains import ExportToolchain


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_build_without_a_gpu_is_one_clear_error(
    cache: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("trt", "build", "--vae-config", files[0], "--checkpoint", files[1]) == 2
    said = capsys.readouterr().err
    assert "no CUDA device" in said
    assert "Traceback" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_bench_without_a_gpu_times_nothing_unless_told_to(
    cache: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(*_: Any, **__: Any) -> float:
        raise AssertionError("something was timed")

    monkeypatch.setattr("owl_wms.cli.bench.measured", timed)
    assert run("trt", "bench", "--vae-config", files[0], "--checkpoint", files[1]) == 2
    assert "no CUDA device, so there is no program to time; --cpu times PyTorch alone" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build", "bench"])
def test_options_are_checked_before_the_device(
    command: str, cache: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    call = ("trt", command, "--vae-config", files[0], "--checkpoint", files[1])
    absent = str(tmp_path / "none.safetensors")
    for more, message in (
        (("--plan", "tensorrt", "--plan", "nope"), "--plan must be one of "),
        (("--precision", "int8", "--calibration", absent), f"--calibration {absent}: no such file"),
    ):
        assert run(*call, *more) == 2
        said = capsys.readouterr().err.replace("\n", " ")
        assert message in said
        assert "no CUDA device" not in said
    assert run("trt", command, "--vae-id", "foo", "--latent", "4,8,8") == 2
    known = "only 'dcae', and 'taehv' with a checkpoint, need no configuration"
    assert f"vae_id 'foo' is not known: {known}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build", "bench"])
def test_no_decoder_and_latents_of_another_are_one_line(
    command: str, cache: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for call, message in (
        ((), "--vae-config is missing: give --vae-config and --checkpoint, or --vae-id dcae"),
        (("--vae-config", files[0]), "--checkpoint is missing"),
        (
            ("--vae-config", files[0], "--checkpoint", files[1], "--latent", "5,8,8"),
            "latents must be [b, n, 8, h, w] (8 channels, got 5)",
        ),
    ):
        assert run("trt", command, *call) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture
def build_here(monkeypatch: pytest.MonkeyPatch, files: tuple[str, str]) -> tuple[str, ...]:
    """`trt build` of the golden decoder, by a toolchain that needs no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(decode_module, "TensorRT", ExportToolchain)
    return ("trt", "build", "--vae-config", files[0], "--checkpoint", files[1], "--batch-size", "1")


def test_build_and_then_find(cache: Path, build_here: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for came_from in ("built", "cached"):
        assert run(*build_here) == 0
        said = capsys.readouterr().out
        (entry,) = (path.name for path in cache.glob("dcae_*"))
        assert f"{came_from} program {entry}" in said
        assert "export" in said, "the report"
        assert "not stored" not in said


def test_build_that_cannot_be_kept_succeeds_and_says_so(
    cache: Path, build_here: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    cache.chmod(0o777)
    assert run(*build_here) == 0
    said = capsys.readouterr()
    assert "built program dcae_" in said.out
    assert "not stored, so every process will build it again" in said.out
    assert "error" not in said.err
    assert not list(cache.glob("dcae_*"))


def test_build_that_fails_is_one_line(
    cache: Path, build_here: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> ExportToolchain:
        return ExportToolchain(fail={"build": RuntimeError("no tactic")})

    monkeypatch.setattr(decode_module, "TensorRT", failing)
    assert run(*build_here) == 2
    forget_failed_builds()
    said = capsys.readouterr().err.strip()
    assert said == "error: no program could be built: RuntimeError: no tactic (run owl-wms doctor)"


def test_build_that_is_switched_off_is_one_line(
    cache: Path, build_here: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_ENABLED", "false")
    assert run(*build_here) == 2
    said = capsys.readouterr()
    assert said.err.strip() == "error: TENSORRT_ENABLED switches the compiled path off, so nothing is built; unset it"
    assert not list(cache.glob("dcae_*"))


def test_build_with_a_calibration_that_nothing_uses_is_one_line(
    cache: Path, build_here: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*build_here, "--precision", "bf16", "--calibration", "clip.safetensors") == 2
    said = capsys.readouterr().err
    assert "clip.safetensors" in said
    assert "bf16" in said


def test_build_shows_tensorrts_progress_and_failed_attempts(
    cache: Path, build_here: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    update = Progress.update

    def watch(bar: Progress, task: Any, **changes: Any) -> None:
        shown.append(changes["description"])
        update(bar, task, **changes)
        bar.refresh()

    class Telling(ExportToolchain):
        def build(self, *arguments: Any) -> dict[str, Any]:
            progress = arguments[4]
            progress({"stage": "tensorrt", "plan": "p", "phase": "Node [/conv] of 3", "step": 4, "steps": 9})
            progress({"stage": "tensorrt", "plan": "p", "phase": "x" * 500, "step": 0, "steps": 0})
            progress({"stage": "attempt failed", "key": "build|p|bf16|", "reason": "no\n[/tactic]"})
            return super().build(*arguments)

    monkeypatch.setattr(Progress, "update", watch)
    monkeypatch.setattr(decode_module, "TensorRT", Telling)
    assert run(*build_here) == 0
    assert shown[:2] == ["waiting to build", "tensorrt, plan p, Node [/conv] of 3 4/9"]
    assert len(shown[2]) < 80
    assert "attempt failed, build p bf16, no [/tactic]" in capsys.readouterr().err


def test_bench_measures_against_fp32_in_its_own_arithmetic(
    cache: Path, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, bool, bool]] = []
    get_decoder_only = bridge.get_decoder_only

    def watched(*arguments: Any, **options: Any) -> Any:
        decoder = get_decoder_only(*arguments, **options)
        if options.get("dtype") is torch.float32:
            cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
            decoder.register_forward_pre_hook(
                lambda _, inputs: ran.append((len(inputs[0]), cudnn.enabled, cudnn.allow_tf32 or matmul.allow_tf32))
            )
        return decoder

    monkeypatch.setattr(bridge, "get_decoder_only", watched)
    arguments = ("--batch-size", "2", "--iterations", "1", "--no-compiled", "--cpu")
    assert run("trt", "bench", "--vae-config", files[0], "--checkpoint", files[1], *arguments) == 0
    assert ran == [(1, False, False)] * 2


def test_bench_compares_in_one_table(
    cache: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--batch-size", "2", "--iterations", "2", "--no-compiled", "--cpu")
    assert run("trt", "bench", "--vae-config", files[0], "--checkpoint", files[1], *arguments) == 0
    said = capsys.readouterr().out
    assert "eager" in said
    assert "owl_wms (" in said
    assert "relative L2" in said


def test_bad_latent_and_bad_precision(cache: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    base = ("trt", "build", "--vae-config", files[0], "--checkpoint", files[1])
    assert run(*base, "--latent", "8,8") == 2
    assert "c,h,w" in capsys.readouterr().err
    assert run(*base, "--latent", "²,8,8") == 2
    assert "c,h,w" in capsys.readouterr().err
    assert run(*base, "--precision", "fp17") == 2
    assert "fp16" in capsys.readouterr().err
