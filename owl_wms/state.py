"""The state of a streaming decoder: what one step hands to the next.

Why it exists: a decoder whose layers see earlier frames is a pure function only if everything that it remembers goes
in and comes out as tensors. Then a step can be exported, cached, captured in a CUDA graph, and repeated by PyTorch.

Usage:
    specs = decoder.state_specs((1, 16, 60, 104))       # a tuple of StateSpec
    state = zeros(specs, torch.device("cpu"))
    frames, state = decoder.step(latent, state)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, ...]


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
