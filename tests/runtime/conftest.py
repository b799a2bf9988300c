"""Every test of the runtime begins without remembered failures and without the user's TENSORRT_* variables."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from owl_wms import env
from owl_wms.runtime.programs import forget_failed_builds


@pytest.fixture(scope="session", autouse=True)
def fake_tensors_from_the_main_thread() -> None:
    """Make the process's first fake tensors in a thread that does not end: else some tests crash when run alone.

    Without a GPU, torch 2.11 puts a stand-in for CUDA's device guard into a process-wide table when a thread makes fake
    tensors, as torch.export does when it traces and when it loads. The stand-in belongs to that thread and goes with
    it, the table keeps pointing there, and the next thread that makes fake tensors jumps into freed memory
    (ensureCUDADeviceGuardSet; pytorch pull request 178950 gives it the life of the process). With a GPU there is no
    stand-in. The product makes no fake tensors without one: a decoder on the CPU is refused before that. The
    toolchains of these tests do, and in threads.
    """
    with FakeTensorMode():
        torch.empty(1)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_failed_builds()
    for variable in (*env.TENSORRT_VARIABLES.values(), "TENSORRT_CACHE_KEY"):
        monkeypatch.delenv(variable, raising=False)
    torch.manual_seed(0)
