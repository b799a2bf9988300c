"""One step of a streaming decoder replayed as one CUDA graph that keeps the state in its own buffers.

Why it exists: a step is some forty small kernels, which take less time than their launches, and copying a state into
the graph and out again takes as long as two or three of them. So the step is captured twice. The first graph reads the
state in one set of buffers and leaves the next state where the step computed it. The second graph reads it there and
puts the next one into the first set. A stream alternates between the two.

A step is a pure function all the same: the state of the step before stays whole until the next step (so a step that
failed can be repeated by PyTorch), and whoever holds an older state than that has a copy of it (`KeptState`). One
`GraphedStep` serves any number of streams and forks. Where they take turns, each step copies a state out and another
one in.

Usage:
    fast = GraphedStep(step, latent, *state)        # captures; RuntimeError where that is not possible
    frames, state = fast.step_in_place(latent, state)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from owl_wms.device_order import DeviceOrder
from owl_wms.state import KeptState, State
from owl_wms.trt.run.capture import CapturedGraph

Step = Callable[..., Sequence[Tensor]]
"""`(latent, *state) -> (frames, *state)`."""


class GraphedStep:
    """`step` behind CUDA graphs, for latents and states like the examples; thread-safe.

    Args:
        step: a pure function of latent and state.
        latent: `[b, c, h, w]` on a CUDA device.
        state: of the stream that the latent belongs to.

    Raises:
        RuntimeError: the step cannot be captured, or a graph does not repeat it.
    """

    @torch.inference_mode(False)  # buffers made in a caller's inference mode could not be written outside of it
    @torch.no_grad()
    def __init__(self, step: Step, latent: Tensor, *state: Tensor) -> None:
        self._order, self._device = DeviceOrder(), latent.device
        self._step = step  # its weights, kernels and engines: a graph holds none of what it reads and runs
        with self._turn():
            self._latent, buffers = latent.detach().clone(), tuple(state)
            for _ in range(2):
                _, *following = step(self._latent, *buffers)
                # In the memory order that the step itself gives a state, so that none is reordered at every step.
                pairs = zip(following, state, strict=True)
                buffers = tuple(torch.empty_like(tensor).copy_(old) for tensor, old in pairs)
            first = CapturedGraph(lambda: _apart(step(self._latent, *buffers), (self._latent, *buffers)))
            left = first.results[1:]

            def back() -> tuple[Tensor]:
                frames, *following = step(self._latent, *left)
                torch._foreach_copy_(buffers, following)
                return (frames,)

            # Graph i reads the state in `_buffers[i]` and leaves the next one in the other.
            self._graphs = first, CapturedGraph(back, first)
            self._buffers = buffers, left
            self._held: list[weakref.ref[KeptState] | None] = [None, None]
            self._check(step)

    def _check(self, step: Step) -> None:
        """Compares both graphs with the step, for other values than those captured: one that does nothing must fail."""
        state: State = tuple(tensor * 0.5 for tensor in self._buffers[0])
        for shift in (0.5, -0.25):
            latent = self._latent + shift
            wanted = step(latent, *state)
            frames, state = self.step_in_place(latent, state)
            if not all(torch.equal(a, b) for a, b in zip((frames, *state), wanted, strict=True)):
                raise RuntimeError("the captured graph does not repeat the step")

    @classmethod
    def attempt(cls, step: Step, inputs: Sequence[Tensor]) -> tuple[GraphedStep | None, str]:
        """Returns the graph of a step for inputs like these, or None and the reason; never raises."""
        if inputs[0].device.type != "cuda":
            return None, f"CUDA graphs need CUDA latents; got {inputs[0].device}"
        try:
            return cls(step, *inputs), ""
        except Exception as error:  # a capture fails in many ways, and the plain program still works
            return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def __call__(self, latent: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Returns frames and the next state, all of them new tensors."""
        frames, following = self.step_in_place(latent, state)
        return frames, *following

    @torch.inference_mode(False)
    @torch.no_grad()
    def step_in_place(self, latent: Tensor, state: State) -> tuple[Tensor, KeptState]:
        """Runs one step: new frames, and the next state.

        Args:
            latent: like the example, in any real dtype.
            state: one that this method returned, which costs no copy if it is the newest, or any tensors like the
                example's.

        Raises:
            ValueError: a state of other shapes.
        """
        # Not in our turn: a state of another graph takes a turn there.
        given = () if self._place(state) is not None else tuple(state)
        with self._turn():
            place = self._place(state)
            if place is None:
                self._load(given or tuple(state))
                place = 0
            self._free(1 - place)
            self._latent.copy_(latent)
            self._graphs[place].replay()
            following = KeptState(self._buffers[1 - place], self._turn)
            self._held[1 - place] = weakref.ref(following)
            return self._graphs[place].results[0].clone(), following

    def _turn(self) -> AbstractContextManager[None]:
        return self._order.turn(self._device)

    def _place(self, state: State) -> int | None:
        """Returns which buffers the state lies in; None if it lies elsewhere."""
        return next((i for i, held in enumerate(self._held) if held is not None and held() is state), None)

    def _load(self, state: tuple[Tensor, ...]) -> None:
        """Puts a state from elsewhere into the first buffers."""
        shapes = [tensor.shape for tensor in self._buffers[0]]
        if [tensor.shape for tensor in state] != shapes:
            got = [list(tensor.shape) for tensor in state]
            raise ValueError(f"this program takes a state of {[list(shape) for shape in shapes]}; got {got}")
        self._free(0)
        torch._foreach_copy_(self._buffers[0], state)

    def _free(self, place: int) -> None:
        """Makes buffers free to be written: a state in them that somebody still holds moves out."""
        held = self._held[place]
        state = None if held is None else held()
        if state is not None:
            state.leave()
        self._held[place] = None


def _apart(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the results, those that share memory with an input as copies."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return [tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor for tensor in results]
