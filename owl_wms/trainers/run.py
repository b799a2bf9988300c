"""Protocols of a training run: all that evaluation and rescue need of one. `BaseTrainer` satisfies both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from owl_wms.configs.world import TrainingConfig, WorldModelConfig
from owl_wms.data.loaders import Loader
from owl_wms.data.loading import Batch
from owl_wms.models.latents import LatentSpace
from owl_wms.sampling import SampleResult
from owl_wms.trainers.ema import EMA


class Saved(Protocol):
    """Describes a run whose last whole step can be saved."""

    rank: int
    step: int
    saved_step: int
    folder: Path

    @property
    def lost_folder(self) -> bool:
        """True if another run has the folder."""

    def checkpoint(self) -> dict[str, Any]:
        """Return the run's state, as it is written to `step_{n}.pt`."""

    def write_checkpoint(self) -> None:
        """Write it, on this rank alone."""


class Sampled(Saved, Protocol):
    """Describes a run whose averaged model can continue held-out latents."""

    train_cfg: TrainingConfig
    model_cfg: WorldModelConfig
    world_size: int
    device: torch.device
    space: LatentSpace
    ema: EMA

    def sample(self, sampler: Any, core: nn.Module, batch: Batch) -> SampleResult:
        """Continue a batch with the averaged core."""

    def predictions(self) -> dict[str, Tensor]:
        """Return further clips `[b, n, c, h, w]`, by name."""

    def make_loader(
        self, data_id: str | None, kwargs: dict[str, Any] | None, batch_size: int, batch_key: str
    ) -> Loader:
        """Build a loader for this rank."""

    def endless(self, loader: Loader, section: str) -> Iterator[Batch]:
        """Yield batches on the device, epoch after epoch."""
