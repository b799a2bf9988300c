"""Threads that obtain programs: who waits for whom, who must not; nothing is built twice or under a wrong key."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from owl_wms import trt
from owl_wms.cache import entry, locks, store
from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.runtime import TensorRT, VideoDecode, programs, turns
from owl_wms.vae import fold_weight_norm
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings

SECONDS = 30


class Slow(ExportToolchain):
    """Builds when it is allowed to, and watches that nothing overlaps that must not.

    Attributes:
        go: builds wait for it.
        building: set while one waits.
        keyed: receives the width of every request once its key has read the weights.
        overlaps: what ran beside what it must not run beside.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.go, self.building = threading.Event(), threading.Event()
        self.keyed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.overlaps: list[str] = []
        self.running: dict[str, int] = {"trace": 0, "build": 0}

    @contextlib.contextmanager
    def alone(self, kind: str):  # type: ignore[no-untyped-def]
        with self.guard:
            self.running[kind] += 1
            if self.running[kind] > 1:
                self.overlaps.append(kind)
        try:
            yield
        finally:
            with self.guard:
                self.running[kind] -= 1

    def key_material(self, decoder: nn.Module, request: Request) -> dict[str, Any]:
        with self.alone("trace"):
            time.sleep(0.002)
            material = super().key_material(decoder, request)
        self.keyed.put(request.input_shape[-1])
        return material

    def build(self, *arguments: Any) -> dict[str, Any]:
        with self.alone("build"):
            self.building.set()
            assert self.go.wait(SECONDS)
            return super().build(*arguments)

    def load(self, data: bytes, request: Request, report: Mapping[str, Any]) -> Any:
        with self.alone("trace"):
            return super().load(data, request, report)


def decoding(folder: Path, toolchain: Any, decoder: nn.Module | None = None, **changes: Any) -> VideoDecode:
    decoder = TinyDecoder().eval() if decoder is None else decoder
    return VideoDecode(decoder, batch_size=2, settings=settings(folder, **changes), toolchain=toolchain)


