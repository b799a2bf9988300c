"""The way to compute a convolution: the fastest of those that run and are right."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms.fused import convolution
from owl_wms.ops.conv3x3 import LIBRARY, LIBRARY_FUSED
from owl_wms.ops.up_residual import shuffle

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


def learned(monkeypatch: pytest.MonkeyPatch, shuffled: int | Exception, beside: int) -> tuple[int, list[bool]]:
    """What is chosen for a learned shortcut, and for every later run of its stage whether it had one.

    `shuffled`: what the convolution takes that adds itself, or what it raises; `beside`: a stage with a shortcut.
    """
    conv, runs, clock = convolution.LearnedShortcut(torch.randn(16, 8, 3, 3), torch.randn(16), torch.float32), [], [0]
    original = convolution.conv3x3_shuffled

    def late(*arguments: Any) -> Tensor:
        if isinstance(shuffled, Exception):
            raise shuffled
        clock[0] += shuffled
        return original(*arguments)

    def run(shortcut: Tensor | None) -> Tensor:
        runs.append(shortcut is not None)
        base = X.new_ones(1, 8, 8, 4)
        if shortcut is None:
            return base
        clock[0] += beside
        return base + shuffle(shortcut, 4)

    def times(ways: dict[str, Any], x: Tensor, **_: Any) -> dict[str, int]:
        found = {}
        for name, way in ways.items():
            clock[0] = 0
            way(x)
            found[name] = clock[0]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(convolution, "conv3x3_shuffled", late)
        patch.setattr(convolution, "interleaved", times)
        patch.setattr(convolution.LearnedShortcut, "ways", lambda *_: [LIBRARY, convolution.SHUFFLED])
        conv.choices = {}
        got = conv.join(X, run)
        conv.choices = None
    torch.testing.assert_close(got, run(conv.compute(LIBRARY, X, None)))
    runs.clear()
    torch.testing.assert_close(conv.join(X, run), got)
    return conv.how, runs


def test_a_learned_shortcut_adds_itself_where_that_and_the_stage_are_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert learned(monkeypatch, shuffled=1, beside=3) == (convolution.SHUFFLED, [False])
    assert learned(monkeypatch, shuffled=3, beside=1) == (LIBRARY, [True])
    assert learned(monkeypatch, shuffled=RuntimeError("no such kernel"), beside=1) == (LIBRARY, [True])


def test_the_library_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_among(monkeypatch, {LIBRARY: 0.0, 0: RuntimeError("out of shared memory")}) == LIBRARY
