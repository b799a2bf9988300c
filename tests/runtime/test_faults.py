"""Whatever fails, PyTorch's own answer comes back, one warning says why, and the counters show it."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms import trt
from owl_wms.errors import FAILED, DecodeMemoryError, FastPathError, NoDeviceError
from owl_wms.request import Request
from owl_wms.runtime import TensorRT, VideoDecode
from owl_wms.trt.build.parent import explain_exit
from owl_wms.trt.library import importer
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings

LATENTS = (2, 5, 4, 3, 3)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "owl_wms.runtime" and r.levelno >= logging.WARNING]


def assert_pytorch_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, toolchain: Any, stage: str, reason: str, calls: int = 4
) -> VideoDecode:
    """Bit-equal to the path with TensorRT off, one warning with stage, reason and remedy."""
    decoder, latents = TinyDecoder().bfloat16().eval(), torch.randn(LATENTS)
    truth = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path, enabled=False))(latents)
    decode = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=toolchain)
    with caplog.at_level(logging.INFO, "owl_wms.runtime"):
        for _ in range(calls):
            assert torch.equal(decode(latents), truth)
    said = warnings_of(caplog)
    assert len(said) == 1, said
    assert f"because {FAILED[stage]}: " in said[0]
    assert reason in said[0]
    assert said[0].rsplit("; ", 1)[1].strip(), "a remedy is named"
    assert decode.stats().failures[stage] >= 1
    assert decode.stats().chunks_pytorch == 3 * calls
    return decode


class WithoutDeviceCheck(TensorRT):
    """The real adapter, asked for a device that it would refuse before importing anything."""

    def ready(self, request: Request) -> FastPathError | None:
        status = trt.status()
        return None if status.available else FastPathError("import", status.reason, status.remedy)


@pytest.fixture
def importer_forgets() -> Any:
    importer.forget()
    yield
    importer.forget()


def test_tensorrt_absent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, importer_forgets: None
) -> None:
    monkeypatch.setattr(importer, "installed_flavour", lambda: ("none", ""))
    monkeypatch.setattr(importer, "_findable", lambda: False)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    assert_pytorch_answers(tmp_path, caplog, WithoutDeviceCheck(), "import", "not installed")


@pytest.mark.parametrize(
    "error", [RuntimeError("no driver"), Exception("bare"), ImportError("libnvinfer"), OSError("x")]
)
def test_tensorrt_import_broken(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    importer_forgets: None,
    error: Exception,
) -> None:
    def broken(flavour: str) -> Any:
        raise error

    monkeypatch.setattr(importer, "_import", broken)
    monkeypatch.setattr(importer, "installed_flavour", lambda: ("rtx", "torch-tensorrt-rtx 0"))
    assert_pytorch_answers(tmp_path, caplog, WithoutDeviceCheck(), "import", str(error))


@pytest.mark.parametrize(
    ("step", "stage"), [("ready", "import"), ("key_material", "export"), ("build", "build"), ("load", "load")]
)
@pytest.mark.parametrize("error", [RuntimeError("boom"), Exception("boom"), AssertionError("boom"), OSError("boom")])
def test_each_step_raises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step: str, stage: str, error: Exception
) -> None:
    toolchain = ExportToolchain(fail={step: error})
    assert_pytorch_answers(tmp_path, caplog, toolchain, stage, "boom")
    assert toolchain.builds <= 1, "a failed build is not tried again at every call"


def test_failed_build_is_remembered_for_the_process(tmp_path: Path) -> None:
    toolchain = ExportToolchain(fail={"build": RuntimeError("no tactic")})
    decoder = TinyDecoder().eval()
    for _ in range(3):
        decode = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=toolchain)
        decode(torch.randn(LATENTS))
        assert "no tactic" in decode.stats().reason
    assert toolchain.builds == 1


def test_execution_context_fails_at_first_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class NoContext(ExportToolchain):
        def load(self, *arguments: Any) -> Any:
            def program(z: torch.Tensor) -> torch.Tensor:
                raise RuntimeError("Unable to create TensorRT execution context")

            return program

    assert_pytorch_answers(tmp_path, caplog, NoContext(), "load", "execution context")


def test_building_child_segfaults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Segfault(ExportToolchain):
        def build(self, *arguments: Any) -> Any:
            code = f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"
            status = subprocess.run([sys.executable, "-c", code]).returncode
            raise FastPathError("build", explain_exit(status, 60.0), "PyTorch decodes")

    assert_pytorch_answers(tmp_path, caplog, Segfault(), "build", "SIGSEGV")


def test_corrupt_program_is_rebuilt_once_and_never_deserialized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, latents = TinyDecoder().eval(), torch.randn(LATENTS)
    good = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=ExportToolchain())(latents)
    (file,) = (tmp_path / "cache").glob("*/program.pt2")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o600)
    file.write_bytes(bytes(data))
    seen: list[bytes] = []
    original = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda f: seen.append(f.getvalue()) or original(f))
    toolchain = ExportToolchain()
    decode = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=toolchain)
    assert torch.equal(decode(latents), good)
    assert toolchain.builds == 1
    assert bytes(data) not in seen
    assert len(seen) == 1


class Unreadable(ExportToolchain):
    """Refuses the first program it is given, whatever it is."""

    error: Exception = KeyError("an archive of another kind")

    def load(self, *arguments: Any) -> Any:
        if self.loads == 0:
            self.loads += 1
            raise FastPathError("load", "not a program") from self.error
        return super().load(*arguments)


def test_entry_that_verifies_but_cannot_be_read_is_rebuilt_once(tmp_path: Path) -> None:
    decoder, latents = TinyDecoder().eval(), torch.randn(LATENTS)
    good = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=ExportToolchain())(latents)
    toolchain = Unreadable()
    decode = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=toolchain)
    assert torch.equal(decode(latents), good)
    assert toolchain.builds == 1
    assert decode.stats().backend == "export"
    assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 1


def test_entry_is_not_blamed_for_memory(tmp_path: Path) -> None:
    decoder, latents = TinyDecoder().eval(), torch.randn(LATENTS)
    VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=ExportToolchain())(latents)
    toolchain = Unreadable()
    toolchain.error = torch.OutOfMemoryError("CUDA out of memory")
    decode = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=toolchain)
    decode(latents)
    assert toolchain.builds == 0
    assert decode.stats().backend == "pytorch"
    assert not (tmp_path / "cache" / "quarantine").exists()


def test_run_raises_three_times_then_it_is_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toolchain = ExportToolchain(fail={"run": RuntimeError("launch failed")})
    decode = assert_pytorch_answers(tmp_path, caplog, toolchain, "run", "launch failed")
    assert toolchain.runs == 4, "one smoke run, three failures, then never again"
    assert decode.stats().failures == {"run": 3}
    assert decode.stats().fallbacks == 3
    assert decode.stats().backend == "pytorch"
    assert "switched off after 3" in decode.stats().reason


def test_one_failed_run_does_not_end_the_program(tmp_path: Path) -> None:
    toolchain = ExportToolchain()
    decode = VideoDecode(TinyDecoder(), batch_size=4, settings=settings(tmp_path), toolchain=toolchain)
    latents = torch.randn(1, 4, 4, 3, 3)
    expected = decode(latents)
    toolchain.fail["run"] = RuntimeError("once")
    torch.testing.assert_close(decode(latents), expected, rtol=2e-2, atol=1e-2)
    toolchain.fail.clear()
    assert torch.equal(decode(latents), expected)
    assert decode.stats().backend == "export"
    assert decode.stats().fallbacks == 1


@pytest.mark.parametrize(
    ("value", "output", "precision", "remedy"),
    [
        (float("nan"), "bf16", "fp16", "set TENSORRT_PRECISION=bf16"),
        (float("inf"), "bf16", "bf16", "start the process again"),  # nothing overflows in bf16 alone
        (float("nan"), "uint8", "bf16", "start the process again"),
        (float("inf"), "uint8", "fp16", "set TENSORRT_PRECISION=bf16"),
    ],
)
def test_non_finite_output_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float, output: str, precision: str, remedy: str
) -> None:
    toolchain = ExportToolchain(precision=precision)

    def damage(frames: torch.Tensor) -> torch.Tensor:
        frames = frames.clone()
        frames[0, 1, 2, 3] = value
        return frames

    toolchain.damage = damage
    decoder, latents = TinyDecoder().bfloat16().eval(), torch.randn(1, 4, 4, 3, 3)
    truth = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path, enabled=False), output=output)(latents)
    decode = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=toolchain, output=output)
    for _ in range(4):
        assert torch.equal(decode(latents), truth)
    assert decode.stats().failures == {"run": 3}
    assert "switched off" in decode.stats().reason
    (said,) = warnings_of(caplog)
    assert f"1 non-finite values where PyTorch gives finite ones; {remedy}" in said


def test_many_non_finite_batches_of_one_decode_into_bytes(tmp_path: Path) -> None:
    """The third strike puts the program aside in the middle; the batches after it are PyTorch's all the same."""
    toolchain = ExportToolchain(precision="fp16")
    toolchain.damage = lambda frames: frames * float("nan")
    decoder, latents = TinyDecoder().bfloat16().eval(), torch.randn(2, 9, 4, 3, 3)
    truth = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path, enabled=False), output="uint8")(latents)
    decode = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=toolchain, output="uint8")
    assert torch.equal(decode(latents), truth)
    assert "switched off" in decode.stats().reason


