"""A stand-in for a captured CUDA graph, for machines without a GPU: what is not the graph's promise is NaN.

Usage:
    with mock.patch.object(step_graph, "CapturedGraph", Replayed):
        fast = step_graph.GraphedStep(step, latent, *state)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Replayed:
    """Runs `run` at every replay and writes what it returns where the first run left it, as a graph does.

    A graph computes in memory that its own results lie in, and those of a graph that it shares memory with, so they
    are filled with NaN first: whatever is still needed must be elsewhere by then.
    """

    def __init__(self, run: Callable[[], Sequence[Tensor]], before: Replayed | None = None) -> None:
        self._run, self._others = run, [] if before is None else [before]
        if before is not None:
            before._others.append(self)
        self.results = tuple(run())

    def replay(self) -> None:
        for other in self._others:
            other.results[0].fill_(torch.nan)  # frames; a state is what the other graph reads
        if len(self.results) > 1:  # it leaves the state in results of its own
            for tensor in self.results:
                tensor.fill_(torch.nan)
        for tensor, new in zip(self.results, self._run(), strict=True):
            tensor.copy_(new)
