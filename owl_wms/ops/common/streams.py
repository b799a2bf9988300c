"""Streams for capturing CUDA graphs, each with cuBLAS workspaces that nobody else can free.

What torch leaves behind where a capture fails is put right here too.

Usage:
    with capturing(graph, self): ...  # self holds `graph`
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from owl_wms import env
from owl_wms.ops.common import nvrtc

_LOG = logging.getLogger(__name__)


class CaptureStream:
    """A stream on which one CUDA graph at a time is captured.

    torch keeps one cuBLAS workspace (33 MiB on an H200) for each handle and stream, for good, and a captured product
    keeps that workspace's address. The streams that torch hands out are shared, and have a workspace as soon as
    anything was multiplied on them: memory outside of the graph, which `torch.compile(mode="reduce-overhead")` anywhere
    in the process frees when it records (torch._inductor.cudagraph_trees.clear_cublass_cache). A replay then reads and
    writes what is no longer its own. So a small product is captured here first, and its graph is kept: the workspace
    lies in the memory of that graph, which nobody else gets, whoever frees it.

    When its graph is gone, the stream serves another one; a new stream for every graph would leave a workspace behind
    with each. It is never destroyed: a later one could get its address, and with it a workspace that nobody keeps.

    Attributes:
        stream: to capture on.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.ExternalStream(nvrtc.new_stream(), device=torch.cuda.current_device())
        self._keeper: torch.cuda.CUDAGraph | None = None

    def hold_workspace(self) -> None:
        """Takes workspaces for this thread's cuBLAS, if the stream has none, from memory that is kept here.

        Before each capture, since somebody may have freed them all.
        """
        device, warm = self.stream.device, warm_stream()
        with torch.no_grad(), torch.cuda.stream(warm):
            factors = [torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.float16, torch.float32)]
            try:
                _multiply(factors)  # a thread's first product makes its handle, which a capture does not allow
            except RuntimeError:
                if torch.are_deterministic_algorithms_enabled():  # refuses cuBLAS, also in what is to be captured
                    return
                raise
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if self._keeper is None else self._keeper.pool()
        with torch.no_grad(), without_collector(), mended(graph, pool), torch.cuda.stream(self.stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                _multiply(factors)
            finally:
                graph.capture_end()
        self._keeper = self._keeper or graph

    def serve(self, owner: Any) -> None:
        """Makes the stream free again when `owner`, who has the graph that was captured on it, is gone."""
        weakref.finalize(owner, _free[self.stream.device_index].append, self).atexit = False


def _multiply(factors: list[Tensor]) -> None:
    """Multiplies by cuBLAS and, with a bias, by cuBLASLt."""
    for factor in factors:
        torch.mm(factor, factor)
        torch.addmm(factor[0], factor, factor)


_guard = threading.Lock()
_free: dict[int, list[CaptureStream]] = {}
_warm: dict[int, torch.cuda.Stream] = {}


def take_capture_stream() -> CaptureStream:
    """Returns a stream of the current device with its workspaces. Whoever fails to capture on it does not `serve` it.

    What was launched before is done then, and with it every replay of the graph that the stream served before.
    """
    with _guard:
        free = _free.setdefault(torch.cuda.current_device(), [])
        own = free.pop() if free else None
    torch.cuda.synchronize()
    own = CaptureStream() if own is None else own
    own.hold_workspace()
    return own


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, owner: Any, pool: Any = None) -> Iterator[None]:
    """Captures what its body launches on the current device.

    Args:
        graph: the graph; `owner` holds it.
        owner: as long as it lives, no other graph is captured on the same stream.
        pool: of a graph whose memory this one may use as well, for the two are never replayed at once.
    """
    own = take_capture_stream()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    # Entering the stream here also leaves it whatever becomes of the capture. thread_local: another thread's allocation
    # (a data loader that pins memory) must not break the capture.
    with (
        without_collector(),
        mended(graph, pool),
        torch.cuda.stream(own.stream),
        torch.cuda.graph(graph, pool=pool, stream=own.stream, capture_error_mode="thread_local"),
    ):
        yield
    own.serve(owner)
    torch.cuda.current_stream().wait_stream(own.stream)


