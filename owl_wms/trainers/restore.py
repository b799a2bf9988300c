"""A run's state out of a checkpoint, for a trainer that was built from a configuration.

Usage:
    restore(trainer, "checkpoints/v0/step_1000.pt")
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from owl_wms.data.loaders import Loader
from owl_wms.errors import CheckpointError
from owl_wms.trainers.checkpoints import differences, load_checkpoint, load_part, strip_wrappers
from owl_wms.trainers.ema import EMA
from owl_wms.trainers.guards import broken_weight
from owl_wms.trainers.optim.optimisers import load_optimiser
from owl_wms.trainers.phases import Phase

_log = logging.getLogger(__name__)


class Resumed(Protocol):
    """Describes a run that can take the state of an earlier one."""

    trainer_id: str
    model: nn.Module
    ema: EMA
    phases: list[Phase]
    loader: Loader
    step: int
    position: dict[str, int]

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take what the trainer itself added to the checkpoint."""

    def configuration(self) -> dict[str, Any]:
        """Return the sections of the configuration."""

    def checkpoint(self) -> dict[str, Any]:
        """Return the run's state, as it is written to `step_{n}.pt`."""


def restore(trainer: Resumed, path: Path | str) -> None:
    """Load weights, average, optimisers, step and data position; settings stay those of the configuration.

    Raises:
        CheckpointError: a file that cannot be read, of another trainer, architecture or optimiser; one line.
    """
    state = load_checkpoint(path)
    try:
        load_part(trainer.model, state["model"], path)
        trainer.ema.load_state_dict(strip_wrappers(state["ema"]))
        load_optimiser(trainer.phases[-1].optimiser, state["opt"])
        trainer.load_extra_state(state)
        trainer.step = int(state["steps"])
        if "data" in state:  # upstream's checkpoints have no data position
            trainer.loader.load_state_dict(state["data"])
            trainer.position = trainer.loader.state_dict()
        if min(trainer.step, *(trainer.position.get(name, 0) for name in ("epoch", "samples"))) < 0:
            raise ValueError("its step or its data position is below 0")
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(
            f"{path}: has no {error}, so it does not continue a run of {trainer.trainer_id!r}; train.init_ckpt takes "
            "weights alone",
            path=path,
        ) from error
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: does not continue this run: {reason}", path=path) from error
    broken = broken_weight(trainer.checkpoint())
    if broken is not None:  # it would end the run at its first save, with the steps before it lost
        text = f"weight {broken!r} is NaN or infinite; use a checkpoint from before the run diverged"
        raise CheckpointError(f"{path}: {text}", path=path, mismatch=broken)
    _log.info("resumed from %s at step %d", path, trainer.step)
    for key, old, new in differences(state.get("config"), trainer.configuration()):
        # Weights mean something else under another model; other settings are changed on purpose.
        level = logging.WARNING if key.startswith("model.") else logging.INFO
        _log.log(level, "%s is %s from here on, and was %s in the checkpoint", key, new, old)