def test_latents_that_are_nan_are_not_the_programs_fault_in_bytes(tmp_path: Path) -> None:
    decode = VideoDecode(
        TinyDecoder(),
        batch_size=4,
        settings=settings(tmp_path),
        toolchain=ExportToolchain(),
        check="always",
        output="uint8",
    )
    latents = torch.randn(1, 6, 4, 3, 3)
    latents[0, 1] = float("nan")
    assert int(decode(latents)[0, 1].max()) == 0, "black"
    assert decode.stats().fallbacks == 0
    assert decode.stats().backend == "export"


def test_latents_that_are_nan_are_not_the_programs_fault(tmp_path: Path) -> None:
    decode = VideoDecode(
        TinyDecoder(), batch_size=4, settings=settings(tmp_path), toolchain=ExportToolchain(), check="always"
    )
    latents = torch.randn(1, 6, 4, 3, 3)
    latents[0, 1] = float("nan")
    latents[0, 4] = float("inf")
    for _ in range(4):
        finite = decode(latents).isfinite().flatten(2).all(2)[0].tolist()
        assert finite == [True, False, True, True, False, True], "frames do not leak into each other"
    assert decode.stats().fallbacks == 0
    assert decode.stats().backend == "export"


def test_sampled_check_looks_at_the_first_calls_and_then_sometimes(tmp_path: Path) -> None:
    toolchain = ExportToolchain(precision="bf16")
    decode = VideoDecode(TinyDecoder(), batch_size=1, settings=settings(tmp_path), toolchain=toolchain)
    latents = torch.randn(1, 1, 4, 2, 2)
    for _ in range(9):
        decode(latents)
    toolchain.damage = lambda frames: frames * float("nan")
    finite = [bool(decode(latents).isfinite().all()) for _ in range(10, 65)]
    assert finite == [False] * 54 + [True], "the 64th call is looked at"


