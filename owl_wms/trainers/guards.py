"""Guards that keep a run's files whole when its numbers, its data or its machine fail.

Usage:
    require_finite(step, values)                 # after a step, before anything is saved
    broken = broken_weight(trainer.checkpoint()) # None, or the key that must not be saved
    rescue(trainer, error)                       # in the handler of whatever ended the loop
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from owl_wms.errors import TrainingError
from owl_wms.files import one_line
from owl_wms.trainers.run import Saved

REMEDY = (
    "look for extreme values in the data, lower the learning rate or lengthen the warm-up, and continue from the last "
    "checkpoint with --resume"
)
_log = logging.getLogger(__name__)


def require_finite(step: int, values: Mapping[str, float]) -> None:
    """Check what a step reports.

    Raises:
        TrainingError: a value is NaN or infinite; names step and values.
    """
    bad = ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
    if bad:
        raise TrainingError(f"step {step}: {bad}, so the run ends here; {REMEDY}", step=step)


def broken_weight(state: Mapping[str, Any]) -> str | None:
    """Key of the first weight in a checkpoint's parts (`model`, `ema`, ...) that holds NaN or infinity, or None.

    One synchronisation with the device in all.
    """
    floats = {
        f"{name}.{key}": value
        for name, part in state.items()
        if isinstance(part, Mapping)
        for key, value in part.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    if not floats:
        return None
    fine = torch.stack([value.isfinite().all() for value in floats.values()]).tolist()
    return next((key for key, ok in zip(floats, fine, strict=True) if not ok), None)


def rescue(trainer: Saved, error: BaseException) -> None:
    """Save the steps since the last checkpoint, unless the weights are broken or the folder is another run's; `error`
    is what ended the run.

    By rank 0 without waiting for anyone, as other ranks may be gone. Never raises: the failure that led here is the one
    to report.
    """
    if trainer.rank != 0 or trainer.step == trainer.saved_step or trainer.lost_folder:
        return
    ended = "the run was stopped" if isinstance(error, KeyboardInterrupt) else "the run failed"
    try:
        broken = broken_weight(trainer.checkpoint())
        if broken is None:
            trainer.write_checkpoint()
            trainer.saved_step = trainer.step
            _log.warning("%s; step %d was saved to %s first", ended, trainer.step, trainer.folder)
        else:
            _log.warning("%s; step %d is not saved: weight %r is not finite", ended, trainer.step, broken)
    except Exception as failure:
        _log.warning("%s, and step %d could not be saved: %s", ended, trainer.step, failure)


def raise_if_rank_lost(error: BaseException, step: int) -> None:
    """Turns what a collective reports when another rank is gone into one line; passes over any other error.

    Raises:
        TrainingError: another rank ended, or did not answer in time.
    """
    text = one_line(error)
    # gloo has no class of its own: its messages begin with the file that they come from.
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in text)
    if lost:
        remedy = "see its error, then start the run again with --resume, on as many ranks as you like"
        raise TrainingError(f"another rank ended after step {step} ({text}); {remedy}", step=step) from error
