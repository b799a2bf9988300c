"""Capture as this machine can watch it: torch.cuda's devices, streams and graphs replaced by what they promise.

The stand-in keeps one current stream a device, records on which one a capture begins, and lets a replay compute the
program anew into the static output, as a right capture would. It also keeps cuBLAS workspaces as torch does: one a
stream, made by the first product on it, out of everybody's memory unless that stream is being captured.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms.ops.common import nvrtc, streams
from owl_wms.ops.common.streams import CaptureStream
from owl_wms.trt.run.cuda_graph import GraphedProgram

Decode = Callable[[Tensor], Tensor]


class Latents(Tensor):
    """A CPU tensor that says it is on a GPU."""

    on = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.on)


class Stream:
    """A stream of the device that was current when it was made."""

    def __init__(self, cuda: Cuda, name: str) -> None:
        self.device = self.device_index = cuda.device
        self.name = f"{name} of {cuda.device}"

    def wait_stream(self, other: Any) -> None:
        pass


class Cuda:
    """The current device, each device's current stream, and what was captured where."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Any] = {}
        self.captures: list[str] = []
        self.workspaces: dict[str, str] = {}
        self.read: list[str] = []  # whose memory the products of each capture work in
        self.capturing = self.broken = self.empty = False
        self.rerun: Callable[[], None] = lambda: None

    def current(self) -> Any:
        if self.device not in self.streams:
            self.streams[self.device] = Stream(self, "main")
        return self.streams[self.device]

    @contextlib.contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        yield
        self.device = before

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.streams[stream.device] = self.streams.get(stream.device), stream
        try:
            yield
        finally:
            self.streams[stream.device] = before

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Stream | None = None, **_: Any) -> Iterator[None]:
        """As torch's: enters a stream, and does not leave it when ending the capture raises."""
        assert stream is not None, "torch would take the stream of the device that captured first"
        self.streams[stream.device] = stream
        self.captures.append(stream.name)
        assert not gc.isenabled(), "it could free another graph, which ends this capture"
        self.capturing = True
        yield
        self.capturing = False
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    def hold_workspace(self, own: CaptureStream) -> None:
        self.workspaces[own.stream.name] = f"that of {own.stream.name}"

    def product(self) -> None:
        """A product on the current stream."""
        name = self.current().name
        self.workspaces.setdefault(name, "the graph's" if self.capturing else "everybody's")
        if self.capturing:
            self.read.append(self.workspaces[name])


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    stand_in = Cuda()

    class Graph:
        def replay(self) -> None:
            if not stand_in.empty:
                stand_in.rerun()

    for name, value in {
        "device": stand_in.on_device,
        "stream": stand_in.on_stream,
        "graph": stand_in.graph,
        "current_stream": stand_in.current,
        "Stream": lambda: Stream(stand_in, "pooled"),
        "ExternalStream": lambda number, device: Stream(stand_in, f"own {number}"),
        "current_device": lambda: stand_in.device,
        "CUDAGraph": Graph,
        "synchronize": lambda *_: None,
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(streams, "_free", {})
    monkeypatch.setattr(streams, "_warm", {})
    monkeypatch.setattr(CaptureStream, "hold_workspace", lambda own: stand_in.hold_workspace(own))
    numbers = itertools.count(1)
    monkeypatch.setattr(nvrtc, "new_stream", lambda: next(numbers))
    return stand_in


def captured(cuda: Cuda, device: int = 0) -> GraphedProgram:
    """`2 z` as a graph on a device of the stand-in."""
    graphed = GraphedProgram.__new__(GraphedProgram)

    def rerun() -> None:
        graphed._graph.results[0].copy_(graphed._input.as_subclass(Tensor) * 2)

    cuda.rerun = rerun
    example = torch.zeros(2, 3).as_subclass(Latents)
    example.on = device

    def program(z: Tensor) -> Tensor:
        cuda.product()
        return z.as_subclass(Tensor) * 2

    graphed.__init__(program, example)  # type: ignore[misc]
    return graphed


def test_every_device_captures_on_a_stream_of_its_own(cuda: Cuda) -> None:
    for device in (0, 1):
        cuda.device = 0
        assert captured(cuda, device).graphed
    assert cuda.captures == ["own 1 of 0", "own 2 of 1"]


def test_every_graph_has_a_workspace_that_is_kept_for_it(cuda: Cuda) -> None:
    # Whoever records a graph with torch.compile frees all workspaces that torch knows; those that are kept stay.
    both = [captured(cuda) for _ in range(2)]
    assert all(graphed.graphed for graphed in both)
    assert cuda.read == ["that of own 1 of 0", "that of own 2 of 0"]


def test_a_graph_takes_over_the_stream_of_one_that_is_gone(cuda: Cuda) -> None:
    first = captured(cuda)
    second = captured(cuda)
    cuda.rerun = lambda: None  # it holds the newest graph
    del first
    gc.collect()
    assert captured(cuda).graphed
    assert cuda.captures == ["own 1 of 0", "own 2 of 0", "own 1 of 0"]
    assert second.graphed


def test_a_capture_that_fails_leaves_the_callers_stream(cuda: Cuda) -> None:
    before, cuda.broken = cuda.current(), True
    graphed = captured(cuda)
    assert not graphed.graphed
    assert "previous error" in graphed.reason
    assert cuda.current() is before


def test_a_graph_that_does_nothing_is_noticed(cuda: Cuda) -> None:
    cuda.empty = True
    assert "does not repeat" in captured(cuda).reason


def test_what_was_captured_in_inference_mode_is_written_outside_of_it(cuda: Cuda) -> None:
    with torch.inference_mode():
        graphed = captured(cuda)
    assert graphed.graphed, graphed.reason
    assert not graphed._input.is_inference()
    with torch.no_grad():
        assert torch.equal(graphed(torch.ones(2, 3).as_subclass(Latents)), torch.full((2, 3), 2.0))