def test_out_of_memory_in_the_program(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toolchain = ExportToolchain(fail={"run": torch.OutOfMemoryError("CUDA out of memory")})
    decoder, latents = TinyDecoder().eval(), torch.randn(1, 4, 4, 3, 3)
    decode = VideoDecode(decoder, batch_size=4, settings=settings(tmp_path), toolchain=toolchain)
    truth = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path, enabled=False))(latents)
    for _ in range(4):
        torch.testing.assert_close(decode(latents), truth, rtol=2e-2, atol=1e-2)
    (said,) = warnings_of(caplog)
    assert "lower the batch size" in said
    assert "switched off" in decode.stats().reason


class Hungry(TinyDecoder):
    """Runs out of memory above `limit` frames."""

    limit = 2

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(z))
        if len(z) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return super().forward(z)


def test_pytorch_out_of_memory_halves_the_chunk_and_remembers() -> None:
    decoder = Hungry().eval()
    decode = VideoDecode(decoder, batch_size=8)
    latents = torch.randn(1, 16, 4, 3, 3)
    frames = decode(latents)
    sizes = decode._generation.eager.module.sizes  # type: ignore[union-attr]
    assert sizes == [8, 4] + [2] * 8
    reference = TinyDecoder()
    reference.load_state_dict(decoder.state_dict())
    expected = VideoDecode(reference, batch_size=2)(latents)
    assert torch.equal(frames, expected)


