"""One optimiser and what it trains: a loss over batches, accumulated, averaged over ranks, clipped, applied.

Why it exists: plain trainers have one such phase per step, distillation trainers two (several critic updates, then the
student). The loss runs inside a thin module, so that data parallelism sees one forward call per micro-batch however
often the loss calls the model, and the model itself keeps clean names.

Usage:
    phase = Phase("model", model, loss, optimiser, accumulation=4)
    phase.update(batches, metrics, step)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from owl_wms.data.loading import Batch
from owl_wms.errors import TrainingError
from owl_wms.trainers.distributed import await_ranks, is_distributed
from owl_wms.trainers.guards import REMEDY
from owl_wms.trainers.metrics import Metrics
from owl_wms.trainers.optim.optimisers import Optimiser
from owl_wms.trainers.undo import Undo

Loss = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""A batch to (what is minimised, what is reported); every value one element."""


class _LossModule(nn.Module):
    """Runs the model and its loss in one forward call."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(batch)


class Phase:
    """Updates a model by its loss and its optimiser."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        loss: Loss,
        optimiser: Optimiser,
        *,
        accumulation: int,
        repeats: int = 1,
        clip: float | None = None,
        schedule: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Wire them up.

        Args:
            name: of the phase, for reports.
            model: trained; on its device already.
            loss: calls `model` and returns loss and reports.
            optimiser: over the model's parameters.
            accumulation: micro-batches per update, at least 1.
            repeats: updates per step.
            clip: largest gradient norm, or None.
            schedule: sets learning rates for a step.
        """
        self.name, self.model, self.optimiser = name, model, optimiser
        self.accumulation, self.repeats, self.clip, self.schedule = accumulation, repeats, clip, schedule
        device = next(model.parameters()).device
        self._step: nn.Module = _LossModule(model, loss)
        if is_distributed():
            ids = [device.index] if device.type == "cuda" else None
            self._step = DistributedDataParallel(self._step, device_ids=ids, broadcast_buffers=False)
        self._autocast = torch.autocast(device.type, torch.bfloat16)

    def update(self, batches: Iterator[Batch], metrics: Metrics, step: int, undo: Undo | None = None) -> None:
        """Make all updates of this phase in a step, each over `accumulation` fresh batches.

        Gradients cross ranks only with an update's last micro-batch. Their norm is looked at before they are applied:
        it is the same on all ranks, so all of them stop together, with the weights still whole. `undo` takes copies of
        what is about to change.

        Raises:
            TrainingError: a gradient is NaN or infinite; nothing of this update was applied.
            DistError: another rank is gone; nothing of this update was applied.
        """
        for _ in range(self.repeats):
            self.schedule(step)
            self.optimiser.zero_grad(set_to_none=True)  # a step that failed may have left some
            for micro in range(self.accumulation):
                last = micro == self.accumulation - 1
                ddp = self._step if isinstance(self._step, DistributedDataParallel) else None
                with nullcontext() if last or ddp is None else ddp.no_sync():
                    batch = next(batches)  # read outside of autocast, which would round what a loader computes
                    with self._autocast:
                        loss, reports = self._step(batch)
                    (loss / self.accumulation).backward()
                for name, value in reports.items():
                    metrics.add(name, value)
            given = [p for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in given if p.grad is not None])
            await_ranks(norm.device)
            if not torch.isfinite(norm):
                raise TrainingError(
                    f"step {step + 1}: the gradient of the {self.name} is {float(norm)} ({metrics.shown()}), so it is "
                    f"not applied and the run ends here; {REMEDY}",
                    step=step,
                )
            if self.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(given, self.clip, norm)
            metrics.add("g_norm" if self.name == "model" else f"{self.name}_g_norm", norm)
            if undo is not None:
                undo.keep(self.model, self.optimiser)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
