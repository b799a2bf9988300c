"""`TENSORRT_BUILD=background`: PyTorch decodes while a program is built, which then takes over between two calls.

Run: python -m pytest tests/runtime/test_background.py
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from owl_wms import ending
from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.runtime import Jit, StreamDecode, VideoDecode
from owl_wms.runtime.decoding import Decoding
from owl_wms.runtime.programs import MISSED, Loaded, forget_failed_builds
from owl_wms.settings import TensorRTConfig
from tests.runtime.test_streaming import DECODER, Programs, clip, near
from tests.runtime.test_turns import SECONDS, Slow
from tests.runtime.toolchains import TinyDecoder, settings

Z = torch.linspace(-1, 1, 5 * 4 * 3 * 3).reshape(1, 5, 4, 3, 3)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget_failed_builds()


def marked(**options: Any) -> Slow:
    """A toolchain whose programs can be told from PyTorch: their frames are larger by one."""
    toolchain = Slow(**options)
    toolchain.damage = lambda frames: frames + 1
    return toolchain


def decoding(folder: Path, toolchain: Slow, **options: Any) -> VideoDecode:
    torch.manual_seed(3)
    decoder = TinyDecoder().eval()
    background = settings(folder, build="background")
    return VideoDecode(decoder, batch_size=2, settings=background, toolchain=toolchain, check="off", **options)


def by_program(decode: VideoDecode, frames: Tensor) -> list[bool]:
    """Which of the frames a program made; each is either PyTorch's or larger by one."""
    with torch.no_grad():
        wanted = decode.decoder(Z[0])
    apart = (frames[0].float() - wanted).mean(dim=(1, 2, 3))
    assert all(abs(distance - round(distance)) < 0.02 for distance in apart.tolist()), apart
    return [round(distance) == 1 for distance in apart.tolist()]


def searched(decode: VideoDecode) -> None:
    """Waits for the search that a call began."""
    assert decode._generation is not None
    for slot in decode._generation.slots():
        assert slot.search is not None
        slot.search.join(SECONDS)
        assert not slot.search.is_alive()


def test_pytorch_decodes_until_the_program_takes_over(tmp_path: Path) -> None:
    toolchain = marked()
    decode = decoding(tmp_path, toolchain)
    assert by_program(decode, decode(Z)) == [False] * 5
    assert toolchain.building.wait(SECONDS)
    assert by_program(decode, decode(Z)) == [False] * 5, "other calls do not wait either"
    stats = decode.stats()
    assert (stats.backend, stats.builds, stats.failures) == ("pytorch", 0, {})
    assert stats.reason.startswith("building (PyTorch meanwhile) for ")
    assert stats.programs[0]["state"] == "building"
    toolchain.go.set()
    stats = decode.prepare((4, 3, 3))
    assert (stats.backend, stats.builds) == ("export", 1), "prepare waits for what was begun"
    assert by_program(decode, decode(Z)) == [True] * 5
    assert stats.reason.startswith("built program ")
    assert toolchain.builds == 1


def test_prepare_waits_without_a_call_before_it(tmp_path: Path) -> None:
    toolchain = marked()
    toolchain.go.set()
    assert decoding(tmp_path, toolchain).prepare((4, 3, 3)).builds == 1


def test_a_call_does_not_wait_for_what_another_thread_prepares(tmp_path: Path) -> None:
    toolchain = marked()
    decode = decoding(tmp_path, toolchain)
    preparing = threading.Thread(target=lambda: decode.prepare((4, 3, 3)))
    preparing.start()
    assert toolchain.building.wait(SECONDS)
    assert by_program(decode, decode(Z)) == [False] * 5
    assert preparing.is_alive()
    toolchain.go.set()
    preparing.join(SECONDS)
    assert by_program(decode, decode(Z)) == [True] * 5


def test_prepare_waits_for_a_search_whose_thread_is_just_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolchain, begin, threads = marked(), ending.begin, list[threading.Thread]()
    decode, builds = decoding(tmp_path, toolchain), list[int]()

    def starting(work: Any, *, name: str) -> threading.Thread:
        threads.append(threading.Thread(target=lambda: builds.append(decode.prepare((4, 3, 3)).builds)))
        threads[0].start()
        threads[0].join(0.05)
        return begin(work, name=name)

    monkeypatch.setattr(ending, "begin", starting)
    decode(Z)
    toolchain.go.set()
    threads[0].join(SECONDS)
    assert builds == [1]


@pytest.mark.parametrize("strict", [False, True])
def test_without_a_thread_to_build_in_pytorch_decodes(
    tmp_path: Path, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> threading.Thread:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ending, "begin", refused)
    decode = decoding(tmp_path, marked(), strict=strict)
    if strict:
        with pytest.raises(FastPathError, match="can't start new thread"):
            decode(Z)
        return
    for _ in range(2):
        assert by_program(decode, decode(Z)) == [False] * 5
    assert "can't start new thread" in decode.prepare((4, 3, 3)).reason


def test_a_call_is_answered_by_one_of_them_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain = marked()
    decode = decoding(tmp_path, toolchain)
    batches: list[int] = []
    one = Decoding.decode

    def then_ready(self: Decoding, chunk: Tensor, start: int, *, by_program: bool) -> Any:
        batches.append(start)
        if start == 2:  # the program is there from the middle of this call on
            toolchain.go.set()
            searched(decode)
        return one(self, chunk, start, by_program=by_program)

    with monkeypatch.context() as patched:
        patched.setattr(Decoding, "decode", then_ready)
        assert by_program(decode, decode(Z)) == [False] * 5
    assert batches == [0, 2, 4]
    assert by_program(decode, decode(Z)) == [True] * 5


