"""Builds in child processes without a GPU: the real worker and the real partitioner, engines executed by PyTorch,
faults injected.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.trt import plans
from owl_wms.trt.build import parent
from owl_wms.trt.build.child import DECODER_NAME, read_decoder
from owl_wms.trt.build.parent import BOOTSTRAP, Build, build_program, explain_exit, write_decoder
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.graph.shapes import fp32_copy
from owl_wms.trt.library import importer
from owl_wms.trt.run.load import load_program
from tests.trt import build_child, decoders


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    importer.forget()  # a child that cannot import is remembered, and one test here has such a child


INSTALLED = importer.installed_flavour()[0] != "none"
converts = pytest.mark.skipif(not INSTALLED, reason="Torch-TensorRT is not installed")
"""For tests whose child converts; beside a torch without Torch-TensorRT there is nothing that could."""
STAND_IN = BOOTSTRAP.replace("owl_wms.trt.build.child", "tests.trt.build_child")


def run(
    tmp_path: Path, family: str, bootstrap: str = STAND_IN, seconds: float = 200, **request: object
) -> tuple[dict, Build, list]:
    decoder, shape = decoders.make(family)
    wanted = Request(input_shape=shape, device="cpu", **request)  # type: ignore[arg-type]
    out = tmp_path / "out"
    out.mkdir()
    write_decoder(decoder, tmp_path / DECODER_NAME)
    events: list[dict] = []
    session = Build(
        directory=tmp_path, request=wanted, graph=Recording.of(decoder, shape).digest(), out_dir=out,
        deadline=time.monotonic() + seconds, bootstrap=bootstrap, progress=events.append,
    )  # fmt: skip
    return session.run(), session, events


@converts
def test_whole_build_on_the_cpu(tmp_path: Path) -> None:
    report, session, events = run(tmp_path, "tiled", precision="auto", plans=("tensorrt", "tensorrt again"))
    assert report["precision"] == "fp16"
    assert {c["plan"] for c in report["candidates"]} == {"tensorrt", "tensorrt again"}
    assert all(c["usable"] and c["latency_ms"] > 0 for c in report["candidates"])
    assert report["latency_ms"] == min(c["latency_ms"] for c in report["candidates"])
    assert report["parity"]["passed"]
    assert report["reload_bit_equal"]
    assert (tmp_path / "out" / "program.pt2").stat().st_size == report["program_bytes"]
    assert session.restarts == 0
    assert [event["stage"] for event in events][:2] == ["import", "decoder"]


def test_without_tensorrt_our_kernels_are_the_program(tmp_path: Path) -> None:
    """The real child: it cannot import Torch-TensorRT here, and `ops` needs none."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, and may have TensorRT")
    report, _, _ = run(tmp_path, "tiled", bootstrap=BOOTSTRAP, precision="bf16")
    assert (report["plan"], report["library"], report["engines"]) == ("ops", False, 0)
    assert report["parity"]["passed"]
    assert report["reload_bit_equal"]
    missing = "import torch_tensorrt failed" if INSTALLED else "Torch-TensorRT is not installed"
    assert missing in report["refused"]["tensorrt"]
    assert [row["plan"] for row in report["candidates"]] == ["ops"]
    alone, of_plan = ["import", "decoder", "reference"], ["lower", "compile", "first run", "parity"]
    after = [f"{stage} ops" for stage in ("save", "reload", "call list")]
    assert list(report["stages"]) == [*alone, *(f"{stage} ops" for stage in of_plan), "timing", *after]
    assert 0 < sum(report["stages"].values()) < 200
    decoder, shape = decoders.make("tiled")
    program = load_program((tmp_path / "out" / "program.pt2").read_bytes(), "cpu", library=False)
    z = torch.randn(shape)
    with torch.no_grad():
        wanted = decoder(z)
        assert (program(z).float() - wanted).norm() < 0.03 * wanted.norm()


