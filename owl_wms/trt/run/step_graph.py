"""One step of a streaming decoder replayed as one CUDA graph.

Why it exists: a step is some forty small kernels, which take less time than their launches. The state goes through
buffers of the graph: it is copied in before and out after a replay, so what the caller holds is never written. A step
that fails can therefore be repeated by PyTorch, and one graph serves any number of streams and their forks.

Usage:
    fast = GraphedStep(step, latent, *state)        # captures; RuntimeError where that is not possible
    frames, *state = fast(latent, *state)           # fresh tensors, safe to keep
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from owl_wms.ops.common.streams import own_stream

Step = Callable[..., Sequence[Tensor]]
"""`(latent, *state) -> (frames, *state)`."""
WARMUP_CALLS = 3


class GraphedStep:
    """`step` behind a CUDA graph, for latents and states like the examples; thread-safe.

    Args:
        step: a pure function of latent and state.
        latent: `[b, c, h, w]` on a CUDA device.
        state: of the stream that the latent belongs to.

    Raises:
        RuntimeError: the step cannot be captured, or the graph does not repeat it.
    """

    @torch.inference_mode(False)  # buffers made in a caller's inference mode could not be written outside of it
    @torch.no_grad()
    def __init__(self, step: Step, latent: Tensor, *state: Tensor) -> None:
        self._lock = threading.Lock()
        with torch.cuda.device(latent.device):
            self._latent, self._state = latent.detach().clone(), tuple(state)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP_CALLS):
                    _, *following = step(self._latent, *self._state)
                    # In the memory order that the step itself gives a state, so that none is reordered at every step.
                    pairs = zip(following, state, strict=True)
                    self._state = tuple(torch.empty_like(tensor).copy_(old) for tensor, old in pairs)
                torch.cuda.synchronize()
            self._graph, own = torch.cuda.CUDAGraph(), own_stream()
            with (
                torch.cuda.stream(own),
                torch.cuda.graph(self._graph, stream=own, capture_error_mode="thread_local"),
            ):
                self._frames, *self._following = step(self._latent, *self._state)
            torch.cuda.current_stream().wait_stream(own)
            # Other values than those captured: a graph that does nothing must not pass.
            changed = self._latent + 0.5, *(tensor * 0.5 for tensor in self._state)
            repeats = (torch.equal(a, b) for a, b in zip(self(*changed), step(*changed), strict=True))
            if not all(repeats):
                raise RuntimeError("the captured graph does not repeat the step")

    @classmethod
    def attempt(cls, step: Step, inputs: Sequence[Tensor]) -> tuple[GraphedStep | None, str]:
        """Returns the graph of a step for inputs like these, or None and the reason; never raises."""
        if inputs[0].device.type != "cuda":
            return None, f"CUDA graphs need CUDA latents; got {inputs[0].device}"
        try:
            return cls(step, *inputs), ""
        except Exception as error:  # capture refuses in many ways; the plain program answers all the same
            return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    @torch.no_grad()
    def __call__(self, latent: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Returns frames and the next state, all of them new tensors."""
        with self._lock, torch.cuda.device(self._latent.device):
            frames, *following = self.replay(latent, *state)
            copies = [torch.empty_like(tensor) for tensor in following]
            torch._foreach_copy_(copies, following)
            return frames.clone(), *copies

    def replay(self, latent: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Does the same and returns the graph's own buffers, which the next call overwrites: for one single stream.

        A state that this method returned itself is moved within the graph's memory.
        """
        self._latent.copy_(latent)
        torch._foreach_copy_(self._state, state)
        self._graph.replay()
        return self._frames, *self._following
