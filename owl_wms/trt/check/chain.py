"""Consecutive steps of a stream as one decode, so that the parity check sees what a state carries on.

Why it exists: a step that is nearly right may hand on a state that is a little further off each time. So decoders are
compared over a chain of steps from an empty state: frames of the first steps, of the last one, and the state after it.

Usage:
    chain = Chain(step, ((1, 256, 60, 104), ...))       # step(latent, *state) -> (frames, *state)
    parts = chain(z)                                    # z [STEPS * b, c, h, w] -> a tuple of tensors
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEPS = 32
KEPT = (0, 1, 2, STEPS - 1)
"""Steps whose frames are compared: all of them would be gigabytes at 720p."""

Step = Callable[..., Sequence[Tensor]]


class Chain:
    """Runs `STEPS` steps from zeros; the result is the frames of the steps in `KEPT` and the last state.

    Args:
        step: takes a latent `[b, c, h, w]` and the tensors of the state, returns frames and the next ones.
        state: shapes of the state's tensors.
    """

    def __init__(self, step: Step, state: tuple[tuple[int, ...], ...]) -> None:
        self.step, self.shapes = step, state

    def __call__(self, z: Tensor) -> tuple[Tensor, ...]:
        state = [torch.zeros(shape, dtype=z.dtype, device=z.device) for shape in self.shapes]
        kept = []
        for i, latent in enumerate(z.unflatten(0, (STEPS, -1))):
            frames, *state = self.step(latent, *state)
            if i in KEPT:
                kept.append(frames)
        return (*kept, *state)
