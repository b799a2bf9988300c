"""Kernels are found by running a module without them, and compiled before they are needed.

Run: python -m pytest tests/ops/common/test_ahead.py
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from owl_wms.ops.common import nvrtc
from owl_wms.ops.common.ahead import compile_ahead

KERNEL = nvrtc.Kernel("resize", "resize")
Z = torch.zeros(1, 4, 2, 2)


def test_kernels_are_found_without_launching_them(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    ahead: list[Any] = []
    monkeypatch.setattr(nvrtc, "_function", lambda kernel, index: launched.append(kernel))
    monkeypatch.setattr(nvrtc, "compile_ahead", lambda found, index: ahead.append((set(found), index)))

    class OnGPU:
        device = torch.device("cuda", 0)

    def module(_z: Any) -> None:
        KERNEL.launch(torch.device("cuda", 0), grid=1, block=1, arguments=(1,))

    assert compile_ahead(module, OnGPU()) == 1  # type: ignore[arg-type]
    assert (ahead, launched) == ([({KERNEL}, 0)], [])
    other = dataclasses.replace(KERNEL, defines=("OTHER",))
    assert compile_ahead(module, OnGPU(), also=[other, KERNEL]) == 2  # type: ignore[arg-type]
    assert ahead.pop() == ({KERNEL, other}, 0)

    def broken(_z: Any) -> None:
        raise RuntimeError("out of memory")

    assert compile_ahead(broken, OnGPU()) == 0  # type: ignore[arg-type]
    assert compile_ahead(broken, Z) == 0, "nothing runs on the CPU"  # type: ignore[arg-type]
    assert len(ahead) == 1
