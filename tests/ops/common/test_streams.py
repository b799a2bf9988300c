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
