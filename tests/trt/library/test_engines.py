"""Programs are read with Torch-TensorRT's library alone, and with the whole package where that is not enough."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from owl_wms.cache import Key
from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.runtime.toolchain import Jit, TensorRT
from owl_wms.trt.build import parent
from owl_wms.trt.build.parent import build_program
from owl_wms.trt.library import engines, importer
from owl_wms.trt.run.load import load_program

ABSENT = importer.TensorRTStatus(available=False, flavour="rtx", version="", reason="broken", remedy="mend it")
ON_GPU = Request(input_shape=(1, 3, 2, 2), plans=("tensorrt",))
PRESENT = importer.TensorRTStatus(available=True, flavour="rtx", version="1")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    importer.forget()
    engines.forget()
    yield
    importer.forget()
    engines.forget()


def program() -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(nn.Conv2d(3, 3, 1).eval(), (torch.zeros(1, 3, 2, 2),)), buffer)
    return buffer.getvalue()


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.skipif(importer.installed_flavour()[0] == "none", reason="Torch-TensorRT is not installed")
def test_the_real_library_registers_engines_without_the_package() -> None:
    code = (
        "import sys, torch; from owl_wms.trt.library import engines; state = engines.status()\n"
        "print(state.available, state.flavour, 'torch_tensorrt' in sys.modules, 'torch._dynamo' in sys.modules)\n"
        "print(torch.ops.tensorrt.execute_engine.default._schema.name, torch.classes.tensorrt.Engine is not None)"
    )
    said = run(code)
    assert said == [f"True {importer.installed_flavour()[0]} False False", "tensorrt::execute_engine True"]


@pytest.mark.skipif(importer.installed_flavour()[0] == "none", reason="Torch-TensorRT is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without a GPU")
def test_the_whole_package_can_be_imported_after_the_library_and_the_other_way_round() -> None:
    stand_in = "from tests.trt import cuda_stand_in; cuda_stand_in.install()\n"
    library = "from owl_wms.trt.library import engines; assert engines.attached()\n"
    converts = (
        "import torch; from owl_wms.trt.library import compiler; from owl_wms.trt.graph.export import export_decoder\n"
        "z = torch.zeros(1, 3, 8, 8); m = torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 1) for _ in range(6)])\n"
        "settings = {'dryrun': True, 'min_block_size': 1, 'immutable_weights': True}\n"
        "print(compiler.compile_exported(export_decoder(m, z), z, settings)[1].engines)"
    )
    for order in (library + stand_in, stand_in + library):
        assert run(order + converts)[-1] == "1"


def test_reading_needs_no_package_where_the_library_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "attached", lambda: True)
    monkeypatch.setattr(importer, "_attempt", lambda: pytest.fail("the package was imported"))
    loaded = load_program(program(), "cpu")
    assert loaded(torch.zeros(1, 3, 2, 2)).shape == (1, 3, 2, 2)


def reader(fails: int, error: BaseException) -> tuple[Callable[[], str], list[int]]:
    calls: list[int] = []

    def load() -> str:
        calls.append(1)
        if len(calls) <= fails:
            raise error
        return "program"

    return load, calls


def test_what_the_library_cannot_read_is_read_again_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "attached", lambda: True)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(importer, "_attempt", lambda: (PRESENT, ModuleType("torch_tensorrt")))
    load, calls = reader(1, RuntimeError("no such operator"))
    assert engines.reading(load) == "program"
    assert len(calls) == 2
    load, calls = reader(2, RuntimeError("damaged"))
    with pytest.raises(RuntimeError, match="damaged"):
        engines.reading(load)
    assert len(calls) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError("full")])
def test_memory_that_ran_out_is_no_reason_to_import(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(engines, "attached", lambda: True)
    monkeypatch.setattr(importer, "_attempt", lambda: pytest.fail("the package was imported"))
    load, calls = reader(1, error)
    with pytest.raises(type(error)):
        engines.reading(load)
    assert len(calls) == 1


def test_a_broken_package_leaves_the_first_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "attached", lambda: True)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(importer, "_attempt", lambda: (ABSENT, None))
    load, calls = reader(1, RuntimeError("no such operator"))
    with pytest.raises(RuntimeError, match="no such operator"):
        engines.reading(load)
    assert len(calls) == 1


@pytest.mark.parametrize("error", [OSError("undefined symbol"), ImportError("libs"), RuntimeError("cuda"), KeyError()])
def test_a_library_that_cannot_be_loaded_means_the_package(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    calls = []

    def broken(_flavour: str) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(engines, "_load_library", broken)
    monkeypatch.setattr(importer, "installed_flavour", lambda: ("rtx", "torch-tensorrt-rtx 2"))
    release = engines.versions.of_torch() or engines.versions.RELEASES["2.11"]
    monkeypatch.setattr(engines.versions, "of_torch", lambda: release)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(importer, "_attempt", lambda: (ABSENT, None))
    assert engines.status() == ABSENT
    assert engines.status().reason == "broken"
    assert len(calls) == 1, "once is enough"
    with pytest.raises(FastPathError) as raised:
        load_program(b"", "cpu")
    assert raised.value.stage == "import"


def test_a_library_that_registers_nothing_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "_load_library", lambda _flavour: None)
    monkeypatch.setattr(importer, "installed_flavour", lambda: ("rtx", "torch-tensorrt-rtx 2"))
    release = engines.versions.of_torch() or engines.versions.RELEASES["2.11"]
    monkeypatch.setattr(engines.versions, "of_torch", lambda: release)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(engines.torch, "classes", ModuleType("classes"))
    assert not engines.attached()


def test_without_torch_tensorrt_the_answer_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "installed_flavour", lambda: ("none", ""))
    monkeypatch.setattr(importer, "_findable", lambda: False)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setattr(engines, "_load_library", lambda _flavour: pytest.fail("looked for what is not there"))
    assert engines.status() == importer.status()
    unready = TensorRT().ready(ON_GPU)
    assert unready is not None
    assert (unready.stage, unready.reason) == ("import", "Torch-TensorRT is not installed")
    assert TensorRT().ready(Request(input_shape=(1, 3, 2, 2))) is None, "a plan of ours may do"


def test_a_program_without_engines_loads_without_torch_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "attached", lambda: False)
    monkeypatch.setattr(importer, "_attempt", lambda: (ABSENT, None))
    assert load_program(program(), "cpu")(torch.zeros(1, 3, 2, 2)).shape == (1, 3, 2, 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), FastPathError("parity", "other frames", "report")])
def test_an_error_that_torch_tensorrt_would_not_mend_is_not_blamed_on_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(engines, "attached", lambda: False)
    monkeypatch.setattr(importer, "_attempt", lambda: (ABSENT, None))
    with pytest.raises(type(error)) as raised:
        engines.reading(reader(1, error)[0])
    assert raised.value is error


def test_the_jit_form_asks_for_the_whole_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "attached", lambda: True)
    monkeypatch.setattr(importer, "_attempt", lambda: (ABSENT, None))
    assert TensorRT().ready(ON_GPU) is None
    unready = Jit().ready(ON_GPU)
    assert unready is not None
    assert unready.reason == "broken"
    assert type(Jit().ready(dataclasses.replace(ON_GPU, device="cpu"))).__name__ == "NoDeviceError"


def test_a_package_that_a_building_process_could_not_import_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    starts = []

    def answer(session: parent.Build) -> dict:
        starts.append(session)
        return {"event": "failed", "stage": "import", "reason": "no driver", "remedy": "install one"}

    monkeypatch.setattr(parent.Build, "_one_child", answer)
    request = Request(input_shape=(1, 3, 2, 2), plans=("tensorrt",))
    for decoder in (nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3)):
        with pytest.raises(FastPathError, match="no driver") as raised:
            TensorRT().build(decoder, request, Key.of({"graph": "0"}), tmp_path, None, lambda: None)
        assert raised.value.stage == "import"
    assert len(starts) == 1
    importer.forget()
    with pytest.raises(FastPathError, match="no driver"):
        build_program(nn.Conv2d(3, 3, 1), Request(input_shape=(1, 3, 2, 2)), tmp_path)
    assert len(starts) == 2