def test_a_decoder_without_a_form_of_ours_says_that_tensorrt_is_missing(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, and may have TensorRT")
    net = nn.Conv2d(4, 3, 1).eval()
    request = Request(input_shape=(1, 4, 3, 3), device="cpu")
    missing = "driver" if INSTALLED else "not installed"
    with pytest.raises(FastPathError, match=rf"{missing}.*no fused form of Conv2d") as raised:
        build_program(net, request, tmp_path)
    assert raised.value.stage == "import"


@converts
def test_no_further_plan_is_begun_when_time_is_short_and_one_works(tmp_path: Path) -> None:
    report, _, _ = run(tmp_path, "square", precision="bf16", plans=("tensorrt", "tensorrt again"), timeout_seconds=0.01)
    assert report["plan"] == "tensorrt"
    assert "not tried" in next(c["reason"] for c in report["candidates"] if c["plan"] == "tensorrt again")


@converts
def test_failing_engines_are_isolated_and_named(tmp_path: Path) -> None:
    report, _, events = run(
        tmp_path, "sana", precision="bf16", plans=("tensorrt",), seed=build_child.DEPTHWISE, min_block_size=1
    )
    assert report["kept_modules"] == ["up_blocks.1.0.attn.scales.0.proj_in", "up_blocks.1.0.conv_out.conv_depth"]
    assert "execution context" in report["kept_reason"]
    assert set(report["failed_alone"]) == set(report["kept_modules"])
    assert {where.split("/")[0] for _, where in report["pytorch_operators"]} == set(report["kept_modules"])
    assert report["engines"] >= 2
    assert any(event["stage"] == "attempt failed" for event in events)


@converts
@pytest.mark.slow
def test_a_segfault_costs_an_attempt_not_the_caller(tmp_path: Path) -> None:
    report, session, _ = run(
        tmp_path, "sana", precision="bf16", plans=("tensorrt",), seed=build_child.SEGFAULT, min_block_size=1
    )
    assert session.restarts == 3
    assert "SIGSEGV" in report["kept_reason"]
    assert len(report["kept_modules"]) == 2


RESTARTED = """
import json, os, signal, sys
fd, job = int(sys.argv[3]), json.load(open(sys.argv[2] + "/job.json"))
say = lambda **message: os.write(fd, (json.dumps(message) + chr(10)).encode())
tries = len(job["known"])
if tries < 2:
    say(event="attempt", key=f"build|{tries}")
    os.kill(os.getpid(), signal.SIGSEGV)
say(event="done", report={"known": job["known"]})
"""


def test_a_new_child_knows_what_killed_the_last_ones(tmp_path: Path) -> None:
    report, session, _ = run(tmp_path, "square", bootstrap=RESTARTED)
    assert session.restarts == 2
    assert set(report["known"]) == {"build|0", "build|1"}
    assert all("SIGSEGV" in reason for reason in report["known"].values())


def test_restarts_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(FastPathError, match="SIGSEGV"):
        run(tmp_path, "square", bootstrap=RESTARTED.replace("tries < 2", "True"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV (a segmentation fault)"),
        ("import sys; sys.stderr.write('last words'); sys.exit(3)", "last words"),
        ("raise SystemExit(0)", "no answer"),
    ],
)
def test_a_child_that_dies_early_is_an_error_with_a_reason(tmp_path: Path, code: str, words: str) -> None:
    with pytest.raises(FastPathError) as raised:
        run(tmp_path, "square", bootstrap=code)
    assert raised.value.stage == "build"
    assert words in raised.value.reason


def test_a_child_that_hangs_is_stopped(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(FastPathError, match="did not finish"):
        run(tmp_path, "square", bootstrap="import time; time.sleep(60)", seconds=1.0)
    assert time.monotonic() - begin < 40, "not the minute that the child would sleep"


# Says that it runs, waits for its decoder as the real child does, and says what it found.
WAITING = """
import json, os, sys, pathlib
fd, folder = int(sys.argv[3]), pathlib.Path(sys.argv[2])
say = lambda **message: os.write(fd, (json.dumps(message) + chr(10)).encode())
(folder / "running").write_text(str(os.getpid()))
go = sys.stdin.buffer.read(1)
say(event="stage", stage="decoder", elapsed=0)
tries = len(json.load(open(folder / "job.json"))["known"])
if tries < 1:
    say(event="attempt", key="build|0"); os._exit(9)
say(event="done", report={"decoder": (folder / "decoder.pt").read_text(), "go": go.decode()})
"""


def waiting(tmp_path: Path, **parts: object) -> Build:
    request = Request(input_shape=(1, 3, 2, 2))
    limits = {"deadline": time.monotonic() + 60, "bootstrap": WAITING}
    return Build(directory=tmp_path, request=request, graph="", out_dir=tmp_path, **limits, **parts)  # type: ignore[arg-type]


def until(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)
    return path.read_text()


def test_the_decoder_is_written_while_the_child_starts_and_only_once(tmp_path: Path) -> None:
    done: list[str] = []

    def hand_over() -> None:
        until(tmp_path / "running")  # would wait for ever if the child were started afterwards
        (tmp_path / DECODER_NAME).write_text("weights")
        done.append("handed over")

    session = waiting(tmp_path, hand_over=hand_over, meanwhile=lambda: done.append("meanwhile"))
    assert session.run() == {"decoder": "weights", "go": "g"}
    assert session.restarts == 1
    assert done == ["handed over", "meanwhile"], "once, whatever became of the first child"


def test_what_fails_meanwhile_does_not_fail_the_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / DECODER_NAME).write_text("weights")
    session = waiting(tmp_path, meanwhile=lambda: 1 / 0)
    assert session.run()["decoder"] == "weights"
    assert "beside the build" in caplog.text


def test_a_decoder_that_cannot_be_handed_over_ends_the_child_too(tmp_path: Path) -> None:
    child: list[int] = []

    def hand_over() -> None:
        child.append(int(until(tmp_path / "running")))
        raise FastPathError("export", "cannot be pickled", "")

    with pytest.raises(FastPathError, match="cannot be pickled"):
        waiting(tmp_path, hand_over=hand_over).run()
    with pytest.raises(ProcessLookupError):
        os.kill(child[0], 0)


@converts
def test_the_real_child_builds_nothing_when_its_parent_is_gone(tmp_path: Path) -> None:
    """The stand-in's child, whose standard input ends before the parent said that the decoder is there."""
    request = Request(input_shape=(1, 3, 2, 2), device="cpu")
    job = {"request": request.to_json(), "graph": "", "out_dir": str(tmp_path), "known": {}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-c", STAND_IN, json.dumps(sys.path), str(tmp_path), str(write_fd)]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, pass_fds=(write_fd,), timeout=120, capture_output=True)
    os.close(write_fd)
    said = [json.loads(line) for line in os.read(read_fd, 65536).splitlines()]
    os.close(read_fd)
    assert process.returncode == 0, process.stderr[-500:]
    assert [message["stage"] for message in said] == ["import"]


def test_without_a_driver_the_real_child_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    decoder, shape = decoders.make("square")
    with pytest.raises(FastPathError, match="driver"):
        build_program(decoder, Request(input_shape=shape), tmp_path)


def test_a_class_that_cannot_travel_is_named(tmp_path: Path) -> None:
    class Local(nn.Conv2d):
        pass

    with pytest.raises(FastPathError, match="importable module"):
        build_program(Local(3, 3, 1), Request(input_shape=(1, 3, 2, 2)), tmp_path)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_precision_that_no_plan_offers_is_refused_before_any_process(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent.subprocess, "Popen", lambda *_a, **_k: pytest.fail("a process was started"))
    decoder, shape = decoders.make("square")
    with pytest.raises(FastPathError, match=precision):
        build_program(decoder, Request(input_shape=shape, precision=precision, plans=("tensorrt",)), tmp_path)


def test_an_unknown_plan_lists_the_known_ones(tmp_path: Path) -> None:
    decoder, shape = decoders.make("square")
    with pytest.raises(FastPathError) as raised:
        build_program(decoder, Request(input_shape=shape, plans=("tensor",)), tmp_path)
    assert all(name in raised.value.remedy for name in plans.PLANS)


def test_the_fp32_copy_is_plain_and_separate() -> None:
    decoder = decoders.make("tiled")[0].bfloat16()
    copied = fp32_copy(decoder, "cpu")
    assert {p.dtype for p in copied.parameters()} == {torch.float32}
    assert not any("parametrizations" in name for name, _ in copied.named_parameters())
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("status", "last", "words"),
    [
        (None, None, "did not finish within 5 s"),
        (-11, None, "SIGSEGV"),
        (-9, None, "memory"),
        (-63, None, "signal"),
        (70, {"event": "broken", "reason": "illegal address"}, "illegal address"),
        (1, None, "exit status 1"),
    ],
)
def test_endings_in_words(status: int | None, last: dict | None, words: str) -> None:
    assert words in explain_exit(status, 5.0, last)


@converts
def test_a_class_altered_in_this_process_is_not_built_unaltered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key describes the decoder as this process runs it; the child would import the class anew."""
    decoder, shape = decoders.make("square")
    original = type(decoder).forward
    monkeypatch.setattr(type(decoder), "forward", lambda self, z: original(self, z) * 0.5)
    monkeypatch.setattr(parent, "Build", functools.partial(Build, bootstrap=STAND_IN))
    spec = Request(input_shape=shape, device="cpu", precision="bf16", plans=("tensorrt",))
    with pytest.raises(FastPathError, match="DCAEDecoder") as raised:
        build_program(decoder, spec, tmp_path)
    assert raised.value.stage == "export"
    assert not (tmp_path / "program.pt2").exists()


def test_a_class_of_the_script_that_runs_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build process has another `__main__`, which would say so after it has imported everything."""

    class Mine(nn.Conv2d):
        pass

    monkeypatch.setattr(Mine, "__module__", "__main__")
    with pytest.raises(
        FastPathError, match=r"cannot be compiled: Mine is defined in __main__.*in an importable module"
    ):
        write_decoder(nn.Sequential(Mine(4, 3, 1)), tmp_path / "decoder.pt")
    assert not (tmp_path / "decoder.pt").exists()


def test_a_function_that_the_build_process_lacks_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's class can be imported there, and a hook of the script that runs cannot."""

    def halved(module: nn.Module, given: object, frames: torch.Tensor) -> torch.Tensor:
        return frames / 2

    script = types.ModuleType("script_that_runs")
    script.halved = halved  # type: ignore[attr-defined]
    halved.__module__, halved.__qualname__ = script.__name__, "halved"
    monkeypatch.setitem(sys.modules, script.__name__, script)
    decoder = nn.Conv2d(4, 3, 1)
    decoder.register_forward_hook(halved)
    write_decoder(decoder, tmp_path / DECODER_NAME)
    for module in (types.ModuleType(script.__name__), None):
        monkeypatch.setitem(sys.modules, script.__name__, module)
        with pytest.raises(FastPathError, match="each function that it holds, in an importable module") as caught:
            read_decoder(tmp_path / DECODER_NAME)
        assert caught.value.stage == "export"
        assert "halved" in caught.value.reason or "script_that_runs" in caught.value.reason
