"""Every test of the runtime begins without remembered failures and without the user's TENSORRT_* variables."""

from __future__ import annotations

import pytest
import torch

from owl_wms import env
from owl_wms.runtime.programs import forget_failed_builds


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_failed_builds()
    for variable in (*env.TENSORRT_VARIABLES.values(), "TENSORRT_CACHE_KEY"):
        monkeypatch.delenv(variable, raising=False)
    torch.manual_seed(0)