def test_not_even_one_frame_fits() -> None:
    decoder = Hungry().eval()
    decoder.limit = 0  # type: ignore[misc]
    with pytest.raises(DecodeMemoryError, match=r"one frame of latents \[4, 3, 3\].*Free memory") as caught:
        VideoDecode(decoder, batch_size=8)(torch.randn(1, 3, 4, 3, 3))
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("step", ["ready", "key_material", "build", "load", "run"])
def test_strict_raises_instead(tmp_path: Path, step: str) -> None:
    toolchain = ExportToolchain(fail={step: RuntimeError("boom")})
    decode = VideoDecode(
        TinyDecoder(), batch_size=4, settings=settings(tmp_path, fallback_on_error=False), toolchain=toolchain
    )
    for _ in range(5):
        with pytest.raises(FastPathError, match="boom"):
            decode(torch.randn(LATENTS))


def test_strict_raises_for_non_finite(tmp_path: Path) -> None:
    toolchain = ExportToolchain()
    toolchain.damage = lambda frames: frames * float("nan")
    decode = VideoDecode(TinyDecoder(), batch_size=4, settings=settings(tmp_path), toolchain=toolchain, strict=True)
    with pytest.raises(FastPathError, match="non-finite"):
        decode(torch.randn(LATENTS))


def test_a_cpu_decoder_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    decode = VideoDecode(TinyDecoder(), batch_size=4, settings=settings(tmp_path))
    with caplog.at_level(logging.INFO, "owl_wms.runtime"):
        for _ in range(3):
            decode(torch.randn(LATENTS))
    assert warnings_of(caplog) == []
    assert [r.getMessage() for r in caplog.records if "no CUDA device" in r.getMessage()] != []
    assert len(caplog.records) == 1, "said once"
    assert "no CUDA device" in decode.stats().reason
    assert decode.stats().failures == {}
    strict = VideoDecode(TinyDecoder(), batch_size=4, settings=settings(tmp_path), strict=True)
    for _ in range(3):
        with pytest.raises(NoDeviceError, match=r"^the decoder is on the CPU, .* no CUDA device \(.*GPU\)$"):
            strict(torch.randn(LATENTS))


@pytest.mark.parametrize(
    ("gpus", "remedy"), [(True, "move the decoder to a GPU"), (False, "run on a machine with an NVIDIA GPU")]
)
def test_the_remedy_is_one_that_this_machine_allows(gpus: bool, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    error = TensorRT().ready(Request(input_shape=(1, 4, 3, 3), device="cpu"))
    assert error is not None
    assert error.remedy == remedy


@pytest.mark.parametrize(("step", "stage"), [("build", "build"), ("load", "load"), ("run", "run")])
def test_strict_says_the_same_at_every_call(tmp_path: Path, step: str, stage: str) -> None:
    toolchain = ExportToolchain(fail={step: FastPathError(stage, "boom", "turn it off")})
    decode = VideoDecode(TinyDecoder(), batch_size=4, settings=settings(tmp_path), toolchain=toolchain, strict=True)
    raised: list[FastPathError] = []
    for _ in range(5):
        with pytest.raises(FastPathError, match="boom") as caught:
            decode(torch.randn(LATENTS))
        raised.append(caught.value)
    assert {error.stage for error in raised} == {stage}
    assert len({error.remedy for error in raised}) == 1
    said = "switched off" if step == "run" else f"{FAILED[stage]}: boom (turn it off)"
    assert said in str(raised[-1]) if step == "run" else str(raised[-1]) == said
    assert len({id(error) for error in raised}) == 5, "one that is kept would hold the tensors of its first traceback"
