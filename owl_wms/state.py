"""The state of a streaming decoder: what one step hands to the next.

Why it exists: a decoder whose layers see earlier frames is a pure function only if everything that it remembers goes
in and comes out as tensors. Then a step can be exported, cached, captured in a CUDA graph, and repeated by PyTorch.

Usage:
    specs = decoder.state_specs((1, 16, 60, 104))       # a tuple of StateSpec
    state = zeros(specs, torch.device("cpu"))
    frames, state = decoder.step(latent, state)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

State: TypeAlias = Sequence[Tensor]
"""Nobody writes into its tensors: who holds a state can step from it again."""


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Describes one tensor of a state.

    Attributes:
        name: unique among the state's tensors.
        shape: of the tensor; the first dimension is the number of streams.
        dtype: of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def zeros(specs: tuple[StateSpec, ...], device: torch.device | str | None = None) -> State:
    """Returns the state that every stream begins with."""
    return tuple(torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in specs)


class KeptState(Sequence[Tensor]):
    """A state that still lies in the buffers of the program that made it.

    Why it exists: a program that reads its state where the step before has left it copies nothing, as long as nobody
    else wants that state. Its buffers are written again two steps later, so they are never handed out. Whoever takes
    a tensor gets copies, and the program has them made before it writes if this object is still alive.

    Args:
        buffers: of the program.
        turn: while it is entered, nobody writes into them.
    """

    def __init__(self, buffers: Sequence[Tensor], turn: Callable[[], AbstractContextManager[None]]) -> None:
        self._buffers, self._turn = tuple(buffers), turn
        self._copies: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # nobody takes a slice of a state
        return self._copied()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._copied())

    def in_place(self) -> tuple[Tensor, ...]:
        """Returns the tensors to look at within a turn, without a copy; they are not to be kept."""
        return self._buffers

    def leave(self) -> None:
        """Moves out of the buffers; the program calls it in a turn, before it writes into them."""
        self._buffers, self._turn = self._copied(), contextlib.nullcontext

    @torch.inference_mode(False)  # a copy made in a caller's inference mode could not be written outside of it
    @torch.no_grad()
    def _copied(self) -> tuple[Tensor, ...]:
        with self._turn():
            if self._copies is None:
                copies = [torch.empty_like(tensor) for tensor in self._buffers]
                torch._foreach_copy_(copies, self._buffers)
                self._copies = tuple(copies)
            return self._copies
