"""Applies a training step whole or not at all.

Why it exists: a step that fails after its first optimiser has stepped leaves weights of two steps side by side, for
example a critic that is one update ahead of its student. What is about to change is copied first, and copied back when
the step fails. The copies live from the first update to the end of the step. A run with one optimiser therefore holds
them only after its backward pass, when the memory of the activations is free.

Usage:
    with Undo() as undo:
        undo.keep(model, optimiser)      # before they change
        optimiser.step()
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.trainers.optim.optimisers import Optimiser, parts_of


class Undo:
    """Copies of what a step changes; the end of the `with` block drops them, an exception copies them back first."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []
        self._seen: set[int] = set()

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                for restore in reversed(self._restore):
                    restore()
        finally:
            self._restore, self._seen = [], set()

    @torch.no_grad()
    def keep(self, model: nn.Module, optimiser: Optimiser | None = None) -> None:
        """Copy a model's parameters and buffers and an optimiser's state; a second call in a step does nothing."""
        if id(model) in self._seen:
            return
        self._seen.add(id(model))
        self._keep_tensors([*model.parameters(), *model.buffers()])
        for part in () if optimiser is None else parts_of(optimiser):
            self._keep_state(part)

    def keep_values(self, owner: Any, *names: str) -> None:
        """Remember attributes that the step replaces, such as counters."""
        values = {name: getattr(owner, name) for name in names}

        def restore() -> None:
            for name, value in values.items():
                setattr(owner, name, value)

        self._restore.append(restore)

    def _keep_state(self, optimiser: torch.optim.Optimizer) -> None:
        """Tensors are copied back in place, other values replaced, and what the step adds is removed."""
        before = {parameter: dict(state) for parameter, state in optimiser.state.items()}
        self._keep_tensors(v for state in before.values() for v in state.values() if isinstance(v, Tensor))

        def restore() -> None:
            optimiser.state.clear()
            optimiser.state.update(before)

        self._restore.append(restore)

    def _keep_tensors(self, tensors: Iterable[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            groups[tensor.device, tensor.dtype].append(tensor.detach())
        for originals in groups.values():
            copies = _copied(originals)

            def restore(originals: list[Tensor] = originals, copies: list[Tensor] = copies) -> None:
                with torch.no_grad():
                    for original, copy in zip(originals, copies, strict=True):
                        original.copy_(copy)

            self._restore.append(restore)


def _copied(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the same device, or on the CPU when the device's memory is full."""
    try:
        copies = [torch.empty_like(tensor) for tensor in tensors]
        torch._foreach_copy_(copies, tensors)
        return copies
    except torch.OutOfMemoryError:
        return [tensor.to("cpu", copy=True) for tensor in tensors]
