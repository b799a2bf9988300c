"""A program's file carries the machine code of our kernels, and reading the file is all it takes to have it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from owl_wms.ops import resize
from owl_wms.ops.common import machine_code, nvrtc
from owl_wms.trt.library import compiler, engines
from owl_wms.trt.run import kernels
from owl_wms.trt.run.load import load_program

KERNEL = resize.kernel_of(torch.bfloat16, pad=4)
Z = torch.zeros(1, 3, 2, 2)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    machine_code.forget()
    monkeypatch.setattr(nvrtc.torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(nvrtc.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(engines, "attached", lambda: True)
    yield
    machine_code.forget()


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(nn.Conv2d(3, 3, 1).eval(), (Z,))


def test_code_of_the_launched_kernels_travels_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_compile", lambda kernel, architecture: b"\x7fELF" + architecture.encode())
    with kernels.collected(Z) as files:
        assert not machine_code.noted(KERNEL), "a launch inside the block is made"
        nvrtc.compile_kernel(KERNEL, "sm_90")
    nvrtc.compile_kernel(resize.kernel_of(torch.float16, pad=4), "sm_90")  # another program's
    assert list(files) == [kernels.FILE]
    buffer = io.BytesIO()
    torch.export.save(exported(), buffer, extra_files=files)
    machine_code.forget()
    program = load_program(buffer.getvalue(), "cpu")
    assert program(Z).shape == (1, 3, 2, 2)
    monkeypatch.setattr(nvrtc, "_compile", lambda kernel, architecture: pytest.fail("it came with the program"))
    assert nvrtc.compile_kernel(KERNEL, "sm_90") == b"\x7fELFsm_90"


def test_a_program_without_our_kernels_carries_nothing() -> None:
    with kernels.collected(Z) as files:
        pass
    assert files == {}
    assert kernels.adopt(files) == 0
    buffer = io.BytesIO()
    torch.export.save(exported(), buffer, extra_files=files)
    assert load_program(buffer.getvalue(), "cpu")(Z).shape == (1, 3, 2, 2)


def test_saving_hands_the_files_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    class TorchTensorRT:
        @staticmethod
        def save(program: Any, path: str, **options: Any) -> None:
            asked.update(options, path=path)

    monkeypatch.setattr(compiler.importer, "require", lambda: TorchTensorRT)
    compiler.save_program(nn.Identity(), tmp_path / "program.pt2", Z, {kernels.FILE: "{}"})  # type: ignore[arg-type]
    assert asked["extra_files"] == {kernels.FILE: "{}"}
    assert asked["retrace"] is True
    assert asked["output_format"] == "exported_program"


def test_whether_our_operators_are_in_a_graph() -> None:
    class Resizing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.owl_wms.resize(x, 3, 4, 4, torch.float32)

    ours = torch.export.export(Resizing(), (torch.zeros(1, 2, 2, 4),))
    assert kernels.calls_ours(ours)
    assert not kernels.calls_ours(exported())


def test_broken_operators_cost_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("no Triton")

    monkeypatch.setattr(kernels.importlib, "import_module", broken)
    assert kernels.adopt({kernels.FILE: "{}"}) == 0
    with kernels.collected(Z) as files:
        pass
    assert files == {}