def begin(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def ended(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a thread hangs"


def test_a_cached_program_does_not_wait_for_another_shapes_build(tmp_path: Path) -> None:
    decoder, toolchain = TinyDecoder().eval(), Slow()
    toolchain.go.set()
    decoding(tmp_path, toolchain, decoder).prepare((4, 3, 3))
    toolchain.go.clear()
    toolchain.building.clear()
    decode = decoding(tmp_path, toolchain, decoder)
    building = begin(lambda: decode.prepare((4, 5, 5)))
    assert toolchain.building.wait(SECONDS)
    assert decode.prepare((4, 3, 3)).hits == 1, "found, loaded and run while the other shape is being built"
    assert decode(torch.randn(1, 2, 4, 3, 3)).shape == (1, 2, 3, 6, 6)
    assert building.is_alive()
    toolchain.go.set()
    ended(building)
    assert (decode.stats().builds, toolchain.builds, toolchain.overlaps) == (1, 2, [])


@pytest.mark.parametrize("use_cache", [True, False])
def test_builds_of_different_shapes_go_one_after_the_other(tmp_path: Path, use_cache: bool) -> None:
    toolchain = Slow()
    decode = decoding(tmp_path, toolchain, use_cache=use_cache)
    threads = [begin(lambda size=size: decode.prepare((4, size, size))) for size in (3, 4, 5)]
    assert toolchain.building.wait(SECONDS)
    time.sleep(0.2)
    toolchain.go.set()
    ended(*threads)
    assert (decode.stats().builds, toolchain.builds, toolchain.overlaps) == (3, 3, [])


def test_the_same_key_is_built_once_even_where_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def unlocked(*_args: Any):  # type: ignore[no-untyped-def]
        yield locks.Flight(held=False, reason="no locks here")

    monkeypatch.setattr(store.locks, "single_flight", unlocked)
    decoder, toolchain = TinyDecoder().eval(), Slow()
    functions = [decoding(tmp_path, toolchain, decoder) for _ in range(5)]
    threads = [begin(lambda f=f: f.prepare((4, 3, 3))) for f in functions]
    assert toolchain.building.wait(SECONDS)
    time.sleep(0.2)
    toolchain.go.set()
    ended(*threads)
    assert toolchain.builds == 1
    assert sorted(f.stats().hits for f in functions) == [0, 1, 1, 1, 1]
    assert toolchain.overlaps == []


def test_who_waited_for_a_build_that_failed_does_not_try_again(tmp_path: Path) -> None:
    decoder, toolchain = TinyDecoder().eval(), Slow(fail={"build": RuntimeError("no tactic")})
    functions = [decoding(tmp_path, toolchain, decoder) for _ in range(4)]
    threads = [begin(lambda f=f: f.prepare((4, 3, 3))) for f in functions]
    assert toolchain.building.wait(SECONDS)
    time.sleep(0.2)
    toolchain.go.set()
    ended(*threads)
    assert toolchain.builds == 1
    assert all("no tactic" in f.stats().reason for f in functions)


def test_a_decoder_that_changed_while_it_waited_is_not_filed_under_its_old_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "STALE_SECONDS", 0.0)
    decoder, toolchain = fold_weight_norm(TinyDecoder()).eval(), Slow()  # folded already, so its tensors are shared
    decode = decoding(tmp_path, toolchain, decoder)
    first = begin(lambda: decode.prepare((4, 3, 3)))
    assert toolchain.building.wait(SECONDS)
    second = begin(lambda: decode.prepare((4, 5, 5)))
    while toolchain.keyed.get(timeout=SECONDS) != 5:  # its key is computed, and it waits for the first one's build
        pass
    with torch.no_grad():
        decoder.conv_out.bias.data.add_(1.0)  # type: ignore[union-attr, operator]  # shows in no version counter
    toolchain.go.set()
    ended(first, second)
    assert toolchain.builds == 1
    assert "changed while it waited" in next(p["reason"] for p in decode.stats().programs if p["shape"][-1] == 5)
    again = decoding(tmp_path, toolchain, decoder)
    assert again.prepare((4, 5, 5)).builds == 1, "nothing is remembered against the new weights"
    with torch.no_grad():
        decoder.conv_out.bias.data.sub_(1.0)  # type: ignore[union-attr, operator]
    back = decoding(tmp_path, toolchain, decoder)
    assert back.prepare((4, 5, 5)).builds == 1, "nor against the old ones"


def test_an_entry_that_cannot_be_read_is_put_aside_once_by_many_threads(tmp_path: Path) -> None:
    decoder = TinyDecoder().eval()

    class Unreadable(ExportToolchain):
        def build(self, *arguments: Any) -> dict[str, Any]:
            report = super().build(*arguments)
            if self.builds == 1:
                (arguments[3] / "program.pt2").write_bytes(b"verifies, and is no program")
            return report

    toolchain = Unreadable()
    decoding(tmp_path, toolchain, decoder).prepare((4, 3, 3))  # built, published, and its own load fails
    programs.forget_failed_builds()
    functions = [decoding(tmp_path, toolchain, decoder) for _ in range(6)]
    ended(*[begin(lambda f=f: f.prepare((4, 3, 3))) for f in functions])
    assert {f.stats().backend for f in functions} == {"export"}
    assert toolchain.builds == 2
    assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 1


def test_many_threads_many_shapes_no_circle(tmp_path: Path) -> None:
    decoder, toolchain = TinyDecoder().eval(), Slow()
    toolchain.go.set()
    functions = [decoding(tmp_path, toolchain, decoder) for _ in range(3)]

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(6):
            draw.choice(functions).prepare((4, draw.randint(2, 4), 3))

    ended(*[begin(lambda seed=seed: work(seed)) for seed in range(8)])
    assert toolchain.builds == 3, "one a shape, for all functions and threads"
    assert toolchain.overlaps == []
    assert {f.stats().backend for f in functions} == {"export"}


def test_a_forked_child_gets_new_locks() -> None:
    held = threading.Event()
    release = threading.Event()

    def hold() -> None:
        with turns.tracing(), turns.building(), turns.one_of(("t", "k")):
            held.set()
            release.wait(SECONDS)

    thread = begin(hold)
    assert held.wait(SECONDS)
    turns.renew()
    done = threading.Event()

    def enter() -> None:
        with turns.one_of(("t", "k")), turns.building(), turns.tracing(), turns.tracing():
            done.set()

    ended(begin(enter))
    assert done.is_set()
    release.set()
    ended(thread)


def test_a_key_nobody_holds_is_forgotten() -> None:
    with turns.one_of(("t", "k")):
        assert ("t", "k") in turns._keys
    assert ("t", "k") not in turns._keys


def test_imports_go_beside_the_reading_of_a_large_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, toolchain = TinyDecoder().eval(), ExportToolchain()
    decoding(tmp_path, toolchain, decoder).prepare((4, 3, 3))
    prepared = threading.Event()
    toolchain.prepare = prepared.set  # type: ignore[method-assign]
    read = entry._read_program

    def reading(*arguments: Any) -> bytes:
        assert prepared.wait(SECONDS), "the caller's thread waits for the reading"
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(entry, "_read_program", reading)
        assert decoding(tmp_path, toolchain, decoder).prepare((4, 3, 3)).hits == 1
    prepared.clear()
    assert decoding(tmp_path, toolchain, decoder).prepare((4, 5, 5)).builds == 1
    assert not prepared.is_set(), "what is not there is built at once"


def test_the_real_toolchain_prepares_to_read_beside_its_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []

    def build(*_arguments: Any, meanwhile: Callable[[], None], **_options: Any) -> dict[str, Any]:
        meanwhile()
        raise FastPathError("build", "enough", "")

    def prepare() -> None:
        other = begin(lambda: said.append("alone" if not turns._tracing.acquire(blocking=False) else "not alone"))
        ended(other)

    monkeypatch.setattr(trt, "build_program", build)
    monkeypatch.setattr(trt, "prepare_to_load", prepare)
    monkeypatch.setattr(trt, "key_material", lambda *_: {"graph": "0"})
    monkeypatch.setattr(TensorRT, "ready", lambda *_: None)
    with pytest.raises(FastPathError, match="enough"):
        TensorRT().obtain(TinyDecoder(), Request(input_shape=(1, 4, 2, 2)), settings(tmp_path), None)
    assert said == ["alone"]
