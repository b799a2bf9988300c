"""Batches on their way into a trainer: compared with the model's configuration, then moved to the device.

Why it exists: columns in another order, or latents of another encoder, otherwise end deep inside the model as a matrix
product that does not fit, without a word of the file or the key that is wrong.

Usage:
    parts = ("latents", "mouse", "buttons")
    rule = BatchRule(parts, cfg.model, LatentSpace.of(cfg.train), "train.data_kwargs", cfg.train.data_kwargs)
    batches = endless(loader, rule, device)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from owl_wms.configs.world import TrainingConfig, WorldModelConfig
from owl_wms.data.loaders import Loader
from owl_wms.data.loading import Batch
from owl_wms.errors import DataError
from owl_wms.models.latents import LatentSpace
from owl_wms.nn.setting import latent_grid

MOUSE_AXES = 2
_SPREAD = 2.5
"""Factor by which the spread of latents may differ from that of noise before a scale looks like a mistake."""
_log = logging.getLogger(__name__)


def batches_per_update(cfg: TrainingConfig, world_size: int, *, logs: bool = False) -> int:
    """Returns how many batches each rank gathers for an update: as many as fit into `target_batch_size`, at least one.

    Args:
        cfg: its `batch_size` is windows per batch and rank, `target_batch_size` windows per update of all ranks.
        world_size: ranks.
        logs: warn where the ranks make another number of windows than that.
    """
    count = max(1, cfg.target_batch_size // cfg.batch_size // world_size)
    made = count * cfg.batch_size * world_size
    if logs and made != cfg.target_batch_size:
        text = "a step takes %d windows, not the %d of train.target_batch_size: %d of a batch, %d batches, %d ranks"
        _log.warning(text, made, cfg.target_batch_size, cfg.batch_size, count, world_size)
    return count


class BatchRule:
    """Describes the shapes of a trainer's batches.

    Attributes:
        parts: names of the tensors that the trainer reads, in order; a batch may bring more behind them.
    """

    def __init__(
        self,
        parts: Sequence[str],
        model: WorldModelConfig,
        space: LatentSpace,
        key: str,
        kwargs: Mapping[str, Any] | None,
    ) -> None:
        """Derive the shapes.

        Args:
            parts: among latents, audio, mouse, buttons, has_controls.
            model: says channels, sides and numbers of buttons.
            space: what is done to latents before the model.
            key: dotted key of the configuration that the batches come from, for messages.
            kwargs: its value.

        Raises:
            ConfigError: the transform of latents does not give the model's channels.
        """
        frames: dict[str, tuple[int, ...]] = {
            "latents": (space.stored_channels(model.channels), *latent_grid(model)),
            "audio": (model.audio_channels,),
            "mouse": (MOUSE_AXES,),
            "buttons": (model.n_buttons,),
        }
        self.parts = tuple(parts)
        self._frames = {name: frames[name] for name in parts if name in frames}
        self._key, self._space, self._scaled = key, space, False
        settings = kwargs or {}
        self._source = settings.get("dataset_path") or settings.get("bucket_name")
        self._columns = settings.get("batch_columns")

    def check(self, batch: Batch) -> None:
        """Compare shapes; nothing is read from the device.

        Raises:
            DataError: a part that is absent or of another shape; names key, part, wanted and got.
        """
        shapes = [tuple(part.shape) for part in batch]
        if len(batch) < len(self.parts):
            self._refuse(f"has {len(batch)} parts, and the trainer reads {', '.join(self.parts)}")
        for name, shape in zip(self.parts, shapes, strict=False):
            if name in self._frames and (shape[:2] != shapes[0][:2] or shape[2:] != self._frames[name]):
                wanted = ", ".join(map(str, (*shapes[0][:2], *self._frames[name])))
                self._refuse(f"gives {list(shape)} as {name}, and the model wants [{wanted}]")

    def check_scale(self, batch: Batch) -> None:
        """Warn, once and on the first batch, if the latents' spread in the model's scale is far from that of the noise.

        A constant batch says nothing about a scale.
        """
        if self._scaled or "latents" not in self.parts:
            return
        self._scaled = True
        spread = float(self._space.to_model(batch[self.parts.index("latents")].float()).std())
        if not math.isfinite(spread) or spread < 1e-6 or 1 / _SPREAD <= spread <= _SPREAD:
            return
        _log.warning(
            "latents of train.%s have a standard deviation of %.3g in the model's scale, and noise has 1: set "
            "train.vae_scale to %.3g instead of %g",
            *(self._key.removeprefix("train."), spread, spread * self._space.scale, self._space.scale),
        )

    def _refuse(self, problem: str) -> None:
        source = "" if self._source is None else f"{self._source}: "
        columns = "" if self._columns is None else f" (batch_columns: {', '.join(self._columns)})"
        raise DataError(f"{source}a batch of {self._key} {problem}{columns}", path=self._source)


def endless(loader: Loader, rule: BatchRule, device: torch.device) -> Iterator[Batch]:
    """Batches on the device, floats as float32: autocast decides what is bf16; noise and loss are not.

    Raises:
        DataError: a batch that does not keep the rule, or a loader that gives none.
    """
    empty = 0
    while True:
        empty += 1  # one pass may be: a position at the end of its epoch
        if empty > 2:
            raise DataError("the loader gives no batches: its data are empty, or it is an iterator that has ended")
        for batch in loader:
            empty = 0
            rule.check(batch)
            rule.check_scale(batch)
            moved = (part.to(device, non_blocking=True) for part in batch)
            yield tuple(part.float() if part.is_floating_point() else part for part in moved)
