"""Means of the values that a step measured, over its micro-batches and all ranks; one synchronisation per step.

Usage:
    metrics = Metrics(device)
    metrics.add("diffusion_loss", loss)       # once per micro-batch, no host synchronisation
    values, stop = metrics.pop(stop=False)    # {"diffusion_loss": 0.93}
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from owl_wms.trainers.distributed import await_ranks, is_distributed


class Metrics:
    """Collects sums and counts by name; they stay on the device until `pop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Take one value into the mean of `name`; a tensor must hold one element."""
        scalar = torch.as_tensor(value, device=self._device).detach().float().reshape(())
        self._sums[name] = self._sums[name] + scalar if name in self._sums else scalar
        self._counts[name] = self._counts.get(name, 0) + 1

    def forget(self) -> None:
        """Drop all values."""
        self._sums, self._counts = {}, {}

    def shown(self) -> str:
        """Return this rank's mean losses so far, for a message."""
        losses = [name for name in sorted(self._sums) if name.endswith("loss")]
        return ", ".join(f"{name} {float(self._sums[name]) / self._counts[name]:.4g}" for name in losses)

    def pop(self, *, stop: bool = False) -> tuple[dict[str, float], bool]:
        """Return the means of all names, and whether any rank asked to stop; then forget everything.

        All ranks must have added the same names.

        Raises:
            DistError: another rank is gone.
        """
        names = sorted(self._sums)
        parts = [self._sums[name] / self._counts[name] for name in names]
        flag = torch.tensor(float(stop), dtype=torch.float32, device=self._device)
        packed = torch.stack([*parts, flag])
        world = 1
        if is_distributed():
            dist.all_reduce(packed)
            world = dist.get_world_size()
            await_ranks(self._device)
        *means, stops = packed.tolist()
        self.forget()
        return {name: mean / world for name, mean in zip(names, means, strict=True)}, stops > 0
