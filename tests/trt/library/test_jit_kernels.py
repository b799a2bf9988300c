"""Kernels of TensorRT for RTX travel in the program's file, by a stand-in for the library: no GPU has run this."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from owl_wms.errors import FastPathError
from owl_wms.trt.library import engines, importer, jit_kernels, versions
from owl_wms.trt.run.load import load_program

COMPILED = bytes(range(256)) * 9


class Handle:
    """What `torch.classes.tensorrt.RuntimeCacheHandle` does with a path and bytes."""

    def __init__(self, path: str) -> None:
        self.path, self.given = path, b""

    def deserialize(self, data: torch.Tensor) -> None:
        self.given = bytes(data.numpy())


class Engine:
    def __init__(self) -> None:
        self.settings: list[tuple[int, int, Handle]] = []

    def update_runtime_settings(self, shapes: int, graphs: int, handle: Handle) -> None:
        self.settings.append((shapes, graphs, handle))


class Library:
    """What `torch_tensorrt.runtime.runtime_cache` does with a module and a stream."""

    def __init__(self, compiled: bytes = COMPILED, *, opens: bool = True, closes: bool = True) -> None:
        self.compiled, self.opens, self.closes = compiled, opens, closes
        self.attached = False

    @contextlib.contextmanager
    def runtime_cache(self, program: nn.Module, stream: io.BytesIO) -> Iterator[None]:
        if not self.opens:
            raise RuntimeError("requires at least one TorchTensorRTModule")
        self.attached = True
        yield
        self.attached = False
        if not self.closes:
            raise RuntimeError("cannot be detached")
        stream.write(self.compiled)


def use(monkeypatch: pytest.MonkeyPatch, number: str | None, library: Library | None = None) -> None:
    monkeypatch.setattr(versions, "of_torch", lambda: None if number is None else versions.RELEASES[number])
    monkeypatch.setattr(importer, "submodule", lambda name: {"runtime": library}[name])
    monkeypatch.setattr(torch.classes, "tensorrt", SimpleNamespace(RuntimeCacheHandle=Handle), raising=False)


@pytest.mark.parametrize("number", ["2.13", "2.14"])
def test_what_was_compiled_in_the_block_reaches_every_engine(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    library = Library()
    use(monkeypatch, number, library)
    files: dict[str, str] = {"other": "kept"}
    with jit_kernels.collected(nn.Identity(), files):
        assert library.attached
    assert not library.attached
    assert set(files) == {"other", jit_kernels.FILE}
    engines = [Engine(), Engine()]
    assert jit_kernels.attach([torch.zeros(1), engines[0], "text", engines[1]], files[jit_kernels.FILE]) == 2
    ((shapes, graphs, handle),) = engines[0].settings
    assert (shapes, graphs, handle.path, handle.given) == (0, 0, "", COMPILED)
    assert engines[1].settings == engines[0].settings, "one handle for all"


@pytest.mark.parametrize("number", ["2.11", None])
def test_where_the_library_offers_nothing_it_is_not_asked(monkeypatch: pytest.MonkeyPatch, number: str | None) -> None:
    use(monkeypatch, number)
    monkeypatch.setattr(importer, "submodule", lambda name: pytest.fail("asked"))
    files: dict[str, str] = {}
    with jit_kernels.collected(nn.Identity(), files):
        pass
    assert files == {}
    engine = Engine()
    assert jit_kernels.attach([engine], "text") == 0
    assert engine.settings == []


@pytest.mark.parametrize("library", [Library(b""), Library(opens=False), Library(closes=False)])
def test_a_program_without_them_is_saved_all_the_same(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    use(monkeypatch, "2.14", library)
    files: dict[str, str] = {}
    with jit_kernels.collected(nn.Identity(), files):
        ran = True
    assert ran
    assert files == {}


def test_an_error_of_the_run_stays_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "2.14", Library())
    files: dict[str, str] = {}
    with pytest.raises(FastPathError, match="broken"), jit_kernels.collected(nn.Identity(), files):
        raise FastPathError("run", "broken")
    assert files == {}


@pytest.mark.parametrize("text", ["", "not base64 !", "AAAA"])
def test_kernels_that_cannot_be_read_are_left_out(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    use(monkeypatch, "2.14")
    engine = Engine()
    assert jit_kernels.attach([engine], text) == 0
    assert engine.settings == []


def test_an_engine_that_refuses_them_compiles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "2.14", Library())
    files: dict[str, str] = {}
    with jit_kernels.collected(nn.Identity(), files):
        pass

    def refuse(*_: object) -> None:
        raise RuntimeError("another GPU")

    assert jit_kernels.attach([SimpleNamespace(update_runtime_settings=refuse)], files[jit_kernels.FILE]) == 0


def test_reading_a_program_hands_on_what_its_file_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(jit_kernels, "attach", lambda objects, text: given.append((list(objects), text)))
    z = torch.zeros(1, 3, 2, 2)
    exported = torch.export.export(nn.Conv2d(3, 3, 1).eval(), (z,))
    for files, text in (({jit_kernels.FILE: "kernels"}, "kernels"), ({}, "")):
        buffer = io.BytesIO()
        torch.export.save(exported, buffer, extra_files=files)
        load_program(buffer.getvalue(), "cpu", library=False)
        assert given.pop()[1] == text


def test_the_installed_library_has_what_is_asked_of_it() -> None:
    """Run by `make test-versions`, in the sets that offer it."""
    release = versions.of_torch()
    if release is None or not release.runtime_cache or not engines.attached():
        pytest.skip("Torch-TensorRT 2.13 or newer is not installed")
    files = {jit_kernels.FILE: base64.b64encode(zlib.compress(COMPILED)).decode()}
    engine = Engine()
    assert jit_kernels.attach([engine], files[jit_kernels.FILE]) == 1
    ((_, _, handle),) = engine.settings
    assert (handle.path, handle.has_cache()) == ("", False), "it waits for the engine's first run"
    spec = importlib.util.find_spec("torch_tensorrt")
    assert spec is not None
    (root,) = spec.submodule_search_locations or []
    text = (Path(root) / "runtime" / "_runtime_cache.py").read_text(encoding="utf-8")
    assert "def runtime_cache(" in text
    assert "load_from_stream" in text, "it takes a stream"
