"""Machine code is made once, also by many threads at once, travels with a program, and never answers for other code."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from owl_wms.ops import resize
from owl_wms.ops.common import machine_code, nvrtc
from owl_wms.ops.common.nvrtc import Kernel, KernelError


@dataclass(frozen=True)
class Text:
    """A kernel whose source is given."""

    entry: str = "f"
    defines: tuple[str, ...] = ()
    text: str = "code"

    def source(self) -> str:
        return self.text


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    machine_code.forget()
    yield
    machine_code.forget()


def test_everything_that_decides_the_code_is_in_its_identity() -> None:
    kernels = [Text(), Text(entry="g"), Text(defines=("A",)), Text(defines=("A", "B")), Text(text="other")]
    names = {machine_code.identity(kernel, architecture) for kernel in kernels for architecture in ("sm_80", "sm_90")}
    assert len(names) == 2 * len(kernels)


def test_made_once_by_many_threads() -> None:
    calls, answers = [], []

    def make() -> bytes:
        calls.append(1)
        time.sleep(0.1)
        return b"code"

    threads = [
        threading.Thread(target=lambda: answers.append(machine_code.once(Text(), "sm_90", make))) for _ in range(8)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert answers == [b"code"] * 8
    assert len(calls) == 1


def test_a_failure_reaches_everyone_who_waits_and_is_not_remembered() -> None:
    started, failures = threading.Event(), []

    def broken() -> bytes:
        started.set()
        time.sleep(0.1)
        raise KernelError("does not compile")

    def ask() -> None:
        try:
            machine_code.once(Text(), "sm_90", broken)
        except KernelError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == ["does not compile"] * 3
    assert machine_code.once(Text(), "sm_90", lambda: b"code") == b"code"


def test_ahead_swallows_failures_and_the_asker_waits_for_it() -> None:
    running, failed = threading.Event(), threading.Event()

    def slow() -> bytes:
        running.set()
        time.sleep(0.2)
        return b"ahead"

    def broken() -> bytes:
        raise KernelError("no")

    def failing() -> None:
        try:
            machine_code.once(Text("g"), "sm_90", broken)
        finally:
            failed.set()

    machine_code.ahead(
        [
            lambda: machine_code.once(Text(), "sm_90", slow),
            failing,
        ]
    )
    assert running.wait(10)
    assert machine_code.once(Text(), "sm_90", lambda: pytest.fail("made twice")) == b"ahead"
    assert failed.wait(10)  # who asks meanwhile is told of the failure
    assert machine_code.once(Text("g"), "sm_90", lambda: b"made when needed") == b"made when needed"


def test_packed_and_adopted_in_another_process() -> None:
    machine_code.once(Text(), "sm_90", lambda: b"\x7fELF\x00code")
    machine_code.once(Text("g"), "sm_80", lambda: b"other")
    text = machine_code.pack([Text(), Text("never made")], lambda _kernel: "sm_90")
    machine_code.forget()
    assert machine_code.adopt(text) == 1
    assert machine_code.once(Text(), "sm_90", lambda: pytest.fail("it was adopted")) == b"\x7fELF\x00code"
    for other, architecture in ((Text(), "sm_80"), (Text(text="edited"), "sm_90"), (Text("g"), "sm_80")):
        assert machine_code.once(other, architecture, lambda: b"new") == b"new"


def test_adopting_replaces_nothing_and_survives_rubbish() -> None:
    machine_code.once(Text(), "sm_90", lambda: b"mine")
    theirs = json.dumps({machine_code.identity(Text(), "sm_90"): "dGhlaXJz"})
    assert machine_code.adopt(theirs) == 1
    assert machine_code.once(Text(), "sm_90", lambda: b"") == b"mine"
    for rubbish in ("", "[]", "{", '{"a": 1}', '{"a": "*"}', "null"):
        assert machine_code.adopt(rubbish) == 0


def test_watching_is_per_thread_and_can_leave_launches_out(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(nvrtc, "_function", lambda kernel, index: launched.append(kernel))
    kernel = resize.kernel_of(torch.bfloat16, pad=4)
    with machine_code.watched(launch=False) as seen:
        kernel.launch(torch.device("cuda", 0), grid=1, block=1, arguments=())
        other = threading.Thread(target=lambda: seen_elsewhere.append(machine_code.noted(kernel)))
        seen_elsewhere: list[bool] = []
        other.start()
        other.join()
        with machine_code.watched() as inner:
            assert not machine_code.noted(kernel)
        assert inner == {kernel}
    assert (seen, seen_elsewhere, launched) == ({kernel}, [False], [])
    assert not machine_code.noted(kernel)


def test_nvrtc_compiles_a_variant_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(nvrtc, "_compile", lambda kernel, architecture: calls.append(kernel) or b"code")
    monkeypatch.setattr(nvrtc.torch.cuda, "get_device_capability", lambda index: (9, 0))
    kernels = [resize.kernel_of(dtype, pad=4) for dtype in (torch.bfloat16, torch.float16)]
    nvrtc.compile_ahead([*kernels, *kernels], 0)
    assert [nvrtc.compile_kernel(kernel, "sm_90") for kernel in kernels] == [b"code"] * 2
    deadline = time.monotonic() + 10
    while len(calls) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(map(repr, calls)) == sorted(map(repr, kernels))
    assert isinstance(kernels[0], Kernel)
