"""Every way in which the import of Torch-TensorRT fails ends in a status with reason and remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from owl_wms.errors import FastPathError
from owl_wms.trt.library import importer


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    importer.forget()
    yield
    importer.forget()


@pytest.mark.parametrize(
    ("error", "part_of_remedy"),
    [
        (RuntimeError("Found no NVIDIA driver on your system."), "driver"),
        (ModuleNotFoundError("No module named 'tensorrt_rtx_bindings.plugin'"), "plugin"),
        (ModuleNotFoundError("No module named 'tensorrt_rtx'"), "pip install"),
        (AttributeError("module 'tensorrt' has no attribute 'IAlgorithmSelector'"), "versions"),
        (ImportError("libnvinfer.so.10: cannot open shared object file"), "versions"),
        (Exception("import error when try to import _TensorRTProxyModule"), "pip install"),
        (OSError("undefined symbol"), "pip install"),
        (KeyError(), "pip install"),
    ],
)
def test_any_failure_is_a_status(monkeypatch: pytest.MonkeyPatch, error: Exception, part_of_remedy: str) -> None:
    calls = []

    def fail(_flavour: str) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(importer, "_import", fail)
    monkeypatch.setattr(importer, "installed_flavour", lambda: ("rtx", "torch-tensorrt-rtx 2.11.0"))
    state = importer.status()
    assert not state.available
    assert type(error).__name__ in state.reason
    assert part_of_remedy in state.remedy
    with pytest.raises(FastPathError) as raised:
        importer.require()
    assert raised.value.stage == "import"
    assert raised.value.reason == state.reason
    assert len(calls) == 1, "a failed import is not tried again at every decode"


def test_absent_is_said_without_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "installed_flavour", lambda: ("none", ""))
    monkeypatch.setattr(importer, "_findable", lambda: False)
    monkeypatch.setattr(importer, "_import", lambda _flavour: pytest.fail("tried to import what is not there"))
    state = importer.status()
    assert (state.available, state.flavour) == (False, "none")
    assert "not installed" in state.reason


def test_half_imported_packages_are_taken_back(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    package = tmp_path / "torch_tensorrt"
    package.mkdir()
    (package / "__init__.py").write_text("import torch_tensorrt.part\nraise RuntimeError('no driver')\n")
    (package / "part.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch_tensorrt", raising=False)
        with pytest.raises(RuntimeError, match="no driver"):
            importer._import("standard")
        assert not [name for name in sys.modules if name.split(".")[0] == "torch_tensorrt"]


def test_plugin_is_blocked_only_for_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        importer.importlib, "import_module", lambda name: seen.append(sys.modules.get("tensorrt.plugin", "free"))
    )
    for flavour, wanted in (("standard", "free"), ("rtx", None)):
        monkeypatch.delitem(sys.modules, "tensorrt.plugin", raising=False)
        importer._import(flavour)
        assert seen[-1] is wanted if wanted is None else seen[-1] == wanted
    monkeypatch.delitem(sys.modules, "tensorrt.plugin", raising=False)


def test_package_import_touches_neither_tensorrt_nor_cuda() -> None:
    code = (
        "import json, sys, torch, owl_wms.trt; "
        "print(json.dumps([m for m in sys.modules if 'tensorrt' in m and not m.startswith('owl_wms')] "
        "+ ['cuda'] * torch.cuda.is_initialized()))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(answer.stdout) == []


def test_status_of_this_machine_never_raises() -> None:
    state = importer.status()
    assert state.available or (state.reason and state.remedy)
