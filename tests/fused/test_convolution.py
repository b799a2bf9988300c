"""The way to compute a convolution: the fastest of those that run and are right."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms.fused import convolution
from owl_wms.ops.conv3x3 import LIBRARY, LIBRARY_FUSED

X, WEIGHT = torch.randn(1, 4, 4, 8), torch.randn(16, 3, 3, 8)


def choose_among(monkeypatch: pytest.MonkeyPatch, ways: dict[int, Any]) -> int:
    """`ways`: how -> seconds it takes, what it raises, or what is added to its result."""
    original = convolution.Conv3x3.compute

    def compute(self: convolution.Conv3x3, how: int, x: Tensor, other: Tensor | None) -> Tensor:
        kind = ways[how]
        if isinstance(kind, Exception):
            raise kind
        result = original(self, LIBRARY, x, other)
        if isinstance(kind, Tensor):
            return result + kind
        time.sleep(kind)
        return result

    monkeypatch.setattr(convolution.conv3x3_op, "ways", lambda *_: list(ways))
    monkeypatch.setattr(convolution.Conv3x3, "compute", compute)
    conv = convolution.Conv3x3(WEIGHT.permute(0, 3, 1, 2), None, torch.float32)
    conv.choices = {}
    conv(X)
    assert list(conv.choices.values()) == [conv.how]
    return conv.how


def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_among(monkeypatch, {LIBRARY: 0.03, LIBRARY_FUSED: 0.015, 0: 0.0, 1: 0.02}) == 0


@pytest.mark.parametrize("fault", [RuntimeError("no such kernel"), torch.full((1,), 5.0), torch.full((1,), torch.nan)])
def test_what_fails_or_strays_is_not(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    assert choose_among(monkeypatch, {LIBRARY: 0.03, LIBRARY_FUSED: 0.01, 0: fault}) == LIBRARY_FUSED


def test_the_library_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_among(monkeypatch, {LIBRARY: 0.0, 0: RuntimeError("out of shared memory")}) == LIBRARY