_failed: list[torch.cuda.CUDAGraph] = []


@contextlib.contextmanager
def mended(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Puts right what torch leaves undone where the capture of `graph` on the current device fails inside.

    torch's `capture_end` raises before it has told the memory pool and the random generator that the capture is over
    (ATen/cuda/CUDAGraph.cpp of 2.11). Memory that other streams have used would then never be used again, and the
    next random number on that GPU would raise "Offset increment outside graph capture encountered unexpectedly".

    Args:
        graph: which is captured; a failed one is kept for good, for torch goes on asking it whose memory is whose.
        pool: of its memory.
    """
    try:
        yield
    except BaseException:
        _failed.append(graph)
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # where the capture ended as it should: "not currently recording"
            torch._C._cuda_endAllocateToPool(device, pool)
        try:
            _mend_generator(torch.cuda.default_generators[device])
        except Exception as error:  # what broke the capture is what the caller must hear of
            _LOG.warning("no random numbers on this GPU since a CUDA graph's capture failed: %s", error)
        raise


def _mend_generator(generator: torch.Generator) -> None:
    """Makes a generator that a failed capture left in capture mode go on where it was."""
    for cure in (_capture_nothing, _renew_state):
        if _goes_on(generator):
            return
        with contextlib.suppress(RuntimeError):
            cure(generator)
    _draw(generator)


def _draw(generator: torch.Generator) -> None:
    """Draws a number and puts the generator back. Raises RuntimeError, and changes nothing, while it thinks of a
    capture.
    """
    before = generator.get_state()
    torch.empty(1, device=generator.device).uniform_(generator=generator)
    generator.set_state(before)


def _goes_on(generator: torch.Generator) -> bool:
    try:
        _draw(generator)
    except RuntimeError:
        return False
    return True


def _capture_nothing(generator: torch.Generator) -> None:
    """Captures a graph that uses no random number: its end is the end of the capture that the generator thinks of."""
    stream = torch.cuda.ExternalStream(nvrtc.new_stream(), device=generator.device)
    value, graph = torch.zeros(1, device=generator.device), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        value.zero_()
        graph.capture_end()


def _renew_state(generator: torch.Generator) -> None:
    """Gives the generator a new state with the same numbers to come; graphs that were captured before keep the old."""
    fresh = torch.Generator(generator.device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


class _Collector:
    """Python's collector, and how many threads want it to rest."""

    _enabled = False

    def __init__(self) -> None:
        self._renew()
        env.after_fork(self._renew)

    def _renew(self) -> None:
        """Lets it go on in a forked child, a worker of a data loader say: nobody captures there."""
        self._guard, self._resting = threading.RLock(), 0
        if self._enabled:
            gc.enable()
        self._enabled = False

    def rest(self) -> None:
        with self._guard:
            if not self._resting:
                self._enabled = gc.isenabled()
                gc.disable()
            self._resting += 1

    def go_on(self) -> None:
        with self._guard:
            self._resting -= 1
            if not self._resting and self._enabled:
                gc.enable()
                self._enabled = False


_collector = _Collector()


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keeps Python's collector from running: a CUDA graph that it frees while another is captured ends that capture.

    It runs again when the last of several threads is done.
    """
    _collector.rest()
    try:
        yield
    finally:
        _collector.go_on()


def warm_stream() -> torch.cuda.Stream:
    """Returns the stream of the current device on which functions run before they are captured.

    Always the same: each of torch's streams on which something is multiplied keeps a workspace.
    """
    with _guard:
        return _warm.setdefault(torch.cuda.current_device(), torch.cuda.Stream())
