"""A program replayed as one CUDA graph: the launches of a decoder with PyTorch subgraphs, once instead of every call.

Why it exists: a program of one engine gains nothing (19.49 ms against 19.50), one of many small kernels and engine
boundaries does. Capture cannot be stored with the program, so it happens after every load; it costs a few decodes and
the memory of the graph's buffers.

Usage:
    fast = GraphedProgram(program, z)        # captures; falls back to `program` when capture fails
    x = fast(z)                              # a fresh tensor, safe to keep
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from owl_wms.trt.run.capture import CapturedGraph

_LOG = logging.getLogger(__name__)


class GraphedProgram:
    """Replays `program` as a CUDA graph for latents of the shape and device of `example`, in any real dtype. `program`
    itself runs for other shapes and devices, and for everything where the capture failed.

    Thread-safe: replay works on static buffers, so calls are serialised by a lock, and each returns a copy of the
    output.

    Attributes:
        graphed: whether a graph was captured.
        reason: why not, when not.
    """

    def __init__(self, program: Callable[[Tensor], Tensor], example: Tensor) -> None:
        self.program = program
        self.reason = ""
        self._lock = threading.Lock()
        self._graph: CapturedGraph | None = None
        if example.device.type != "cuda":
            self.reason = f"CUDA graphs need CUDA latents; got {example.device}"
            return
        try:
            self._capture(example)
        except Exception as error:  # a capture fails in many ways, and the plain program still works
            self._graph = None
            self.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            _LOG.info("no CUDA graph: %s", self.reason)

    @property
    def graphed(self) -> bool:
        return self._graph is not None

    @torch.inference_mode(False)  # buffers made in a caller's inference mode could not be written outside of it
    @torch.no_grad()
    def _capture(self, example: Tensor) -> None:
        with torch.cuda.device(example.device):
            self._input = example.detach().clone()
            self._graph = CapturedGraph(lambda: (self.program(self._input),))
            self._input.add_(0.5)  # other latents than those captured: a graph that does nothing must not pass
            self._graph.replay()
            torch.cuda.synchronize()
            # A graph with breaks has been seen to return zeros; it must return what the plain program does.
            if not torch.equal(self._graph.results[0], self.program(self._input)):
                raise RuntimeError("the captured graph does not repeat the program's answer")

    def __call__(self, z: Tensor) -> Tensor:
        if self._graph is None or z.shape != self._input.shape or z.device != self._input.device:
            return self.program(z)
        with self._lock, torch.cuda.device(z.device):
            self._input.copy_(z)  # casts: the graph's input has one dtype
            self._graph.replay()
            return self._graph.results[0].clone()
