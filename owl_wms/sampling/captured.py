"""Replays a function of tensors as one CUDA graph, where its shapes repeat.

Launching the kernels of a small model from Python takes ten times as long as running them. A captured graph launches
them all at once. It repeats exactly the work of one call, so the function must do the same for the same shapes: no
random numbers, no value read back, no decision that depends on anything but shapes and the key.

Usage:
    step = Captured(function, allowed=may_capture(model))
    out = step(key, x, y)           # the first calls run as they are, later ones with that key and shapes are replayed
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.ops.common.streams import capturing

_LOG = logging.getLogger(__name__)
# Libraries make their handles and choose their kernels in the first calls, which a capture does not allow.
CALLS_BEFORE = 2
# Of the largest value: the captured kernels are the same, but a library may choose others under capture.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Function = Callable[..., tuple[Tensor, ...]]


def may_capture(model: Any) -> bool:
    """Returns whether passes of `model` are safe to capture: plain parameters on a GPU, no hooks, no autocast."""
    if not isinstance(model, nn.Module):
        return False
    parameters = list(model.parameters())
    if not parameters or any(not p.is_cuda or hasattr(p, "device_mesh") for p in parameters):
        return False
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())  # a replay would not call them
    # The autocast cache holds copies of weights that a replay would read after they are gone.
    return not hooked and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing()


class Captured:
    """Calls `function`, and replays it as one CUDA graph per key and shapes once that is captured.

    Each graph is compared with the function when it is made. After a capture that failed, every call runs the function
    itself. Not for use by two threads at once.

    Args:
        function: tensors to a tuple of tensors. It may write into tensors of its own if two calls with the same inputs
            leave them the same.
        allowed: False never captures.

    Attributes:
        replayed: calls answered by a graph.
        reason: why a capture failed, or an empty text.
    """

    def __init__(self, function: Function, *, allowed: bool) -> None:
        self._function, self._allowed = function, allowed
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Graph] = {}
        self.replayed, self.reason = 0, ""

    @torch.no_grad()
    def __call__(self, key: Hashable, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Calls the function.

        Args:
            key: all that the work depends on besides shapes, such as step sizes; a graph serves one key.
            inputs: tensors on the function's device.

        Returns:
            New tensors, which later calls do not change.
        """
        if not self._allowed:
            return self._function(*inputs)
        whole = (key, *((x.shape, x.dtype) for x in inputs))
        graph = self._graphs.get(whole)
        if graph is None:
            self._calls[whole] = calls = self._calls.get(whole, 0) + 1
            if calls <= CALLS_BEFORE:
                return self._function(*inputs)
            try:
                graph = self._graphs[whole] = _Graph(self._function, inputs)
            except Exception as error:  # a capture fails in many ways, and the function itself still works
                self._allowed, self.reason = False, f"{type(error).__name__}: {error}".splitlines()[0]
                self._graphs.clear()
                _LOG.warning("frames are made without a CUDA graph, more slowly: %s", self.reason)
                return self._function(*inputs)
        self.replayed += 1
        return graph(inputs)


class _Graph:
    @torch.inference_mode(False)  # a tensor made in inference mode could not be written outside of it
    @torch.no_grad()
    def __init__(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        with torch.cuda.device(inputs[0].device):
            self._inputs = tuple(x.clone() for x in inputs)
            self._graph = torch.cuda.CUDAGraph()
            with capturing(self._graph, self):
                self._outputs = function(*self._inputs)
            for got, wanted in zip(self(inputs), function(*(x.clone() for x in inputs)), strict=True):
                limit = TOLERANCE.get(wanted.dtype, 0.0) * float(wanted.float().abs().max())
                if not float((got.float() - wanted.float()).abs().max()) <= limit:  # not-a-number fails too
                    raise RuntimeError("the captured graph gives other values than the function")

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.cuda.device(self._inputs[0].device):  # a replay goes to the current device's stream
            for held, given in zip(self._inputs, inputs, strict=True):
                held.copy_(given, non_blocking=True)
            self._graph.replay()
            return tuple(x.clone() for x in self._outputs)