def test_a_program_in_the_cache_answers_the_first_call(tmp_path: Path) -> None:
    toolchain = marked()
    toolchain.go.set()
    decoding(tmp_path, toolchain).prepare((4, 3, 3))
    again = decoding(tmp_path, toolchain)
    assert by_program(again, again(Z)) == [True] * 5
    assert again.stats().hits == 1


def test_a_second_function_does_not_wait_for_the_build_of_the_first(tmp_path: Path) -> None:
    toolchain = marked()
    first, second = decoding(tmp_path, toolchain), decoding(tmp_path, toolchain)
    for decode in (first, second):
        assert by_program(decode, decode(Z)) == [False] * 5
    toolchain.go.set()
    for decode in (first, second):
        searched(decode)
        assert by_program(decode, decode(Z)) == [True] * 5
    assert (toolchain.builds, first.stats().builds + second.stats().builds, toolchain.overlaps) == (1, 1, [])


@pytest.mark.parametrize("error", [RuntimeError("no tactic"), FastPathError("parity", "too far", "")])
def test_a_build_that_fails_leaves_pytorch_for_good(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    toolchain = marked(fail={"build": error})
    decode = decoding(tmp_path, toolchain)
    toolchain.go.set()
    with caplog.at_level(logging.WARNING, "owl_wms"):
        decode(Z)
        searched(decode)
        assert by_program(decode, decode(Z)) == [False] * 5
        decode.prepare((4, 3, 3))
    assert len(caplog.records) == 1
    assert (decode.stats().backend, toolchain.builds) == ("pytorch", 1)
    assert sum(decode.stats().failures.values()) == 1


def test_a_strict_caller_is_told_at_the_next_call(tmp_path: Path) -> None:
    toolchain = marked(fail={"build": RuntimeError("no tactic")})
    decode = decoding(tmp_path, toolchain, strict=True)
    assert by_program(decode, decode(Z)) == [False] * 5
    toolchain.go.set()
    searched(decode)
    with pytest.raises(FastPathError, match="no tactic"):
        decode(Z)


def test_new_weights_do_not_get_the_program_of_the_old_ones(tmp_path: Path) -> None:
    toolchain = marked()
    decode = decoding(tmp_path, toolchain)
    decode(Z)
    assert toolchain.building.wait(SECONDS)
    old = decode._generation
    with torch.no_grad():
        decode.decoder.conv_out.bias.add_(0.25)  # type: ignore[union-attr, operator]
    assert by_program(decode, decode(Z)) == [False] * 5
    toolchain.go.set()
    searched(decode)
    assert by_program(decode, decode(Z)) == [True] * 5
    assert decode._generation is not old


class LaterPrograms(Programs):
    """Builds the program of a step when it is allowed to."""

    background = True
    go = threading.Event()

    def obtain(self, decoder: nn.Module, request: Request, settings: TensorRTConfig, progress: Any) -> Loaded:
        progress({"stage": MISSED})
        assert self.go.wait(SECONDS)
        return super().obtain(decoder, request, settings, progress)


def test_a_stream_goes_on_by_the_program_from_one_step_to_the_next() -> None:
    programs, latents = LaterPrograms(), clip(4, streams=2)
    stream = StreamDecode(DECODER, settings=TensorRTConfig(build="background"), toolchain=programs)
    begun = stream.step(latents[:, :2])
    assert stream.stats().reason.startswith("building (PyTorch meanwhile)")
    programs.go.set()
    assert stream.prepare(tuple(latents.shape[2:]), streams=2).builds == 1  # type: ignore[arg-type]
    assert near(torch.cat([begun, stream.step(latents[:, 2:])], 1), DECODER(latents))
    assert (stream.stats().chunks_pytorch, stream.stats().chunks_program) == (2, 2)


def test_what_compiles_in_this_process_is_waited_for() -> None:
    assert not Jit.background
    stream = StreamDecode(DECODER, settings=TensorRTConfig(build="background"), toolchain=Programs())
    stream.step(clip(1))
    assert (stream.stats().builds, stream.stats().chunks_program) == (1, 1)


ENDS_WHILE_IT_BUILDS = """
import functools, sys, time, torch
from pathlib import Path
from owl_wms.runtime import TensorRT, VideoDecode
from owl_wms.settings import TensorRTConfig
from owl_wms.trt.build import parent
from tests.runtime.toolchains import TinyDecoder

folder = Path(sys.argv[1])
stuck = f"import os, time; open({str(folder / 'new')!r}, 'w').write(str(os.getpid()))"
stuck += f"; os.rename({str(folder / 'new')!r}, {str(folder / 'pid')!r}); time.sleep(600)"
parent.Build = functools.partial(parent.Build, bootstrap=stuck)
TensorRT.ready = lambda self, request: None
settings = TensorRTConfig(cache_dir=folder / "cache", build="background")
decode = VideoDecode(TinyDecoder().eval(), batch_size=2, settings=settings)
decode(torch.zeros(1, 2, 4, 3, 3))
while not (folder / "pid").exists():
    time.sleep(0.01)
assert decode.stats().reason.startswith("building"), decode.stats()
"""


def test_a_process_that_ends_leaves_neither_its_build_process_nor_files(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ENDS_WHILE_IT_BUILDS, str(tmp_path)],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert list(temporary.iterdir()) == []
    assert list((tmp_path / "cache" / ".tmp").iterdir()) == []
