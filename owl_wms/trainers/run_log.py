"""Reports of a run: always one JSON line per step on disk, and the services of `reporters` beside it.

Usage:
    run_log = RunLog(folder, wandb_cfg, config={...})
    run_log.log(12, {"diffusion_loss": 0.9})
    run_log.clips(12, [Path("step_12_0.mp4")], decode.stats().reason)
    run_log.close()
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from owl_wms.configs.vae import WandbConfig
from owl_wms.errors import ConfigError
from owl_wms.trainers.checkpoints import LOG
from owl_wms.trainers.reporters import Values, start_reporters
from owl_wms.whole import make_folder

_log = logging.getLogger(__name__)


class RunLog:
    """Reports of one run, written by rank 0."""

    def __init__(
        self, folder: Path, wandb_cfg: WandbConfig | None, config: Mapping[str, Any], *, tensorboard: bool = False
    ) -> None:
        """Open `{folder}/log.jsonl` for appending, and start the services.

        Raises:
            ConfigError: the folder cannot be made, or the file not be opened.
        """
        try:
            make_folder(folder)
            self._file = (folder / LOG).open("a", encoding="utf-8")
        except OSError as error:
            key = "train.checkpoint_dir"
            raise ConfigError(f"{key}: {folder}: cannot be written: {error.strerror}", path=folder, key=key) from error
        self._start = time.monotonic()
        self._full = False
        self._reporters = start_reporters(folder, wandb_cfg, config, tensorboard=tensorboard)

    def log(self, step: int, values: Values) -> None:
        """Record the values of a step; a later line for the same step, after a resume, supersedes the earlier one.

        JSON has no NaN and no infinity: such values are written as the strings "nan", "inf" and "-inf". A disk that
        takes no lines costs a warning and those lines, until it takes some again: the run ends when a checkpoint cannot
        be saved, not before.
        """
        values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **values}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            self._full = False
        except OSError as error:
            if not self._full:
                _log.warning("%s: no more lines are written: %s", self._file.name, error.strerror)
            self._full = True
        for reporter in self._reporters:
            reporter.log(step, values)

    def clips(self, step: int, paths: Sequence[Path], decoded_by: str) -> None:
        """Record decoded clips and the backend that decoded them; services get the videos too."""
        self.log(step, {"samples": ", ".join(path.name for path in paths), "decoded_by": decoded_by})
        videos = [path for path in paths if path.suffix == ".mp4"]
        for reporter in self._reporters if videos else ():
            reporter.clips(step, videos)

    def close(self, *, failed: bool = False) -> None:
        """Finish all of them; services that mark runs mark this one as `failed`, or as finished."""
        try:
            self._file.close()
        except OSError as error:  # what is still in the buffer of a full disk
            _log.warning("%s: cannot be finished: %s", self._file.name, error.strerror)
        for reporter in self._reporters:
            reporter.close(failed=failed)
