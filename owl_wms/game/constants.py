"""Small tables of numbers as tensors on a device, each made once.

Why: a tensor made from Python numbers is copied to the GPU, and the program waits for that copy. The game looks up a
table in every frame, so the GPU would stand still several times per frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MADE: dict[tuple[Any, torch.device], Tensor] = {}


def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Returns the numbers of a tuple, nested tuples as rows: float32 on `device`, not to be written into."""
    found = _MADE.get((values, device))
    if found is None:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be used by autograd later
            found = torch.tensor(values, dtype=torch.float32, device=device)
        _MADE[values, device] = found
    return found
