"""Streams of captured graphs are handed on, one graph at a time; no GPU needed, for the driver's part is left out."""

from __future__ import annotations

import contextlib
import gc
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from owl_wms.ops.common import streams
from owl_wms.ops.common.streams import take_capture_stream, without_collector


class _Owner:
    """Has a captured graph."""

    def __init__(self) -> None:
        own = take_capture_stream()
        self.handle = own.stream.handle
        own.serve(self)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens, in its order: streams made, waits, workspaces looked after."""
    made: list[Any] = []

    def stream(handle: int, device: int) -> SimpleNamespace:
        made.append("stream")
        return SimpleNamespace(handle=handle, device_index=device)

    monkeypatch.setattr(streams, "_free", {})
    monkeypatch.setattr(streams.nvrtc, "new_stream", lambda: made.count("stream"))
    monkeypatch.setattr(torch.cuda, "ExternalStream", stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append("wait"))
    monkeypatch.setattr(streams.CaptureStream, "hold_workspace", lambda _: made.append("workspace"))
    return made


def test_graphs_that_live_at_once_have_streams_of_their_own(made: list[Any]) -> None:
    owners = [_Owner() for _ in range(3)]
    assert [owner.handle for owner in owners] == [0, 1, 2]


def test_the_stream_of_a_graph_that_is_gone_serves_the_next(made: list[Any]) -> None:
    first, second = _Owner(), _Owner()
    del first
    made.clear()
    assert _Owner().handle == 0
    assert made == ["wait", "workspace"]  # a replay of the graph that is gone may still run; somebody may have cleared
    assert _Owner().handle == 0
    assert second.handle == 1


def test_a_stream_on_which_a_capture_failed_serves_nobody(made: list[Any]) -> None:
    take_capture_stream()
    assert _Owner().handle == 1


def test_the_collector_rests_during_a_capture_and_is_as_before_after_it() -> None:
    def capture() -> None:
        with without_collector():
            assert not gc.isenabled()
            raise ValueError("a capture that fails")

    with pytest.raises(ValueError, match="fails"):
        capture()
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled(), "the caller had switched it off"
    finally:
        gc.enable()


def test_the_collector_rests_until_the_last_of_two_captures_is_over() -> None:
    first, second = without_collector(), without_collector()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_collector_runs_in_a_child_forked_during_a_capture() -> None:
    with without_collector():
        child = os.fork()
        if not child:
            os._exit(int(gc.isenabled()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert not gc.isenabled()
    assert gc.isenabled()


def test_where_products_are_refused_there_is_no_workspace_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    own = streams.CaptureStream.__new__(streams.CaptureStream)
    own.stream, own._keeper = SimpleNamespace(device="cpu"), None  # type: ignore[assignment]

    def refuse(factors: list[torch.Tensor]) -> None:
        raise RuntimeError("deterministic behavior was enabled, and CUBLAS_WORKSPACE_CONFIG is not set")

    monkeypatch.setattr(streams, "warm_stream", lambda: None)
    monkeypatch.setattr(streams, "_multiply", refuse)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.delattr(torch.cuda, "CUDAGraph")
    with pytest.raises(RuntimeError, match="deterministic"):
        own.hold_workspace()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    own.hold_workspace()
    assert own._keeper is None


class _Captures:
    """torch.cuda as far as a failed capture is mended, and how many cures its generator needs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ill: int) -> None:
        self.ill, self.ended, self.cures = ill, [], []  # type: ignore[var-annotated]
        monkeypatch.setattr(streams, "_failed", [])
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "default_generators", ("generator",))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(streams, "_draw", self.draw)
        for name in ("_capture_nothing", "_renew_state"):
            monkeypatch.setattr(streams, name, lambda _, name=name: self.cures.append(name))

    def end(self, device: int, pool: tuple[int, int]) -> None:
        self.ended.append((device, pool))
        if not self.ill:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def draw(self, _: str) -> None:
        if len(self.cures) < self.ill:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def fail(self) -> None:
        with pytest.raises(ValueError, match="the capture"), streams.mended("graph", (0, 7)):  # type: ignore[arg-type]
            raise ValueError("the capture")


@pytest.mark.parametrize("ill", [0, 1, 2, 3])
def test_what_a_failed_capture_leaves_behind_is_put_right(
    ill: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captures = _Captures(monkeypatch, ill)
    captures.fail()
    assert captures.ended == [(0, (0, 7))]
    assert streams._failed == ["graph"]
    assert captures.cures == ["_capture_nothing", "_renew_state"][:ill], "no more than it needs"
    assert ("no random numbers" in caplog.text) == (ill == 3)


def test_a_capture_that_goes_well_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = _Captures(monkeypatch, 0)
    with streams.mended("graph", (0, 7)):  # type: ignore[arg-type]
        pass
    assert not captures.ended
    assert not streams._failed


def test_trying_a_generator_draws_nothing_from_it() -> None:
    drawn, wanted = (torch.Generator().manual_seed(3) for _ in range(2))
    streams._draw(drawn)
    assert torch.equal(torch.rand(9, generator=drawn), torch.rand(9, generator=wanted))
