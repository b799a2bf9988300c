"""Captures what a function launches as a CUDA graph: warms it up elsewhere, then captures it on a stream of its own.

Why it exists: a capture must own its cuBLAS workspace (`CaptureStream` says why), must not break when other threads
allocate, and must leave the caller's stream as it was. Both forms of a graphed program need just that.

Usage:
    graph = CapturedGraph(lambda: (program(static_input),))     # on the current device; raises where that is impossible
    static_input.copy_(z); graph.replay(); frames = graph.results[0].clone()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from owl_wms.ops.common.streams import capturing, warm_stream

WARMUP_CALLS = 3


class CapturedGraph:
    """All that `run` launches, as a CUDA graph.

    Args:
        run: takes nothing; reads and writes tensors that stay where they are.
        before: a graph whose memory this one may use as well, for the two are never replayed at once.

    Raises:
        Exception: it cannot be captured, for one of many reasons.

    Attributes:
        results: what `run` returned; every replay writes them again.
    """

    def __init__(self, run: Callable[[], Sequence[Tensor]], before: CapturedGraph | None = None) -> None:
        side = warm_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_CALLS):
                run()
            torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with capturing(self._graph, self, None if before is None else before._graph.pool()):
            self.results = tuple(run())

    def replay(self) -> None:
        """Runs it on the current stream."""
        self._graph.replay()
